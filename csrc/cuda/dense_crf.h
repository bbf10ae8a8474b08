// Mean-field inference of the fully connected CRF over permutohedral lattices, on CUDA: the calls that the bindings and
// the emulator's driver make. Same operators and conventions as csrc/cpu/dense_crf/dense_crf.h and
// csrc/cuda/permutohedral.h.
//
//   Q_0 = softmax(-U)      E_t = -U - sum_m C_m F_m Q_{t-1}      Q_t = softmax(E_t)
#pragma once

#include "permutohedral.h"

namespace deeplab_kernels::cuda {

struct PairwiseKernel {
  int dimension;
  const void* features;       // (batch, dimension, points)
  const void* lattice;        // built of them, or null: built inside
  const void* compatibility;  // (labels, labels), contains the kernel's weight. Diagonal ones cost less.
  Normalization normalization;
  void* grad_features;       // backward only; null where not wanted
  void* grad_compatibility;  // the same
};

struct MeanFieldProblem {
  int64_t batch, labels, points;
  int iterations;
  const void* unary;    // (batch, labels, points)
  const uint8_t* mask;  // (batch, points), points with 0 send and receive nothing; or null
  const PairwiseKernel* kernels;
  int kernel_count;

  int64_t saved_size() const { return iterations * batch * points * ((labels + 7) / 8 * 8); }
};

// Labels whose working set fits a block's shared memory.
constexpr int64_t kMostLabels = 2048;

// energy = E_T, (batch, labels, points). saved, if not null, receives Q_0 ... Q_{T-1} as rows of labels padded to a
// multiple of 8: (iterations, batch, points, row).
void dense_crf_mean_field(const Context& context, Dtype dtype, const MeanFieldProblem& problem, void* energy,
                          void* saved);

// Gradients of sum(grad_energy * E_T): of the unary energies and, per kernel, where its pointers are not null. saved
// may be null: then the iterations run again.
void dense_crf_mean_field_backward(const Context& context, Dtype dtype, const MeanFieldProblem& problem,
                                   const void* grad_energy, const void* saved, void* grad_unary);

}  // namespace deeplab_kernels::cuda
