// The vectorised kernels of the atrous depthwise convolution, for any shape.
//
// Every pass streams: a row of x is widened and packed once into a window of rows in the fast caches (NHWC float rows
// may be read in place), a row of results is computed from the window in registers and leaves through an epilogue
// (store; scale, shift, activate; statistics; gradients). NCHW vectors run over columns, NHWC vectors over channels.
// Training passes recompute the convolution instead of storing it (nine multiply-adds cost less than eight bytes of
// memory traffic), unless it fits the caches between the two passes of backward.
#pragma once

#include "pixels.h"
#include "row_worker.h"

namespace deeplab_kernels::cpu {
namespace {

// Runs first(task) for every task, between(group) once a group's tasks are done, then second(task). With many groups a
// thread takes a whole group at a time, so that the second pass finds in its caches what the first one read.
template <typename MakeWorker, typename First, typename Between, typename Second>
void two_passes(int64_t groups, int64_t first_tasks, int64_t second_tasks, const Parallel& parallel,
                const MakeWorker& make_worker, const First& first, const Between& between, const Second& second) {
  if (groups >= 2 * parallel.threads()) {
    parallel(groups, [&](int64_t begin, int64_t end) {
      auto worker = make_worker(true);
      for (int64_t g = begin; g < end; ++g) {
        for (int64_t t = 0; t < first_tasks; ++t) first(worker, g * first_tasks + t);
        between(worker, g);
        for (int64_t t = 0; t < second_tasks; ++t) second(worker, g * second_tasks + t);
      }
    });
    return;
  }
  parallel(groups * first_tasks, [&](int64_t begin, int64_t end) {
    auto worker = make_worker(false);
    for (int64_t t = begin; t < end; ++t) first(worker, t);
  });
  parallel(groups, [&](int64_t begin, int64_t end) {
    auto worker = make_worker(false);
    for (int64_t g = begin; g < end; ++g) between(worker, g);
  });
  parallel(groups * second_tasks, [&](int64_t begin, int64_t end) {
    auto worker = make_worker(false);
    for (int64_t t = begin; t < end; ++t) second(worker, t);
  });
}

template <typename T, bool kNhwc>
struct Passes {
  using A = acc_t<T>;
  using W = Worker<T, kNhwc>;

  static void forward(const Plan& plan, const T* x, const T* weight, const BatchNorm<A>* norm, T* out,
                      const Parallel& parallel) {
    if constexpr (kNhwc)
      if (Pixels<T>::serve(plan.shape)) {
        const auto cut = Pixels<T>::cut(plan.shape);
        const typename Pixels<T>::Prepared prepared(plan.shape, weight, norm);
        return parallel(cut.pieces, [&](int64_t begin, int64_t end) {
          Pixels<T>(plan.shape, prepared).run(cut, begin, end, x, out);
        });
      }
    const int64_t images = plan.shape.batch, bands = plan.out_rows.bands;
    parallel(plan.groups * images * bands, [&](int64_t begin, int64_t end) {
      W worker(plan, x, weight, W::Needs::kForward);
      for (int64_t t = begin; t < end; ++t) {
        const Task task = task_of(t, images, bands);
        worker.select(task.group);
        if (norm) worker.select_norm(*norm);
        worker.forward(task, out, norm != nullptr);
      }
    });
  }

  // Lanes that any group's partial sums may take.
  static int64_t lanes_of(const Plan& plan) {
    const int64_t most = smaller(plan.group_channels, plan.shape.channels) * plan.shape.multiplier;
    return kNhwc ? rounded_up(most, kLanes<A>) : most;
  }

  // Values of x, or of its gradient.
  static int64_t size_of_x(const Plan& plan) {
    const DepthwiseShape& s = plan.shape;
    return s.batch * s.channels * s.in_h * s.in_w;
  }
  // Calls f(first value, number of values) for the vectors of x.
  template <typename F>
  static void vectors_of_x(const Plan& plan, const Parallel& parallel, const F& f) {
    constexpr int64_t kBlock = 1 << 14, L = kLanes<A>;
    const int64_t size = size_of_x(plan);
    parallel((size + kBlock - 1) / kBlock, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin * kBlock; k < smaller(size, end * kBlock); k += L) f(k, smaller(L, size - k));
    });
  }
  static Vec<A> part_or_whole(const T* p, int64_t n) { return n == kLanes<A> ? load(p) : load_part(p, n); }
  // Where the pre-activation cannot be part of the passes: activated(x) is written to memory and used there.
  static void activate_x(const Plan& plan, const T* x, Activation activation, T* result, const Parallel& parallel) {
    vectors_of_x(plan, parallel, [&](int64_t k, int64_t n) {
      const Vec<A> v = activated(part_or_whole(x + k, n), activation);
      n == kLanes<A> ? store(result + k, v) : store_part(result + k, v, n);
    });
  }

