// What a lattice consists of, and the passes over it that the filter and the mean field are made of. Internal.
//
// An image's points are cut into chunks, the same for any number of threads. Vertices are numbered in the order of
// first touch over the chunks, so that neighbours in a scanned image lie close together. A row of values belongs to
// each vertex; a chunk that touches a vertex which an earlier chunk touched has a row of its own for it, a copy.
// Splatting writes a chunk's own rows alone, without atomics, within the cache; a vertex then adds its copies in the
// order of the chunks. Before slicing the copies take the vertices' values.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "../workspace.h"
#include "isa.h"
#include "permutohedral.h"

namespace deeplab_kernels::cpu {

template <typename E>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size) : data_(static_cast<E*>(allocate(size_t(size) * sizeof(E)))), size_(size) {}
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Buffer() { release(data_, bytes()); }

  E* data() const { return data_; }
  int64_t size() const { return size_; }
  size_t bytes() const { return size_t(size_) * sizeof(E); }
  E& operator[](int64_t i) const { return data_[i]; }

 private:
  void swap(Buffer& other) {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }
  E* data_ = nullptr;
  int64_t size_ = 0;
};

// Cuts each image's points into chunks: rectangles where the points are known to be the rows of an image, else runs. A
// chunk is visited in segments of one row each (the points of a run are its only row), column by column, so that the
// vertices around it are few and are met again soon.
struct ChunkPlan {
  static constexpr int64_t kSegment = 64;

  int64_t batch = 0, points = 0;
  int64_t row = 0;  // points of a row: all, where rows are not known
  int64_t chunk_width = 1, chunk_height = 1, across = 1, chunks_per_image = 0;

  ChunkPlan() = default;
  ChunkPlan(int64_t batch, int64_t points, int64_t row = 0);
  int64_t chunks() const { return batch * chunks_per_image; }
  int64_t image(int64_t chunk) const { return chunk / chunks_per_image; }
};

template <typename T>
struct LatticeData {
  ChunkPlan plan;
  int d = 0;
  int64_t vertices = 0;
  Buffer<T> weight;     // (batch, points, d + 1)
  Buffer<int32_t> row;  // (batch, points, d + 1): vertex v, or vertices + 1 + c for copy c; row `vertices` is 0
  Buffer<int32_t> chunk_vertex, chunk_copy;  // (chunks + 1): the first vertex and the first copy of each chunk
  Buffer<int32_t> copy_vertex;               // (copies)
  Buffer<int32_t> shared_vertex;             // (shared): the vertices that have copies
  Buffer<int32_t> shared_begin;              // (shared + 1): where their copies begin in shared_copy
  Buffer<int32_t> shared_copy;               // (copies)
  Buffer<int32_t> neighbour;                 // (d + 1, vertices, 2); `vertices` where there is none

  int64_t copies() const { return copy_vertex.size(); }
  int64_t rows() const { return vertices + 1 + copies(); }
  PointPlaces<T> places(int64_t image, int64_t first) const {
    const int64_t at = (image * plan.points + first) * (d + 1);
    return {row.data() + at, weight.data() + at, d + 1};
  }
};

template <typename T>
LatticeData<T> build_lattice(int64_t batch, int d, int64_t points, int64_t row, Strided<const T> features,
                             Embedding embedding, FeatureProblem* problem, const Parallel& parallel);

// Of the instruction set in use.
template <typename T>
const LatticeKernels<T>& lattice_kernels();

// Rows of one channel are not padded.
inline int64_t filter_pitch(int64_t channels) { return channels == 1 ? 1 : packed_channels(channels); }

// Points that are treated together: a few KB of rows.
inline int64_t block_points(int64_t pitch) {
  const int64_t n = pitch > 0 ? 4096 / pitch : 64;
  return n < 4 ? 4 : n > 64 ? 64 : n;
}

// The values on the vertices while they are filtered.
template <typename T>
class VertexRows {
 public:
  VertexRows(const LatticeData<T>& lattice, int64_t pitch);

  // Where to splat to until blur(), after a chunk's rows are zeroed.
  T* sums() const { return sums_.data(); }
  T* begin_chunk(int64_t chunk) const;
  // Adds the copies to their vertices and blurs along all directions. The sums are lost.
  void blur(bool transpose, const Parallel& parallel);
  // The result of blur(); it stays while the next sums are splatted.
  const T* rows() const { return result_.data(); }

 private:
  const LatticeData<T>* lattice_;
  int64_t pitch_;
  Buffer<T> sums_, result_;
};

// Calls f(image, first, count) for a chunk's points, at most `block` consecutive ones at a time.
template <typename F>
void over_blocks(const ChunkPlan& plan, int64_t chunk, int64_t block, F&& f) {
  const int64_t image = plan.image(chunk), in_image = chunk % plan.chunks_per_image;
  const int64_t left = in_image % plan.across * plan.chunk_width, top = in_image / plan.across * plan.chunk_height;
  const int64_t right = std::min(left + plan.chunk_width, plan.row);
  const int64_t bottom = std::min(top + plan.chunk_height, (plan.points + plan.row - 1) / plan.row);
  for (int64_t x = left; x < right; x += ChunkPlan::kSegment)
    for (int64_t y = top; y < bottom; ++y) {
      const int64_t last = std::min(y * plan.row + std::min(x + ChunkPlan::kSegment, right), plan.points);
      for (int64_t p = y * plan.row + x; p < last; p += block) f(image, p, std::min(block, last - p));
    }
}

// The factors before and after the lattice that make a normalised filter: F = after * (scale * lattice) * before.
// Null: 1.
template <typename T>
struct Normalizer {
  Buffer<T> factor;   // (batch, points): 1/n or n^-1/2, 0 where masked
  Buffer<T> masking;  // (batch, points): the mask, if it is needed by itself
  const T* before = nullptr;
  const T* after = nullptr;
  T scale = T(1);

  Normalizer(const LatticeData<T>& lattice, Normalization normalization, LatticeScale scale_kind, const uint8_t* mask,
             bool transpose, const Parallel& parallel);
};

// Collects the gradient with respect to a lattice's barycentric weights, over channels and iterations.
template <typename T>
class FeatureGradient {
 public:
  FeatureGradient(const LatticeData<T>& lattice, Normalization normalization, bool transpose, const uint8_t* mask);

  // Adds a block's part: a (times `after`) are rows of the output's gradient and vertex_a the filtered values, b (times
  // `before`) rows of the values and vertex_b the transposed filtered gradients.
  void add(int64_t image, int64_t first, int64_t count, T scale, const T* a, const T* vertex_a, const T* b,
           const T* vertex_b, int64_t pitch);
  // Adds what goes through the normalisation, then writes the gradient with respect to the features.
  void finish(T scale, Strided<const T> features, Strided<T> grad_features, const Parallel& parallel);

 private:
  const LatticeData<T>* lattice_;
  Normalization normalization_;
  bool transpose_;
  const uint8_t* mask_;
  Buffer<T> grad_weight_;    // (batch, points, d + 1)
  Buffer<T> grad_log_norm_;  // (batch, points): n dL/dn, if normalised
};

}  // namespace deeplab_kernels::cpu
