// The numpy module: the permutohedral lattice and the dense CRF over the CPU kernels. Types, shapes and values are
// checked in deeplab_kernels/densecrf/, where the docstrings are; the checks here guard memory only.
#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../core/permutohedral.h"
#include "../cpu/dense_crf/dense_crf.h"
#include "../cpu/permutohedral/permutohedral.h"
#include "../cpu/workspace.h"
#include "thread_pool.h"

namespace py = pybind11;
using namespace deeplab_kernels;
using cpu::Lattice;
using cpu::Normalization;
using cpu::Strided;
using numpy::parallel;

namespace {

using FloatArray = py::array_t<float>;

void require(bool condition, const char* message) {
  if (!condition) throw py::value_error(message);
}

template <typename T>
constexpr py::ssize_t kSize = static_cast<py::ssize_t>(sizeof(T));

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

// pydensecrf fills the points up to a multiple of 4 with points at the origin of the feature space. They carry no
// value, but the vertices around them pass values on. One such point, masked, has the same effect.
int64_t padded_points(int64_t points) { return points + (points % 4 != 0); }

// (d, padded_points) features in units of the kernel's standard deviation.
struct Features {
  Features(int d, int64_t points)
      : d(d),
        points(points),
        padded(padded_points(points)),
        memory(size_t(d * padded) * sizeof(float)),
        values(memory.as<float>()) {
    for (int axis = 0; axis < d; ++axis)
      for (int64_t p = points; p < padded; ++p) at(axis, p) = 0;
  }
  float& at(int axis, int64_t point) { return values[axis * padded + point]; }

  int d;
  int64_t points, padded;
  cpu::Workspace memory;
  float* values;
};

// What `Lattice.problem` tells: (is it too large rather than NaN or infinite, axis, point, limit).
using Problem = std::optional<std::tuple<bool, int64_t, int64_t, double>>;

struct BuiltLattice {
  // row: see cpu::Lattice.
  BuiltLattice(const Features& features, int64_t row)
      : points(features.points),
        lattice(1, features.d, features.padded, {features.values, 0, features.padded, 1}, parallel(),
                cpu::Embedding::kPydensecrf, row) {}
  Problem problem() const {
    const cpu::FeatureProblem& found = lattice.problem();
    if (found.kind == cpu::FeatureProblem::kNone) return std::nullopt;
    return std::make_tuple(found.kind == cpu::FeatureProblem::kTooLarge, found.axis, found.point, found.limit);
  }