  static void training(const Plan& plan, const T* x, const T* weight, const BatchNorm<A>& norm, T* out, T* y, A* mean,
                       A* var, Activation pre_activation, const Parallel& parallel) {
    const DepthwiseShape& s = plan.shape;
    if (pre_activation != Activation::kNone) {
      const Workspace activated_x(size_t(size_of_x(plan)) * sizeof(T));
      activate_x(plan, x, pre_activation, activated_x.as<T>(), parallel);
      return training(plan, activated_x.as<T>(), weight, norm, out, y, mean, var, Activation::kNone, parallel);
    }
    const int64_t images = s.batch, bands = plan.out_rows.bands, tasks = plan.out_tasks_per_group();
    const int64_t lanes = lanes_of(plan);
    const Workspace partials(size_t(plan.groups * tasks * lanes * 2) * sizeof(double) + 64);
    auto partial = [&](int64_t task) { return partials.as<double>() + task * lanes * 2; };
    two_passes(
        plan.groups, tasks, tasks, parallel, [&](bool) { return W(plan, x, weight, W::Needs::kStatistics); },
        [&](W& worker, int64_t t) {
          const Task task = task_of(t, images, bands);
          worker.select(task.group);
          worker.statistics(task, y, partial(t), partial(t) + lanes);
        },
        [&](W& worker, int64_t group) {
          worker.select(group);
          for (int64_t l = 0; l < worker.channels(); ++l) {
            double seen = 0, centre = 0, m2 = 0;
            for (int64_t t = 0; t < tasks; ++t) {
              const double* part = partial(group * tasks + t);
              const IndexRange band = plan.out_rows.band(t % bands);
              const double n = double(band.end - band.begin) * double(s.out_w);
              if (n == 0) continue;
              join_moments(seen, n, part[l], part[lanes + l], centre, m2);
              seen += n;
            }
            mean[worker.first_channel() + l] = A(centre);
            var[worker.first_channel() + l] = A(m2 / seen);
          }
        },
        [&](W& worker, int64_t t) {
          const Task task = task_of(t, images, bands);
          worker.select(task.group);
          worker.select_norm(norm);
          worker.forward(task, out, true);
        });
  }

