// Mean field, forward and backward. One iteration is one pass over the points: a block of them slices all lattices'
// filtered values, adds the unary energies, takes the softmax and splats it for the next iteration, in the cache. Q as
// a whole is never in memory, unless it is saved.
#include "dense_crf.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "../permutohedral/passes.h"
#include "../workspace.h"

namespace deeplab_kernels::cpu {
namespace {

// A kernel's matrix by what it costs: multiples of the identity are part of slicing.
enum class MatrixKind { kScalar, kDiagonal, kFull };

template <typename T>
struct Compatibility {
  MatrixKind kind = MatrixKind::kScalar;
  T scalar = T(0);
  Buffer<T> rows;        // diagonal: (pitch); full: the matrix (labels, pitch)
  Buffer<T> transposed;  // full: (labels, pitch)

  Compatibility(const T* matrix, int64_t labels, int64_t pitch) {
    bool diagonal = true, equal = true;
    for (int64_t i = 0; i < labels; ++i)
      for (int64_t j = 0; j < labels; ++j) {
        if (i != j) diagonal &= matrix[i * labels + j] == T(0);
        if (i == j) equal &= matrix[i * labels + j] == matrix[0];
      }
    kind = !diagonal ? MatrixKind::kFull : equal ? MatrixKind::kScalar : MatrixKind::kDiagonal;
    scalar = matrix[0];
    if (kind == MatrixKind::kDiagonal) {
      rows = Buffer<T>(pitch);
      for (int64_t i = 0; i < pitch; ++i) rows[i] = i < labels ? matrix[i * labels + i] : T(0);
    } else if (kind == MatrixKind::kFull) {
      rows = Buffer<T>(labels * pitch), transposed = Buffer<T>(labels * pitch);
      std::fill(rows.data(), rows.data() + rows.size(), T(0));
      std::fill(transposed.data(), transposed.data() + transposed.size(), T(0));
      for (int64_t i = 0; i < labels; ++i)
        for (int64_t j = 0; j < labels; ++j) {
          rows[i * pitch + j] = matrix[i * labels + j];
          transposed[j * pitch + i] = matrix[i * labels + j];
        }
    }
  }
};

// What one kernel needs in one direction.
template <typename T>
struct Filter {
  const LatticeData<T>* lattice;
  Normalizer<T> normalizer;
  VertexRows<T> rows;

  Filter(const MeanFieldProblem<T>& problem, int m, int64_t pitch, bool transpose, const Parallel& parallel)
      : lattice(problem.kernels[m].lattice.data()),
        normalizer(*lattice, problem.kernels[m].normalization, problem.scale, problem.mask, transpose, parallel),
        rows(*lattice, pitch) {}

