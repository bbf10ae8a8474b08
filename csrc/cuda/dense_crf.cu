// Launches of dense_crf_passes.h, and the calls of dense_crf.h.
#include <vector>

#include "dense_crf.h"
#include "dense_crf_passes.h"
#include "permutohedral_calls.h"

namespace deeplab_kernels::cuda {
namespace {

constexpr int64_t kOuterSlices = 512;

template <typename T>
class MeanField {
 public:
  MeanField(const Context& context, const MeanFieldProblem& problem)
      : context_(context),
        problem_(problem),
        total_(problem.batch * problem.points),
        labels_(problem.labels),
        stride_(padded_channels(problem.labels)),
        image_{problem.batch, 1, problem.points} {
    energy_ = rows();
    run_to_rows(context, image_, static_cast<const T*>(problem.unary), labels_, T(-1), energy_);
    T* mask = nullptr;
    if (problem.mask) {
      mask = context.scratch_array<T>(total_);
      launch("mask_values", mask_values<T>, ceil_div(total_, kBuildThreads), dim3(kBuildThreads), 0, context.stream,
             problem.mask, total_, mask);
    }
    int64_t most_values = 0, most_parts = 0;
    for (int m = 0; m < problem.kernel_count; ++m) {
      const PairwiseKernel& kernel = problem.kernels[m];
      const LatticeShape shape{problem.batch, kernel.dimension, problem.points};
      Lattice<T> lattice;
      if (kernel.lattice) {
        lay_out_lattice(shape, const_cast<void*>(kernel.lattice), &lattice);
      } else {
        lay_out_lattice(shape, context.scratch(lay_out_lattice<T>(shape, nullptr, nullptr)), &lattice);
        build_lattice(context, shape, static_cast<const T*>(kernel.features), lattice);
      }
      kernels_.push_back({LatticeFilter<T>(shape, lattice, kernel.normalization, mask), {}, {}, {}, {}, {}});
      most_values = at_least(most_values, kernels_.back().filter.value_count(stride_));
      most_parts = at_least(most_parts, kernels_.back().filter.part_count(stride_));
    }
    // Vertices' values: one buffer for each kernel of a step, another to blur with.
    T* other = context.scratch_array<T>(most_values);
    T* parts = context.scratch_array<T>(most_parts);
    for (int m = 0; m < problem.kernel_count; ++m) {
      Kernel& k = kernels_[m];
      k.buffers = {
          m < kMostSources ? context.scratch_array<T>(values_of_slot(m)) : kernels_[m % kMostSources].buffers.values,
          other, parts};
      k.factors = k.filter.factors(context, k.buffers);
      k.weights = k.filter.weights(context, k.factors.in, k.factors.out);
      k.compatibility = {context.scratch_array<T>(labels_ * stride_), context.scratch_array<T>(labels_ * stride_),
                         context.scratch_array<T>(stride_), context.scratch_array<int32_t>(1)};
      launch("prepare_compatibility", prepare_compatibility<T>, 1, dim3(kBuildThreads), 0, context.stream,
             static_cast<const T*>(problem.kernels[m].compatibility), labels_, stride_, k.compatibility);
    }
  }

  void forward(T* energy, T* saved) {
    T* result = energy ? rows() : nullptr;
    T* q = saved ? saved : problem_.iterations ? rows() : nullptr;
    if (problem_.iterations == 0)
      run_from_rows(context_, image_, energy_, labels_, T(1), energy);
    else
      step(Sources<T>{}, energy_, nullptr, q);
    for (int t = 1; t <= problem_.iterations; ++t) {
      const bool last = t == problem_.iterations;
      if (last && !energy) break;
      T* next = last ? nullptr : saved ? q + total_ * stride_ : q;
      messages(q, result, last, next);
      q = next;
    }
    if (energy && problem_.iterations) run_from_rows(context_, image_, result, labels_, T(1), energy);
  }

