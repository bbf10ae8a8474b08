// The numpy module. For now the lattice's geometry: where each point lies on the permutohedral lattice.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cmath>
#include <string>

#include "../core/permutohedral.h"

namespace py = pybind11;
using namespace deeplab_kernels;

namespace {

using Features = py::array_t<double, py::array::c_style | py::array::forcecast>;

py::tuple lattice_embed(const Features& features) {
  if (features.ndim() != 2)
    throw py::value_error("features must have shape (points, d), got " + std::to_string(features.ndim()) +
                          " dimensions");
  const py::ssize_t points = features.shape(0), d = features.shape(1);
  if (d < 1 || d > kMaxLatticeDimension)
    throw py::value_error("features must have 1 to " + std::to_string(kMaxLatticeDimension) + " columns, got " +
                          std::to_string(d));
  // Coordinates are stored as int32: beyond this bound they would wrap.
  constexpr double kLimit = 1 << 26;
  auto in = features.unchecked<2>();
  py::array_t<int32_t> keys({points, d + 1, d + 1});
  py::array_t<double> weights({points, d + 1});
  auto key = keys.mutable_unchecked<3>();
  auto weight = weights.mutable_unchecked<2>();
  for (py::ssize_t p = 0; p < points; ++p) {
    double position[kMaxLatticeDimension], barycentric[kMaxLatticeDimension + 2];
    int32_t greedy[kMaxLatticeDimension + 1], rank[kMaxLatticeDimension + 1];
    for (py::ssize_t i = 0; i < d; ++i) {
      const double root = 1.0 / std::sqrt(double(i + 1) * double(i + 2));
      position[i] = in(p, i) * lattice_scale(int(i), int(d), root);
      if (!(std::abs(position[i]) < kLimit))
        throw py::value_error("features[" + std::to_string(p) + ", " + std::to_string(i) +
                              "] is NaN, infinite or too far from 0 for the lattice");
    }
    lattice_simplex(position, int(d), greedy, rank, barycentric);
    for (int k = 0; k <= d; ++k) {
      weight(p, k) = barycentric[k];
      for (int i = 0; i <= d; ++i) key(p, k, i) = lattice_vertex(greedy[i], rank[i], k, int(d));
    }
  }
  return py::make_tuple(keys, weights);
}

}  // namespace

PYBIND11_MODULE(_densecrf, m) {
  m.doc() = "Permutohedral lattice for numpy.";
  m.def("lattice_embed", &lattice_embed, py::arg("features"),
        "Vertices and barycentric weights of points on the permutohedral lattice (Adams, Baek, Davis 2010).\n\n"
        "features: (points, d) float, d = 1..16, in units of the kernel's standard deviation.\n"
        "Returns (keys, weights): keys (points, d + 1, d + 1) int32, the coordinates of each enclosing vertex (they sum\n"
        "to 0); weights (points, d + 1) float64, which sum to 1.\n"
        "Raises ValueError for a wrong shape and for NaN, infinite or too large features.");
}