  int64_t points;
  Lattice<float> lattice;
};

BuiltLattice lattice_of_features(const FloatArray& array, int64_t row) {
  require(array.ndim() == 2 && array.shape(0) >= 1 && array.shape(0) <= kMaxLatticeDimension, "features: bad shape");
  const auto in = array.unchecked<2>();
  py::gil_scoped_release released;
  Features features(int(in.shape(0)), in.shape(1));
  parallel()(features.points, [&](int64_t begin, int64_t end) {
    for (int axis = 0; axis < features.d; ++axis)
      for (int64_t p = begin; p < end; ++p) features.at(axis, p) = in(axis, p);
  });
  return BuiltLattice(features, row);
}

// Divides as pydensecrf does, in float: the simplex a point lies in depends on the last bit now and then.
template <typename E>
BuiltLattice lattice_of_image(const std::pair<int64_t, int64_t>& size, const std::pair<float, float>& sigma_xy,
                              const py::array_t<E>* image, const std::vector<float>& sigma_channel) {
  const auto [height, width] = size;
  const int channels = int(sigma_channel.size());
  require(height >= 0 && width >= 0 && 2 + channels <= kMaxLatticeDimension, "image: bad size");
  std::optional<py::detail::unchecked_reference<E, 3>> in;
  if (image) {
    require(image->ndim() == 3 && image->shape(0) == height && image->shape(1) == width && image->shape(2) == channels,
            "image: bad shape");
    in.emplace(image->template unchecked<3>());
  }
  py::gil_scoped_release released;
  Features features(2 + channels, height * width);
  std::vector<float> of_x(static_cast<size_t>(width)), of_byte(sizeof(E) == 1 ? size_t(channels) * 256 : 0);
  for (size_t x = 0; x < of_x.size(); ++x) of_x[x] = float(x) / sigma_xy.first;
  for (size_t i = 0; i < of_byte.size(); ++i) of_byte[i] = float(i % 256) / sigma_channel[i / 256];
  const int64_t pixel_bytes = image ? image->strides(1) : 0;
  parallel()(height, [&](int64_t begin, int64_t end) {
    for (int64_t y = begin; y < end; ++y) {
      const int64_t first = y * width;
      std::copy(of_x.begin(), of_x.end(), &features.at(0, first));
      std::fill_n(&features.at(1, first), width, float(y) / sigma_xy.second);
      for (int c = 0; c < channels; ++c) {
        const char* from = reinterpret_cast<const char*>(in->data(y, 0, c));
        float* to = &features.at(2 + c, first);
        for (int64_t x = 0; x < width; ++x) {
          const E value = *reinterpret_cast<const E*>(from + x * pixel_bytes);
          if constexpr (sizeof(E) == 1) {
            to[x] = of_byte[size_t(c) * 256 + value];
          } else {
            to[x] = float(value) / sigma_channel[size_t(c)];
          }
        }
      }
    }
  });
  return BuiltLattice(features, width);
}

template <typename E>
BuiltLattice lattice_of_bilateral(const std::pair<int64_t, int64_t>& size, const std::pair<float, float>& sigma_xy,
                                  const py::array_t<E>& image, const std::vector<float>& sigma_channel) {
  return lattice_of_image<E>(size, sigma_xy, &image, sigma_channel);
}

Strided<const float> view(const FloatArray& array) {
  require(array.ndim() == 2, "array: bad shape");
  require(array.strides(0) % kSize<float> == 0 && array.strides(1) % kSize<float> == 0, "array: unaligned");
  return {array.data(), 0, array.strides(0) / kSize<float>, array.strides(1) / kSize<float>};
}

// A copy of the unary energies (labels, points) as the kernels want them.
class Unary {
 public:
  explicit Unary(const FloatArray& array)
      : labels(array.shape(0)),
        points(array.shape(1)),
        rows_(size_t(padded_points(points) * cpu::packed_channels(labels)) * sizeof(float)) {
    const Strided<const float> in = view(array);
    py::gil_scoped_release released;
    const int64_t blocks = (points + kBlock - 1) / kBlock, pitch = cpu::packed_channels(labels);
    std::vector<int64_t> problems(size_t(blocks), -1);
    parallel()(blocks, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const int64_t first = b * kBlock, count = std::min(kBlock, points - first);
        problems[size_t(b)] = find_problem(in, first, count);
        cpu::pack_unary(in, labels, first, count, rows_.as<float>() + first * pitch);
      }
    });
    std::fill(rows_.as<float>() + points * pitch, rows_.as<float>() + padded_points(points) * pitch, 0.0f);
    for (const int64_t p : problems)
      if (p >= 0 && (problem_ < 0 || p < problem_)) problem_ = p;
  }

  // The first element that is NaN or -infinity (or nearly so), (label, point); label is `labels` where a point has no
  // label without infinite energy.
  std::optional<std::pair<int64_t, int64_t>> problem() const {
    if (problem_ < 0) return std::nullopt;
    return std::make_pair(problem_ / points, problem_ % points);
  }
  // -U, rows of packed_channels(labels).
  const float* packed() const { return rows_.as<float>(); }

  const int64_t labels, points;

 private:
  static constexpr int64_t kBlock = 2048;
  static constexpr float kLargest = 1e30f;

  // label * points + point, or -1.
  int64_t find_problem(const Strided<const float>& in, int64_t first, int64_t count) const {
    float least[kBlock];
    std::fill_n(least, count, kLargest);
    for (int64_t label = 0; label < labels; ++label) {
      const float* row = in.data + label * in.channel_stride + first * in.point_stride;
      const bool good =
          in.point_stride == 1 ? all_usable(row, 1, count, least) : all_usable(row, in.point_stride, count, least);
      if (good) continue;
      int64_t i = 0;
      while (row[i * in.point_stride] > -kLargest) ++i;
      return label * points + first + i;
    }
    const float* impossible = std::find_if_not(least, least + count, [](float v) { return v < kLargest; });
    return impossible == least + count ? -1 : labels * points + first + (impossible - least);
  }

  static bool all_usable(const float* row, int64_t stride, int64_t count, float* least) {
    int wrong = 0;
    for (int64_t i = 0; i < count; ++i) {
      const float value = row[i * stride];
      wrong |= !(value > -kLargest);
      least[i] = value < least[i] ? value : least[i];
    }
    return !wrong;
  }

  cpu::Workspace rows_;
  int64_t problem_ = -1;
};

