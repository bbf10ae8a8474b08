// What is summed over planes. For the per-instruction-set files only: everything here has internal linkage.
#pragma once

#include "../microkernels.h"

namespace deeplab_kernels::cpu {
namespace {

constexpr int64_t kSumTerms = 128;  // of a sum of floats, about

// N sums in the lanes of vectors. Those of floats stay short: they move into doubles after about a hundred terms.
template <typename A, bool kNhwc, int N>
struct LaneSums {
  static constexpr int64_t L = kLanes<A>;
  Vec<A> now[N];
  double lane[N][L];
  int64_t terms = 0;
  LaneSums() {
    for (int i = 0; i < N; ++i) {
      now[i] = Vec<A>{};
      for (int64_t l = 0; l < L; ++l) lane[i][l] = 0;
    }
  }
  DK_INLINE void added(int64_t count) {
    terms += count;
    if (terms >= kSumTerms) flush();
  }
  __attribute__((noinline)) void flush() {
    for (int i = 0; i < N; ++i) {
      for (int64_t l = 0; l < L; ++l) lane[i][l] += double(now[i][l]);
      now[i] = Vec<A>{};
    }
    terms = 0;
  }
  // NCHW: the lanes are columns of one channel.
  void finish() {
    flush();
    if constexpr (!kNhwc)
      for (int i = 0; i < N; ++i) {
        double sum = 0;
        for (int64_t l = 0; l < L; ++l) sum += lane[i][l];
        for (int64_t l = 0; l < L; ++l) lane[i][l] = sum;
      }
  }
};

// Values seen in each lane, their mean and the sum of their squared deviations.
template <typename A>
struct LaneMoments {
  double seen = 0, mean[kLanes<A>] = {}, m2[kLanes<A>] = {};
};

// Of one plane.
template <typename A>
struct PlaneNorm {
  Vec<A> scale, shift, mean, inv_std;  // z = y * scale + shift
  Vec<A> mean_grad, mean_dot;          // sums of g and of g * xhat over the batch, divided by its size
};

}  // namespace
}  // namespace deeplab_kernels::cpu