  static void backward(const Plan& plan, const BackwardTensors<T>& z, const BatchNorm<A>* norm, bool batch_statistics,
                       const Parallel& parallel) {
    const DepthwiseShape& s = plan.shape;
    if (z.pre_activation != Activation::kNone) {
      const Workspace activated_x(size_t(size_of_x(plan)) * sizeof(T));
      activate_x(plan, z.x, z.pre_activation, activated_x.as<T>(), parallel);
      BackwardTensors<T> tensors = z;
      tensors.x = activated_x.as<T>(), tensors.pre_activation = Activation::kNone;
      backward(plan, tensors, norm, batch_statistics, parallel);
      if (!z.grad_x) return;
      return vectors_of_x(plan, parallel, [&](int64_t k, int64_t n) {
        const Vec<A> v = masked(part_or_whole(z.grad_x + k, n), part_or_whole(z.x + k, n), z.pre_activation);
        n == kLanes<A> ? store(z.grad_x + k, v) : store_part(z.grad_x + k, v, n);
      });
    }
    const int64_t images = s.batch, lanes = lanes_of(plan), taps = s.taps();
    const int64_t sum_tasks = norm ? plan.out_tasks_per_group() : 0;
    const RowOrder& rows = z.grad_x ? plan.in_rows : plan.out_rows;
    const bool gradients = z.grad_x || z.grad_weight;
    const int64_t tasks = gradients ? images * rows.bands : 0;
    const Workspace sum_partials(size_t(plan.groups * sum_tasks * lanes * 2) * sizeof(double) + 64);
    const Workspace weight_partials(size_t(z.grad_weight ? plan.groups * tasks * taps * lanes : 0) * sizeof(double) +
                                    64);
    const Workspace means(size_t(plan.groups * lanes * 2) * sizeof(A) + 64);
    auto sums_of = [&](int64_t task) { return sum_partials.as<double>() + task * lanes * 2; };
    auto weights_of = [&](int64_t task) { return weight_partials.as<double>() + task * taps * lanes; };
    auto means_of = [&](int64_t group) { return means.as<A>() + group * lanes * 2; };
    const double count = double(images) * double(s.out_h) * double(s.out_w);

    two_passes(
        plan.groups, sum_tasks, tasks, parallel,
        [&](bool whole_groups) {
          return W(plan, z.x, z.weight, W::Needs::kBackward, whole_groups && norm && !z.y && gradients);
        },
        [&](W& worker, int64_t t) {
          const Task task = task_of(t, images, plan.out_rows.bands);
          worker.select(task.group);
          worker.select_norm(*norm);
          worker.gradient_sums(task, z.grad_out, z.y, sums_of(t), sums_of(t) + lanes);
        },
        [&](W& worker, int64_t group) {
          worker.select(group);
          A* mean_grad = means_of(group);
          for (int64_t l = 0; l < lanes * 2; ++l) mean_grad[l] = 0;
          if (!norm) return;
          for (int64_t l = 0; l < worker.channels(); ++l) {
            double sum = 0, dot = 0;
            for (int64_t t = 0; t < sum_tasks; ++t) {
              const double* part = sums_of(group * sum_tasks + t);
              sum += part[l], dot += part[lanes + l];
            }
            z.grad_beta[worker.first_channel() + l] = A(sum);
            z.grad_gamma[worker.first_channel() + l] = A(dot);
            if (batch_statistics) mean_grad[l] = A(sum / count), mean_grad[lanes + l] = A(dot / count);
          }
        },
        [&](W& worker, int64_t t) {
          const Task task = task_of(t, images, rows.bands);
          worker.select(task.group);
          if (norm) worker.select_norm(*norm);
          double* grad_weight = z.grad_weight ? weights_of(t) : nullptr;
          if (grad_weight) __builtin_memset(grad_weight, 0, size_t(taps * lanes) * sizeof(double));
          worker.gradients(task, {z.grad_out, z.y, norm != nullptr, batch_statistics, means_of(task.group),
                                  means_of(task.group) + lanes, z.grad_x, grad_weight});
        });
    if (!z.grad_weight) return;

    parallel(plan.groups, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) {
        const int64_t first = g * plan.group_channels * s.multiplier;
        const int64_t channels = smaller(plan.group_channels * s.multiplier, s.out_channels() - first);
        for (int64_t t = 0; t < taps; ++t)
          for (int64_t l = 0; l < channels; ++l) {
            double sum = 0;
            for (int64_t i = 0; i < tasks; ++i) sum += weights_of(g * tasks + i)[t * lanes + l];
            narrow(A(sum), z.grad_weight + (first + l) * taps + t);
          }
      }
    });
  }
};

}  // namespace

namespace DK_ISA {

template <typename T>
void Kernels<T>::forward(const Plan& plan, const T* x, const T* weight, const BatchNorm<A>* norm, T* out,
                         const Parallel& parallel) {
  if (plan.shape.channels_last)
    Passes<T, true>::forward(plan, x, weight, norm, out, parallel);
  else
    Passes<T, false>::forward(plan, x, weight, norm, out, parallel);
}

template <typename T>
void Kernels<T>::training(const Plan& plan, const T* x, const T* weight, const BatchNorm<A>& norm, T* out, T* y,
                          A* mean, A* var, Activation pre_activation, const Parallel& parallel) {
  if (plan.shape.channels_last)
    Passes<T, true>::training(plan, x, weight, norm, out, y, mean, var, pre_activation, parallel);
  else
    Passes<T, false>::training(plan, x, weight, norm, out, y, mean, var, pre_activation, parallel);
}

template <typename T>
void Kernels<T>::backward(const Plan& plan, const BackwardTensors<T>& tensors, const BatchNorm<A>* norm,
                          bool batch_statistics, const Parallel& parallel) {
  if (plan.shape.channels_last)
    Passes<T, true>::backward(plan, tensors, norm, batch_statistics, parallel);
  else
    Passes<T, false>::backward(plan, tensors, norm, batch_statistics, parallel);
}

}  // namespace DK_ISA
}  // namespace deeplab_kernels::cpu
