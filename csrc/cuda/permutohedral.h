// Gaussian filtering on the permutohedral lattice, on CUDA: the calls that the bindings and the emulator's driver make.
// Same operators and conventions as csrc/cpu/permutohedral/permutohedral.h.
//
// All pointers are device pointers to contiguous tensors of one type, float32 or float64. Everything runs on
// context.stream, asynchronously: the host never waits, so every buffer is as large as the points could need at most
// (points * (d + 1) vertices). Results repeat bit for bit. A point with features that are not finite, or too large for
// the lattice (beyond about 2^26 / d), takes no part in it: its own result is NaN, others' do not change.
#pragma once

#include "context.h"

namespace deeplab_kernels::cuda {

struct LatticeShape {
  int64_t batch;
  int dimension;   // of the features
  int64_t points;  // of each image

  int64_t total() const { return batch * points; }
  int64_t entries() const { return total() * (dimension + 1); }  // of points and vertices of their simplices
};

// Entries are numbered with 32 bits, two of them spare.
constexpr int64_t kMostEntries = int64_t(1) << 30;

// As cpu::Normalization. With n = K 1 + 1e-20: K v, K (v / n), (K v) / n, n^-1/2 K (n^-1/2 v).
enum class Normalization : int { kNone = 0, kBefore = 1, kAfter = 2, kSymmetric = 3 };

// A lattice is one block of so many bytes. features (batch, d, points).
int64_t lattice_bytes(Dtype dtype, const LatticeShape& shape);
void lattice_build(const Context& context, Dtype dtype, const LatticeShape& shape, const void* features, void* lattice);

// out = F values, or F^T values; both (batch, channels, points). out may be values.
void permutohedral_filter(const Context& context, Dtype dtype, const LatticeShape& shape, const void* lattice,
                          int64_t channels, const void* values, Normalization normalization, bool transpose, void* out);

// grad_values and grad_features may each be null; features and values are read for grad_features only.
void permutohedral_filter_backward(const Context& context, Dtype dtype, const LatticeShape& shape, const void* lattice,
                                   int64_t channels, const void* grad_out, const void* values, const void* features,
                                   Normalization normalization, bool transpose, void* grad_values, void* grad_features);

}  // namespace deeplab_kernels::cuda