  void backward(const T* grad_energy, const T* saved, T* grad_unary) {
    T* grad = rows();
    run_to_rows(context_, image_, grad_energy, labels_, T(1), grad);
    if (problem_.iterations == 0) {
      run_from_rows(context_, image_, grad, labels_, T(-1), grad_unary);
      return clear_gradients();
    }
    if (!saved) {
      T* again = context_.scratch_array<T>(problem_.saved_size());
      forward(nullptr, again);
      saved = again;
    }
    T* sum = rows();
    run_to_rows(context_, image_, grad_energy, labels_, T(1), sum);
    T* mixed = nullptr;
    T* ahead = nullptr;
    const int64_t slices = at_most(ceil_div(total_, 4 * kOuterPoints), kOuterSlices);
    const int64_t elements = labels_ * labels_;
    for (int m = 0; m < problem_.kernel_count; ++m) {
      Kernel& k = kernels_[m];
      k.reverse = k.factors.in == k.factors.out ? k.weights : k.filter.weights(context_, k.factors.out, k.factors.in);
      if (problem_.kernels[m].grad_features) {
        if (!mixed) mixed = rows();
        // The blurred forward values: the values of the gradient are still needed when these are there.
        if (!ahead) ahead = context_.scratch_array<T>(most_values());
        k.out_weight = zeros(k.filter.lattice.entries);
        k.in_weight = zeros(k.filter.lattice.entries);
      }
      if (problem_.kernels[m].grad_compatibility) {
        k.sliced = rows();
        k.partial = zeros(slices * elements);
      }
    }
    T* partial_grad = problem_.kernel_count > kMostSources ? rows() : nullptr;
    for (int t = problem_.iterations - 1; t >= 0; --t) {
      const T* q = saved + t * total_ * stride_;
      const T* grad_q = nullptr;
      for (int first = 0; first < problem_.kernel_count || first == 0; first += kMostSources) {
        Sources<T> sources{};
        for (int m = first; m < problem_.kernel_count && m < first + kMostSources; ++m) {
          Kernel& k = kernels_[m];
          k.filter.splat_and_blur(context_, k.reverse, grad, stride_, true, k.buffers);
          if (k.out_weight) {
            mix(k.compatibility, q, mixed);
            k.filter.add_entry_gradient(context_, mixed, k.buffers.values, stride_, k.factors.in, k.in_weight);
            mix(k.compatibility.transposed(), grad, mixed);
            const auto buffers = typename LatticeFilter<T>::Buffers{ahead, k.buffers.other, k.buffers.parts};
            k.filter.splat_and_blur(context_, k.weights, q, stride_, false, buffers);
            k.filter.add_entry_gradient(context_, mixed, ahead, stride_, k.factors.out, k.out_weight);
          }
          sources.source[sources.count++] = {k.reverse.slice, k.buffers.values, k.filter.lattice.d,
                                             k.compatibility.transposed(), k.sliced};
        }
        const bool last = first + kMostSources >= problem_.kernel_count;
        const StepShape shape = step_shape<T>(stride_);
        launch("mean_field_backward_step", mean_field_backward_step<T>, row_blocks(total_, shape.block), shape.block,
               shape.shared_bytes, context_.stream, sources, grad_q, q, total_, labels_, stride_, last,
               last ? grad : partial_grad, sum);
        grad_q = partial_grad;
      }
      for (Kernel& k : kernels_)
        if (k.partial) {
          const int64_t tiles = ceil_div(labels_, kOuterTile);
          launch("outer_products", outer_products<T>, slices * tiles * tiles, dim3(kOuterSide, kOuterSide),
                 2 * kOuterPoints * kOuterTile * sizeof(T), context_.stream, k.sliced, q, total_, labels_, stride_,
                 slices, k.partial);
        }
    }
    run_from_rows(context_, image_, sum, labels_, T(-1), grad_unary);
    for (int m = 0; m < problem_.kernel_count; ++m) {
      Kernel& k = kernels_[m];
      const PairwiseKernel& wanted = problem_.kernels[m];
      if (k.out_weight)
        k.filter.finish_feature_gradient(context_, k.factors, k.buffers, static_cast<const T*>(wanted.features),
                                         k.out_weight, k.in_weight, static_cast<T*>(wanted.grad_features));
      if (k.partial)
        run_sum_slices<T>(context_.stream, k.partial, slices, labels_, labels_,
                          static_cast<T*>(wanted.grad_compatibility));
    }
  }

 private:
  struct Kernel {
    LatticeFilter<T> filter;
    typename LatticeFilter<T>::Buffers buffers;
    typename LatticeFilter<T>::Factors factors;
    typename LatticeFilter<T>::Weights weights, reverse;  // of F and of its transpose
    Compatibility<T> compatibility;
    // Backward only, where wanted.
    T* out_weight = nullptr;
    T* in_weight = nullptr;
    T* sliced = nullptr;
    T* partial = nullptr;
  };