struct Term {
  std::shared_ptr<BuiltLattice> lattice;
  Normalization normalization;
  std::vector<float> compatibility;  // (labels, labels)
};

Term make_term(std::shared_ptr<BuiltLattice> lattice, int normalization,
               const py::array_t<float, py::array::c_style>& compatibility) {
  require(normalization >= 0 && normalization <= 3, "normalization: bad value");
  require(!lattice->problem(), "lattice: has a problem");
  return {std::move(lattice), static_cast<Normalization>(normalization),
          std::vector<float>(compatibility.data(), compatibility.data() + compatibility.size())};
}

// Mean-field inference of one model. Q is (labels, points), float32; results are stored point by point.
class Inference {
 public:
  Inference(int64_t labels, int64_t points, std::shared_ptr<Unary> unary, std::vector<std::shared_ptr<Term>> terms)
      : labels_(labels),
        points_(points),
        padded_(padded_points(points)),
        unary_(std::move(unary)),
        terms_(std::move(terms)) {
    require(labels >= 1 && points >= 0, "labels, points: bad value");
    require(!unary_ || (unary_->labels == labels && unary_->points == points && !unary_->problem()), "unary: bad");
    for (const auto& term : terms_) {
      require(term->lattice->points == points && term->lattice->lattice.row() == terms_[0]->lattice->lattice.row() &&
                  int64_t(term->compatibility.size()) == labels * labels,
              "term: bad shape");
      kernels_.push_back({term->lattice->lattice, term->normalization, term->compatibility.data()});
    }
    if (padded_ != points_) {
      mask_.assign(size_t(padded_), 1);
      mask_.back() = 0;
    }
    problem_.batch = 1;
    problem_.labels = labels;
    problem_.points = padded_;
    if (unary_) {
      problem_.packed_unary = unary_->packed();
    } else {
      problem_.unary = {&zero_, 0, 0, 0};
    }
    problem_.mask = mask_.empty() ? nullptr : mask_.data();
    problem_.kernels = kernels_.data();
    problem_.kernel_count = int(kernels_.size());
    problem_.scale = cpu::LatticeScale::kPydensecrf;
  }
  Inference(const Inference&) = delete;

  FloatArray run(int64_t iterations, const std::function<void(int64_t)>& progress) {
    require(iterations >= 0, "iterations: bad value");
    auto [result, q] = new_q();
    if (points_ > 0) {
      py::gil_scoped_release released;
      const auto after_iteration = [](void* context, int64_t t) {
        py::gil_scoped_acquire acquired;
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();
        const auto& call = *static_cast<const std::function<void(int64_t)>*>(context);
        if (call) call(t);
      };
      cpu::mean_field<float>(problem_, iterations, {.energy = {}, .q = q}, nullptr, parallel(), after_iteration,
                             const_cast<std::function<void(int64_t)>*>(&progress));
    }
    return result;
  }