  void splat(int64_t image, int64_t first, int64_t count, const T* values, int64_t pitch, T* sums) const {
    lattice_kernels<T>().splat(lattice->places(image, first), factors(normalizer.before, image, first), values, pitch,
                               count, sums);
  }
  // out = base + factor * filtered; base may be null: 0.
  void slice(int64_t image, int64_t first, int64_t count, T factor, const T* base, int64_t pitch, T* out) const {
    lattice_kernels<T>().slice(lattice->places(image, first), factors(normalizer.after, image, first),
                               factor * normalizer.scale, rows.rows(), pitch, count, base, out);
  }
  const T* factors(const T* all, int64_t image, int64_t first) const {
    return all ? all + image * lattice->plan.points + first : nullptr;
  }
};

template <typename T>
void load_rows(Strided<const T> from, int64_t channels, int64_t pitch, int64_t image, int64_t first, int64_t count,
               T sign, T pad, T* rows) {
  lattice_kernels<T>().load(from.data + image * from.batch_stride + first * from.point_stride, from.channel_stride,
                            from.point_stride, channels, pitch, count, sign, pad, rows);
}

template <typename T>
void store_rows(const T* rows, int64_t pitch, int64_t channels, int64_t image, int64_t first, int64_t count,
                Strided<T> to) {
  if (to.data == nullptr) return;
  lattice_kernels<T>().store(rows, pitch, channels, count, to.data + image * to.batch_stride + first * to.point_stride,
                             to.channel_stride, to.point_stride);
}

// out += factor * C rows
template <typename T>
void add_compatibility(const Compatibility<T>& c, T factor, const T* rows, int64_t labels, int64_t pitch, int64_t count,
                       bool transpose, T* out) {
  const LatticeKernels<T>& kernels = lattice_kernels<T>();
  if (c.kind == MatrixKind::kFull) {
    const Buffer<T>& matrix = transpose ? c.rows : c.transposed;
    kernels.add_product(matrix.data(), factor, rows, labels, pitch, count, out);
  } else if (c.kind == MatrixKind::kDiagonal) {
    kernels.add_diagonal(c.rows.data(), factor, rows, pitch, count, out);
  } else {
    for (int64_t i = 0; i < count * pitch; ++i) out[i] += factor * c.scalar * rows[i];
  }
}

template <typename T>
ChunkPlan plan_of(const MeanFieldProblem<T>& problem) {
  return ChunkPlan(problem.batch, problem.points, problem.kernel_count > 0 ? problem.kernels[0].lattice.row() : 0);
}

template <typename T>
T* scratch_rows(int64_t elements) {
  return static_cast<T*>(thread_scratch(size_t(elements) * sizeof(T)));
}

}  // namespace

template <typename T>
void pack_unary(Strided<const T> unary, int64_t labels, int64_t first, int64_t count, T* rows) {
  load_rows(unary, labels, packed_channels(labels), 0, first, count, T(-1), -std::numeric_limits<T>::infinity(), rows);
}

template <typename T>
struct MeanField<T>::State {
  MeanFieldProblem<T> problem;
  const Parallel& parallel;
  ChunkPlan plan;
  int64_t pitch, block;
  std::vector<Filter<T>> filters;
  std::vector<Compatibility<T>> compatibility;

  State(const MeanFieldProblem<T>& p, const Parallel& pool)
      : problem(p), parallel(pool), plan(plan_of(p)), pitch(packed_channels(p.labels)), block(block_points(pitch)) {
    if (empty()) return;
    for (int m = 0; m < p.kernel_count; ++m) {
      filters.emplace_back(p, m, pitch, false, parallel);
      compatibility.emplace_back(p.kernels[m].compatibility, p.labels, pitch);
    }
  }

  bool empty() const { return plan.chunks() == 0 || problem.labels == 0; }
  int kernel_count() const { return int(filters.size()); }
  // -U, padding -infinity: where the caller has it so, or in `rows`.
  const T* unary_rows(int64_t image, int64_t first, int64_t count, T* rows) const {
    if (problem.packed_unary != nullptr) return problem.packed_unary + (image * plan.points + first) * pitch;
    Strided<const T> unary = problem.unary;
    unary.data += image * unary.batch_stride;
    pack_unary(unary, problem.labels, first, count, rows);
    return rows;
  }

  // Calls f(image, first, count, scratch) for all blocks, scratch of three blocks' rows, after prepare(chunk).
  template <typename F, typename Prepare>
  void each_block(F&& f, Prepare&& prepare) const {
    parallel(plan.chunks(), [&](int64_t begin, int64_t end) {
      T* scratch = scratch_rows<T>(3 * block * pitch);
      for (int64_t c = begin; c < end; ++c) {
        prepare(c);
        over_blocks(plan, c, block,
                    [&](int64_t image, int64_t first, int64_t count) { f(image, first, count, scratch); });
      }
    });
  }
  template <typename F>
  void each_block(F&& f) const {
    each_block(f, [](int64_t) {});
  }

