// Gaussian filtering on the permutohedral lattice (Adams, Baek, Davis 2010), on the CPU. Float and double.
//
// Channels lie packed and padded to a multiple of kChannelPack inside; callers' arrays may have any strides. The images
// of a batch share a lattice's arrays but no vertices. Results do not depend on the number of threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "../../core/permutohedral.h"
#include "../parallel.h"

namespace deeplab_kernels::cpu {

constexpr int64_t kChannelPack = 8;

// Elements of a row of `channels` values as the kernels keep it.
constexpr int64_t packed_channels(int64_t channels) {
  return (channels + kChannelPack - 1) / kChannelPack * kChannelPack;
}

// Element (b, c, n) of a (batch, channels, points) array is data[b * batch_stride + c * channel_stride + n *
// point_stride]. Strides count elements, and may be negative or 0. data may be null where a result is not wanted.
template <typename T>
struct Strided {
  T* data = nullptr;
  int64_t batch_stride = 0, channel_stride = 0, point_stride = 0;
};

// With n = K 1: K v, K (v / n), (K v) / n, n^-1/2 K (n^-1/2 v). 1e-20 is added to n.
enum class Normalization : int { kNone = 0, kBefore = 1, kAfter = 2, kSymmetric = 3 };

// What a filter is multiplied by: lattice_exact_scale, which approximates sum_j exp(-|f_i - f_j|^2 / 2) v_j, or
// lattice_pydensecrf_scale. It cancels in normalised filters.
enum class LatticeScale : int { kExactSum = 0, kPydensecrf = 1 };

// The first feature that the lattice cannot hold, if any.
struct FeatureProblem {
  enum Kind : int { kNone = 0, kNotFinite = 1, kTooLarge = 2 };
  Kind kind = kNone;
  int64_t image = 0, axis = 0, point = 0;
  double limit = 0;  // kTooLarge: the absolute value that this axis must stay below
};

// Features are in units of the kernel's standard deviation, d = 1 ... kMaxLatticeDimension.
template <typename T>
FeatureProblem find_feature_problem(int64_t batch, int d, int64_t points, Strided<const T> features,
                                    const Parallel& parallel);

// What points are embedded in by lattices in float. kAccurate: double where coordinates are so large that float has few
// bits left for the place within a simplex. kPydensecrf: float wherever pydensecrf's 16-bit coordinates do not
// overflow.
enum class Embedding : int { kAccurate = 0, kPydensecrf = 1 };

template <typename T>
struct LatticeData;  // csrc/cpu/permutohedral/passes.h

// A built lattice; copies share it.
template <typename T>
class Lattice {
 public:
  Lattice() = default;
  // Check problem() before use: with one, the lattice is empty and must not be given to any function below.
  // Throws std::bad_alloc, and std::length_error where a batch has 2^31 or more vertices.
  // row: the points of one row, where they are those of an image, row by row (the last may be shorter); 0 otherwise. It
  // changes the speed and the order of sums, nothing else.
  Lattice(int64_t batch, int d, int64_t points, Strided<const T> features, const Parallel& parallel,
          Embedding embedding = Embedding::kAccurate, int64_t row = 0);

  const FeatureProblem& problem() const { return problem_; }
  int64_t batch() const;
  int dimension() const;
  int64_t points() const;
  int64_t row() const;
  int64_t vertices() const;  // of all images
  size_t memory() const;     // bytes

  // The lattice as one block of bytes, for owners such as tensors. unpack() copies; null lattice (batch() 0, points()
  // 0, dimension() 0) if the block is not one that pack() of the same type wrote.
  size_t packed_bytes() const;
  void pack(void* bytes) const;
  static Lattice unpack(const void* bytes, size_t size);

  const LatticeData<T>* data() const { return data_.get(); }

 private:
  FeatureProblem problem_;  // before data_, whose construction sets it
  std::shared_ptr<const LatticeData<T>> data_;
};

// out = F values, (batch, channels, points) both. transpose: F^T, the blur axes in reverse order and the two factors of
// kBefore and kAfter exchanged.
template <typename T>
void permutohedral_filter(const Lattice<T>& lattice, int64_t channels, Strided<const T> values, Strided<T> out,
                          Normalization normalization, LatticeScale scale, bool transpose, const Parallel& parallel);

// Gradients of sum(grad_out * F values). features must be those of the lattice; they and values are read only if
// grad_features.data is given, which includes the way through the normalisation. grad_values.data may be null as well.
template <typename T>
void permutohedral_filter_backward(const Lattice<T>& lattice, int64_t channels, Strided<const T> grad_out,
                                   Strided<const T> values, Strided<const T> features, Strided<T> grad_values,
                                   Strided<T> grad_features, Normalization normalization, LatticeScale scale,
                                   bool transpose, const Parallel& parallel);

}  // namespace deeplab_kernels::cpu