  // Q_0 = softmax(-U).
  FloatArray start() {
    auto [result, q] = new_q();
    if (points_ > 0) {
      py::gil_scoped_release released;
      std::lock_guard lock(mutex_);
      engine().start({.energy = {}, .q = q});
    }
    return result;
  }

  // One iteration from `array`, which is overwritten.
  void step(FloatArray array) {
    const Strided<float> given = marginals(array);
    if (points_ == 0) return;
    py::gil_scoped_release released;
    std::lock_guard lock(mutex_);
    std::vector<float> room;
    const Strided<float> q = with_padding(given, room);
    engine().set_q({q.data, 0, q.channel_stride, q.point_stride});
    engine().step({.energy = {}, .q = q}, false);
    if (q.data != given.data) copy(q, given);
  }

  // sum_i Q_i . (log Q_i + U_i + sum_m C_m F_m Q_i), up to a constant the divergence of Q from the model's
  // distribution.
  double kl_divergence(FloatArray array) {
    const Strided<float> given = marginals(array);
    if (points_ == 0) return 0;
    py::gil_scoped_release released;
    std::lock_guard lock(mutex_);
    std::vector<float> room, message(kernels_.empty() ? 0 : size_t(padded_ * labels_));
    const Strided<float> q = with_padding(given, room);
    const int64_t pitch = cpu::packed_channels(labels_);
    double sum = sum_over_points([&](int64_t p) {
      double result = 0;
      for (int64_t l = 0; l < labels_; ++l) {
        const double value = q.data[l * q.channel_stride + p * q.point_stride];
        if (value == 0) continue;  // the energy of a forbidden label is infinite
        result += value * (std::log(std::max(value, 1e-20)) - (unary_ ? unary_->packed()[p * pitch + l] : 0.0f));
      }
      return result;
    });
    for (size_t m = 0; m < kernels_.size(); ++m) {
      engine().pairwise(int(m), {q.data, 0, q.channel_stride, q.point_stride}, {message.data(), 0, 1, labels_});
      sum += sum_over_points([&](int64_t p) {
        double result = 0;
        for (int64_t l = 0; l < labels_; ++l)
          result += double(q.data[l * q.channel_stride + p * q.point_stride]) * message[size_t(p * labels_ + l)];
        return result;
      });
    }
    return sum;
  }

 private:
  cpu::MeanField<float>& engine() {
    if (!engine_) engine_.emplace(problem_, parallel());
    return *engine_;
  }

  // A (labels, points) array with room for the padding, in memory that the next call can use again.
  std::pair<FloatArray, Strided<float>> new_q() {
    auto memory = std::make_unique<cpu::Workspace>(size_t(padded_ * labels_) * sizeof(float));
    float* data = memory->as<float>();
    const py::capsule owner(memory.get(), [](void* released) { delete static_cast<cpu::Workspace*>(released); });
    (void)memory.release();
    FloatArray result({labels_, points_}, {kSize<float>, labels_ * kSize<float>}, data, owner);
    return {result, {data, 0, 1, labels_}};
  }

  Strided<float> marginals(FloatArray& array) const {
    const Strided<const float> q = view(array);
    require(array.shape(0) == labels_ && array.shape(1) == points_, "Q: bad shape");
    return {array.mutable_data(), 0, q.channel_stride, q.point_stride};
  }

  Strided<float> with_padding(const Strided<float>& q, std::vector<float>& room) const {
    if (padded_ == points_) return q;
    room.assign(size_t(padded_ * labels_), 0);
    const Strided<float> result{room.data(), 0, 1, labels_};
    copy(q, result);
    return result;
  }