  void clear_sums(int64_t chunk) const {
    for (const Filter<T>& filter : filters) filter.rows.begin_chunk(chunk);
  }
  void splat(int64_t image, int64_t first, int64_t count, const T* q) const {
    for (const Filter<T>& filter : filters) filter.splat(image, first, count, q, pitch, filter.rows.sums());
  }
  void blur() {
    for (Filter<T>& filter : filters) filter.rows.blur(false, parallel);
  }

  // energy -> q, outputs, and the next splat. q may be energy: the fewer rows, the more of the vertices' stay in the
  // cache.
  void finish_block(int64_t image, int64_t first, int64_t count, const T* energy, T* q,
                    const MeanFieldOutput<T>& output, bool more, T* saved) const {
    store_rows(energy, pitch, problem.labels, image, first, count, output.energy);
    if (!more && saved == nullptr && output.q.data == nullptr) return;
    lattice_kernels<T>().softmax(energy, pitch, count, q);
    store_rows(q, pitch, problem.labels, image, first, count, output.q);
    if (saved != nullptr)
      std::memcpy(saved + (image * plan.points + first) * pitch, q, size_t(count * pitch) * sizeof(T));
    if (more) splat(image, first, count, q);
  }

  void start(const MeanFieldOutput<T>& output, bool more, T* saved) {
    if (empty()) return;
    each_block(
        [&](int64_t image, int64_t first, int64_t count, T* scratch) {
          const T* energy = unary_rows(image, first, count, scratch);
          finish_block(image, first, count, energy, scratch, output, more, saved);
        },
        [&](int64_t c) { clear_sums(c); });
  }

  void step(const MeanFieldOutput<T>& output, bool more, T* saved) {
    if (empty()) return;
    blur();
    each_block(
        [&](int64_t image, int64_t first, int64_t count, T* scratch) {
          T* sum = scratch;
          T* filtered = scratch + block * pitch;
          const T* energy = unary_rows(image, first, count, sum);
          for (int m = 0; m < kernel_count(); ++m) {
            const Compatibility<T>& matrix = compatibility[m];
            if (matrix.kind == MatrixKind::kScalar) {
              filters[m].slice(image, first, count, -matrix.scalar, energy, pitch, sum);
            } else {
              filters[m].slice(image, first, count, T(1), nullptr, pitch, filtered);
              if (energy != sum) std::memcpy(sum, energy, size_t(count * pitch) * sizeof(T));
              add_compatibility(matrix, T(-1), filtered, problem.labels, pitch, count, false, sum);
            }
            energy = sum;
          }
          finish_block(image, first, count, energy, sum, output, more, saved);
        },
        [&](int64_t c) {
          if (more) clear_sums(c);
        });
  }

  void set_q(Strided<const T> q) {
    if (empty()) return;
    each_block(
        [&](int64_t image, int64_t first, int64_t count, T* scratch) {
          load_rows(q, problem.labels, pitch, image, first, count, T(1), T(0), scratch);
          splat(image, first, count, scratch);
        },
        [&](int64_t c) { clear_sums(c); });
  }