  T* rows() const { return context_.scratch_array<T>(total_ * stride_); }
  T* zeros(int64_t count) const {
    T* data = context_.scratch_array<T>(count);
    run_fill(context_, data, count, T(0));
    return data;
  }

  int64_t most_values() const {
    int64_t most = 0;
    for (const Kernel& k : kernels_) most = at_least(most, k.filter.value_count(stride_));
    return most;
  }
  // Kernels beyond a step's share the buffers of the step before.
  int64_t values_of_slot(int slot) const {
    int64_t most = 0;
    for (size_t m = slot; m < kernels_.size(); m += kMostSources)
      most = at_least(most, kernels_[m].filter.value_count(stride_));
    return most;
  }

  void step(const Sources<T>& sources, const T* energy, T* energy_out, T* q) const {
    const StepShape shape = step_shape<T>(stride_);
    launch("mean_field_step", mean_field_step<T>, row_blocks(total_, shape.block), shape.block, shape.shared_bytes,
           context_.stream, sources, energy, total_, labels_, stride_, energy_out, q);
  }

  // From Q to the energies (written only where they are the last, or not yet complete) and the next Q.
  void messages(const T* q, T* energy, bool last, T* next) {
    const T* from = energy_;
    for (int first = 0; first < problem_.kernel_count || first == 0; first += kMostSources) {
      Sources<T> sources{};
      for (int m = first; m < problem_.kernel_count && m < first + kMostSources; ++m) {
        Kernel& k = kernels_[m];
        k.filter.splat_and_blur(context_, k.weights, q, stride_, false, k.buffers);
        sources.source[sources.count++] = {k.weights.slice, k.buffers.values, k.filter.lattice.d, k.compatibility,
                                           nullptr};
      }
      const bool complete = first + kMostSources >= problem_.kernel_count;
      if (!complete && !energy && !partial_) partial_ = rows();
      T* into = !complete || last ? (energy ? energy : partial_) : nullptr;
      step(sources, from, into, complete ? next : nullptr);
      from = into;
    }
  }

  void mix(const Compatibility<T>& compatibility, const T* in, T* out) const {
    const dim3 block = row_block(stride_ / kVector<T>);
    launch("mix_labels", mix_labels<T>, row_blocks(total_, block), block, 0, context_.stream, compatibility, in, total_,
           labels_, stride_, out);
  }

  void clear_gradients() const {
    for (int m = 0; m < problem_.kernel_count; ++m) {
      const PairwiseKernel& k = problem_.kernels[m];
      if (k.grad_features) run_fill(context_, static_cast<T*>(k.grad_features), total_ * k.dimension, T(0));
      if (k.grad_compatibility) run_fill(context_, static_cast<T*>(k.grad_compatibility), labels_ * labels_, T(0));
    }
  }

  const Context& context_;
  const MeanFieldProblem& problem_;
  const int64_t total_, labels_, stride_;
  const LatticeShape image_;  // batch and points; the dimension does not matter
  T* energy_;                 // -U
  T* partial_ = nullptr;
  std::vector<Kernel> kernels_;
};

template <typename F>
void dispatch(Dtype dtype, F&& f) {
  if (dtype == Dtype::kFloat64) return f(double());
  f(float());
}

}  // namespace

void dense_crf_mean_field(const Context& context, Dtype dtype, const MeanFieldProblem& problem, void* energy,
                          void* saved) {
  if (problem.batch * problem.points == 0) return;
  dispatch(dtype, [&](auto value) {
    using T = decltype(value);
    MeanField<T>(context, problem).forward(static_cast<T*>(energy), static_cast<T*>(saved));
  });
}

void dense_crf_mean_field_backward(const Context& context, Dtype dtype, const MeanFieldProblem& problem,
                                   const void* grad_energy, const void* saved, void* grad_unary) {
  dispatch(dtype, [&](auto value) {
    using T = decltype(value);
    if (problem.batch * problem.points == 0) {
      for (int m = 0; m < problem.kernel_count; ++m)
        if (T* out = static_cast<T*>(problem.kernels[m].grad_compatibility))
          run_fill(context, out, problem.labels * problem.labels, T(0));
      return;
    }
    MeanField<T>(context, problem)
        .backward(static_cast<const T*>(grad_energy), static_cast<const T*>(saved), static_cast<T*>(grad_unary));
  });
}

}  // namespace deeplab_kernels::cuda