  void copy(const Strided<float>& from, const Strided<float>& to) const {
    parallel()(points_, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p)
        for (int64_t l = 0; l < labels_; ++l)
          to.data[l * to.channel_stride + p * to.point_stride] =
              from.data[l * from.channel_stride + p * from.point_stride];
    });
  }

  // In blocks of fixed size, so that the sum does not depend on the number of threads.
  template <typename F>
  double sum_over_points(const F& of_point) const {
    constexpr int64_t kBlock = 1024;
    std::vector<double> sums(size_t((points_ + kBlock - 1) / kBlock));
    parallel()(int64_t(sums.size()), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b)
        for (int64_t p = b * kBlock; p < std::min((b + 1) * kBlock, points_); ++p) sums[size_t(b)] += of_point(p);
    });
    double total = 0;
    for (const double sum : sums) total += sum;
    return total;
  }

  static constexpr float zero_ = 0;
  const int64_t labels_, points_, padded_;
  const std::shared_ptr<Unary> unary_;
  const std::vector<std::shared_ptr<Term>> terms_;
  std::vector<cpu::PairwiseKernel<float>> kernels_;
  std::vector<uint8_t> mask_;
  cpu::MeanFieldProblem<float> problem_;
  std::mutex mutex_;  // of engine_
  std::optional<cpu::MeanField<float>> engine_;
};

}  // namespace

PYBIND11_MODULE(_densecrf, m) {
  m.doc() = "Permutohedral lattice and dense CRF for numpy: see deeplab_kernels.densecrf.";
  m.attr("MAX_DIMENSION") = kMaxLatticeDimension;
  m.def("lattice_embed", &lattice_embed, py::arg("features"));
  m.def("num_threads", &numpy::num_threads);
  m.def("set_num_threads", &numpy::set_num_threads, py::arg("threads"));

  py::class_<BuiltLattice, std::shared_ptr<BuiltLattice>>(m, "Lattice")
      .def(py::init(&lattice_of_features), py::arg("features"), py::arg("row") = 0)
      .def_static(
          "gaussian",
          [](const std::pair<int64_t, int64_t>& size, const std::pair<float, float>& sigma_xy) {
            return lattice_of_image<float>(size, sigma_xy, nullptr, {});
          },
          py::arg("size"), py::arg("sigma_xy"))
      .def_static("bilateral", &lattice_of_bilateral<uint8_t>, py::arg("size"), py::arg("sigma_xy"),
                  py::arg("image").noconvert(), py::arg("sigma_channel"))
      .def_static("bilateral", &lattice_of_bilateral<uint16_t>, py::arg("size"), py::arg("sigma_xy"),
                  py::arg("image").noconvert(), py::arg("sigma_channel"))
      .def_static("bilateral", &lattice_of_bilateral<float>, py::arg("size"), py::arg("sigma_xy"),
                  py::arg("image").noconvert(), py::arg("sigma_channel"))
      .def_property_readonly("problem", &BuiltLattice::problem)
      .def_property_readonly("vertices", [](const BuiltLattice& l) { return l.lattice.vertices(); })
      .def_property_readonly("nbytes", [](const BuiltLattice& l) { return l.lattice.memory(); });

  py::class_<Unary, std::shared_ptr<Unary>>(m, "Unary")
      .def(py::init<const FloatArray&>(), py::arg("energies"))
      .def_property_readonly("problem", &Unary::problem);

  py::class_<Term, std::shared_ptr<Term>>(m, "Term").def(py::init(&make_term), py::arg("lattice"),
                                                         py::arg("normalization"), py::arg("compatibility"));

  py::class_<Inference>(m, "Inference")
      .def(py::init<int64_t, int64_t, std::shared_ptr<Unary>, std::vector<std::shared_ptr<Term>>>(), py::arg("labels"),
           py::arg("points"), py::arg("unary").none(true), py::arg("terms"))
      .def("run", &Inference::run, py::arg("iterations"), py::arg("progress").none(true))
      .def("start", &Inference::start)
      .def("step", &Inference::step, py::arg("q").noconvert())
      .def("kl_divergence", &Inference::kl_divergence, py::arg("q").noconvert());
}