  void pairwise(int m, Strided<const T> q, bool with_matrix, Strided<T> out) {
    if (empty()) return;
    // Rows of its own: those of the filters may hold the next step's values.
    const Filter<T>& filter = filters[m];
    VertexRows<T> rows(*filter.lattice, pitch);
    const LatticeKernels<T>& kernels = lattice_kernels<T>();
    each_block(
        [&](int64_t image, int64_t first, int64_t count, T* scratch) {
          load_rows(q, problem.labels, pitch, image, first, count, T(1), T(0), scratch);
          filter.splat(image, first, count, scratch, pitch, rows.sums());
        },
        [&](int64_t c) { rows.begin_chunk(c); });
    rows.blur(false, parallel);
    each_block([&](int64_t image, int64_t first, int64_t count, T* scratch) {
      T* product = scratch + block * pitch;
      kernels.slice(filter.lattice->places(image, first), filter.factors(filter.normalizer.after, image, first),
                    filter.normalizer.scale, rows.rows(), pitch, count, nullptr, scratch);
      std::fill(product, product + count * pitch, T(0));
      if (with_matrix) add_compatibility(compatibility[m], T(1), scratch, problem.labels, pitch, count, false, product);
      store_rows(with_matrix ? product : scratch, pitch, problem.labels, image, first, count, out);
    });
  }
};

template <typename T>
MeanField<T>::MeanField(const MeanFieldProblem<T>& problem, const Parallel& parallel)
    : state_(std::make_unique<State>(problem, parallel)) {}
template <typename T>
MeanField<T>::~MeanField() = default;
template <typename T>
MeanField<T>::MeanField(MeanField&&) noexcept = default;
template <typename T>
MeanField<T>& MeanField<T>::operator=(MeanField&&) noexcept = default;

template <typename T>
void MeanField<T>::start(const MeanFieldOutput<T>& output, T* saved) {
  state_->start(output, true, saved);
}
template <typename T>
void MeanField<T>::set_q(Strided<const T> q) {
  state_->set_q(q);
}
template <typename T>
void MeanField<T>::step(const MeanFieldOutput<T>& output, bool more, T* saved) {
  state_->step(output, more, saved);
}
template <typename T>
void MeanField<T>::filter(int m, Strided<const T> q, Strided<T> out) {
  state_->pairwise(m, q, false, out);
}
template <typename T>
void MeanField<T>::pairwise(int m, Strided<const T> q, Strided<T> out) {
  state_->pairwise(m, q, true, out);
}

int64_t mean_field_saved_size(int64_t batch, int64_t labels, int64_t points, int64_t iterations) {
  return iterations * batch * points * packed_channels(labels);
}

template <typename T>
void mean_field(const MeanFieldProblem<T>& problem, int64_t iterations, const MeanFieldOutput<T>& output, T* saved,
                const Parallel& parallel, MeanFieldProgress progress, void* progress_context) {
  MeanField<T> inference(problem, parallel);
  const int64_t size = mean_field_saved_size(problem.batch, problem.labels, problem.points, 1);
  inference.start(iterations == 0 ? output : MeanFieldOutput<T>(), iterations == 0 ? nullptr : saved);
  for (int64_t t = 1; t <= iterations; ++t) {
    const bool last = t == iterations;
    inference.step(last ? output : MeanFieldOutput<T>(), !last, saved && !last ? saved + t * size : nullptr);
    if (progress != nullptr) progress(progress_context, t);
  }
}

template <typename T>
void mean_field_backward(const MeanFieldProblem<T>& problem, int64_t iterations, const MeanFieldGradients<T>& gradients,
                         const Parallel& parallel) {
  const int64_t labels = problem.labels, pitch = packed_channels(labels), block = block_points(pitch);
  const ChunkPlan plan = plan_of(problem);
  const int count_m = problem.kernel_count;
  const LatticeKernels<T>& kernels = lattice_kernels<T>();
  const auto wants_features = [&](int m) {
    return gradients.grad_features != nullptr && gradients.grad_features[m].data != nullptr;
  };
  const auto wants_matrix = [&](int m) {
    return gradients.grad_compatibility != nullptr && gradients.grad_compatibility[m] != nullptr;
  };
  for (int m = 0; m < count_m; ++m)
    if (wants_matrix(m)) std::fill_n(gradients.grad_compatibility[m], labels * labels, T(0));
  if (plan.chunks() == 0 || labels == 0) return;

  // For kernel m: the transposed filter of dL/dE, and, if the features' gradient is wanted, the filter of C^T-weighted
  // values: with h = -C^T dL/dE the features see sum_i <h_i, (F Q)_i>.
  std::vector<Filter<T>> backward;
  std::vector<Compatibility<T>> compatibility;
  std::vector<VertexRows<T>> forward_rows;
  std::vector<FeatureGradient<T>> feature_gradients;
  std::vector<int> feature_index(size_t(count_m), -1);
  std::vector<Buffer<T>> matrix_parts(static_cast<size_t>(count_m));  // per chunk (labels, pitch)
  for (int m = 0; m < count_m; ++m) {
    backward.emplace_back(problem, m, pitch, true, parallel);
    compatibility.emplace_back(problem.kernels[m].compatibility, labels, pitch);
    if (wants_features(m)) {
      feature_index[m] = int(feature_gradients.size());
      feature_gradients.emplace_back(*backward[m].lattice, problem.kernels[m].normalization, false, problem.mask);
      forward_rows.emplace_back(*backward[m].lattice, pitch);
    }
    if (wants_matrix(m)) {
      matrix_parts[m] = Buffer<T>(plan.chunks() * labels * pitch);
      std::memset(matrix_parts[m].data(), 0, matrix_parts[m].bytes());
    }
  }
  const int64_t total = problem.batch * problem.points;
  Buffer<T> grad_energy(total * pitch);  // dL/dE_t
  Buffer<T> grad_unary(gradients.grad_unary.data ? total * pitch : 0);
  const auto at = [&](const Buffer<T>& rows, int64_t image, int64_t first) {
    return rows.data() + (image * problem.points + first) * pitch;
  };
  const auto saved_q = [&](int64_t t, int64_t image, int64_t first) {
    return gradients.saved + ((t * problem.batch + image) * problem.points + first) * pitch;
  };
  const auto subtract = [&](const T* grad, int64_t image, int64_t first, int64_t count) {
    if (grad_unary.size() == 0) return;
    T* to = at(grad_unary, image, first);
    for (int64_t i = 0; i < count * pitch; ++i) to[i] -= grad[i];
  };
  const auto begin_chunk = [&](int64_t c) {
    for (const Filter<T>& filter : backward) filter.rows.begin_chunk(c);
  };
  // dL/dE_t of a block -> the lattices.
  const auto splat = [&](int64_t image, int64_t first, int64_t count, const T* grad) {
    for (const Filter<T>& filter : backward) filter.splat(image, first, count, grad, pitch, filter.rows.sums());
  };
  const auto multiplied = [&](const T* rows, const T* factors, int64_t count, T* out) {
    for (int64_t p = 0; p < count; ++p)
      for (int64_t k = 0; k < pitch; ++k)
        out[p * pitch + k] = factors ? factors[p] * rows[p * pitch + k] : rows[p * pitch + k];
  };

  parallel(plan.chunks(), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      begin_chunk(c);
      over_blocks(plan, c, block, [&](int64_t image, int64_t first, int64_t count) {
        T* grad = at(grad_energy, image, first);
        load_rows(gradients.grad_energy, labels, pitch, image, first, count, T(1), T(0), grad);
        if (grad_unary.size() > 0) std::memset(at(grad_unary, image, first), 0, size_t(count * pitch) * sizeof(T));
        subtract(grad, image, first, count);
        if (iterations > 0) splat(image, first, count, grad);
      });
    }
  });

  for (int64_t t = iterations; t > 0; --t) {
    for (int m = 0; m < count_m; ++m) {
      backward[m].rows.blur(true, parallel);
      if (feature_index[m] < 0) continue;
      // F Q again, as values on the vertices.
      VertexRows<T>& rows = forward_rows[feature_index[m]];
      parallel(plan.chunks(), [&](int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; ++c) {
          T* to = rows.begin_chunk(c);
          over_blocks(plan, c, block, [&](int64_t image, int64_t first, int64_t count) {
            // The transposed filter's factor after is the filter's factor before.
            kernels.splat(backward[m].lattice->places(image, first),
                          backward[m].factors(backward[m].normalizer.after, image, first), saved_q(t - 1, image, first),
                          pitch, count, to);
          });
        }
      });
      rows.blur(false, parallel);
    }
    parallel(plan.chunks(), [&](int64_t begin, int64_t end) {
      T* scratch = scratch_rows<T>(4 * block * pitch);
      T* grad_q = scratch;
      T* filtered = scratch + block * pitch;
      T* a = scratch + 2 * block * pitch;
      T* b = scratch + 3 * block * pitch;
      for (int64_t c = begin; c < end; ++c) {
        // The sums are free: the blurred values lie elsewhere.
        begin_chunk(c);
        over_blocks(plan, c, block, [&](int64_t image, int64_t first, int64_t count) {
          T* grad = at(grad_energy, image, first);
          const T* q = saved_q(t - 1, image, first);
          std::fill(grad_q, grad_q + count * pitch, T(0));
          for (int m = 0; m < count_m; ++m) {
            const Filter<T>& filter = backward[m];
            filter.slice(image, first, count, T(1), nullptr, pitch, filtered);
            if (wants_matrix(m))
              kernels.add_outer(filtered, q, T(-1), labels, pitch, count, matrix_parts[m].data() + c * labels * pitch);
            add_compatibility(compatibility[m], T(-1), filtered, labels, pitch, count, true, grad_q);
            if (feature_index[m] < 0) continue;
            // E = ... - C F Q = ... - F (C Q): a is dL/dE, its counterpart C Q; written with C on the gradient's side.
            std::fill(b, b + count * pitch, T(0));
            add_compatibility(compatibility[m], T(-1), grad, labels, pitch, count, true, b);
            multiplied(b, filter.factors(filter.normalizer.before, image, first), count, a);
            std::fill(b, b + count * pitch, T(0));
            add_compatibility(compatibility[m], T(-1), q, labels, pitch, count, false, b);
            multiplied(b, filter.factors(filter.normalizer.after, image, first), count, b);
            feature_gradients[feature_index[m]].add(image, first, count, filter.normalizer.scale, a,
                                                    forward_rows[feature_index[m]].rows(), b, filter.rows.rows(),
                                                    pitch);
          }
          std::memcpy(grad, grad_q, size_t(count * pitch) * sizeof(T));
          kernels.softmax_backward(q, pitch, count, grad);
          subtract(grad, image, first, count);
          if (t > 1) splat(image, first, count, grad);
        });
      }
    });
  }

  if (gradients.grad_unary.data)
    parallel(plan.chunks(), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c)
        over_blocks(plan, c, block, [&](int64_t image, int64_t first, int64_t count) {
          store_rows(at(grad_unary, image, first), pitch, labels, image, first, count, gradients.grad_unary);
        });
    });
  for (int m = 0; m < count_m; ++m) {
    if (wants_matrix(m))
      for (int64_t c = 0; c < plan.chunks(); ++c)
        for (int64_t i = 0; i < labels; ++i)
          for (int64_t j = 0; j < labels; ++j)
            gradients.grad_compatibility[m][i * labels + j] += matrix_parts[m][(c * labels + i) * pitch + j];
    if (feature_index[m] >= 0)
      feature_gradients[feature_index[m]].finish(backward[m].normalizer.scale, gradients.features[m],
                                                 gradients.grad_features[m], parallel);
  }
}

#define DK_INSTANTIATE(T)                                                                                          \
  template void pack_unary<T>(Strided<const T>, int64_t, int64_t, int64_t, T*);                                    \
  template class MeanField<T>;                                                                                     \
  template void mean_field<T>(const MeanFieldProblem<T>&, int64_t, const MeanFieldOutput<T>&, T*, const Parallel&, \
                              MeanFieldProgress, void*);                                                           \
  template void mean_field_backward<T>(const MeanFieldProblem<T>&, int64_t, const MeanFieldGradients<T>&,          \
                                       const Parallel&);
DK_INSTANTIATE(float)
DK_INSTANTIATE(double)

}  // namespace deeplab_kernels::cpu
