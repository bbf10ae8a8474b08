// The numpy module. For now the lattice's geometry: where each point lies on the permutohedral lattice. Types and
// shapes are checked in deeplab_kernels/densecrf/, where the docstrings are.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cmath>
#include <string>

#include "../core/permutohedral.h"

namespace py = pybind11;
using namespace deeplab_kernels;

namespace {

// features (points, d) -> keys (points, d + 1, d + 1), weights (points, d + 1)
py::tuple lattice_embed(const py::array_t<double, py::array::c_style>& features) {
  const auto in = features.unchecked<2>();
  const py::ssize_t points = in.shape(0), d = in.shape(1);
  // A coordinate is at most d times as large as this: it fits an int32.
  constexpr double kLimit = 1 << 26;
  py::array_t<int32_t> keys({points, d + 1, d + 1});
  py::array_t<double> weights({points, d + 1});
  auto key = keys.mutable_unchecked<3>();
  auto weight = weights.mutable_unchecked<2>();
  double scale[kMaxLatticeDimension];
  for (py::ssize_t i = 0; i < d; ++i)
    scale[i] = lattice_scale(static_cast<int>(d), 1.0 / std::sqrt(double(i + 1) * double(i + 2)));
  for (py::ssize_t p = 0; p < points; ++p) {
    double position[kMaxLatticeDimension], barycentric[kMaxLatticeDimension + 2];
    int32_t greedy[kMaxLatticeDimension + 1], rank[kMaxLatticeDimension + 1];
    for (py::ssize_t i = 0; i < d; ++i) {
      position[i] = in(p, i) * scale[i];
      if (!(std::abs(position[i]) < kLimit))
        throw py::value_error("features[" + std::to_string(p) + ", " + std::to_string(i) + "] is " +
                              (std::isfinite(in(p, i)) ? "too far from 0 for the lattice: beyond about " +
                                                             std::to_string(int64_t(kLimit / scale[i]))
                                                       : "NaN or infinite"));
    }
    lattice_simplex(position, static_cast<int>(d), greedy, rank, barycentric);
    for (int k = 0; k <= d; ++k) {
      weight(p, k) = barycentric[k];
      for (int i = 0; i <= d; ++i) key(p, k, i) = lattice_vertex(greedy[i], rank[i], k, static_cast<int>(d));
    }
  }
  return py::make_tuple(keys, weights);
}

}  // namespace

PYBIND11_MODULE(_densecrf, m) {
  m.doc() = "Permutohedral lattice for numpy: see deeplab_kernels.densecrf.";
  m.attr("MAX_DIMENSION") = kMaxLatticeDimension;
  m.def("lattice_embed", &lattice_embed, py::arg("features"));
}
