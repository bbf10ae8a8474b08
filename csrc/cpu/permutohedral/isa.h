// The lattice's and the CRF's inner loops, as each instruction set's file offers them.
//
// A row is one point's or one vertex's channels: `pitch` elements, a multiple of kChannelPack, or 1 for a single
// channel.
#pragma once

#include <cstdint>

namespace deeplab_kernels::cpu {

// Where consecutive points lie.
template <typename T>
struct PointPlaces {
  const int32_t* row;  // (points, d + 1): the row of each enclosing vertex, for the points' chunk
  const T* weight;     // (points, d + 1)
  int vertices;        // d + 1
};

constexpr int64_t kEmbedBlock = 64;

// Up to kEmbedBlock points to embed, and where they come to lie: see lattice_simplex.
template <typename T>
struct EmbedBlock {
  const T* features;  // axis i of point p at features[i * channel_stride + p * point_stride]
  int64_t channel_stride, point_stride, count;
  int d;
  const double* scale;  // (d): lattice_scale
  T* weight;            // (count, d + 1)
  int32_t* quotient;    // (d + 1, kEmbedBlock): greedy / (d + 1)
  int32_t* rank;        // (d + 1, kEmbedBlock)
};

template <typename T>
struct LatticeKernels {
  // In T, or in double.
  void (*embed)(const EmbedBlock<T>& block);
  void (*embed_precisely)(const EmbedBlock<T>& block);

  // Values of any strides to rows of `count` points, times sign; padding becomes `pad`.
  void (*load)(const T* values, int64_t channel_stride, int64_t point_stride, int64_t channels, int64_t pitch,
               int64_t count, T sign, T pad, T* rows);
  void (*store)(const T* rows, int64_t pitch, int64_t channels, int64_t count, T* values, int64_t channel_stride,
                int64_t point_stride);

  // vertex_rows[row_k] += weight_k * point_scale * row. point_scale may be null: 1.
  void (*splat)(const PointPlaces<T>& places, const T* point_scale, const T* rows, int64_t pitch, int64_t count,
                T* vertex_rows);
  // rows = base + factor * point_scale * sum_k weight_k vertex_rows[row_k]. point_scale and base may be null: 1, 0.
  // base may be rows.
  void (*slice)(const PointPlaces<T>& places, const T* point_scale, T factor, const T* vertex_rows, int64_t pitch,
                int64_t count, const T* base, T* rows);
  // rows[vertex[i]] += the sum of copies[copy[j]], j = begin[i] ... begin[i + 1] - 1; i = first ... last - 1.
  void (*merge)(const int32_t* vertex, const int32_t* begin, const int32_t* copy, const T* copies, int64_t first,
                int64_t last, int64_t pitch, T* rows);
  // copies[i] = rows[vertex[i]]
  void (*share)(const int32_t* vertex, const T* rows, int64_t first, int64_t last, int64_t pitch, T* copies);
  // out[v] = in[v] + (in[n_0] + in[n_1]) / 2, neighbours (vertices, 2).
  void (*blur)(const int32_t* neighbours, const T* in, int64_t first, int64_t last, int64_t pitch, T* out);

  // q = softmax(energy), rows of `count` points; padding of energy is -infinity, of q 0. q may be energy.
  void (*softmax)(const T* energy, int64_t pitch, int64_t count, T* q);
  // grad = q (grad - sum(q grad))
  void (*softmax_backward)(const T* q, int64_t pitch, int64_t count, T* grad);
  // rows += factor * diagonal * other
  void (*add_diagonal)(const T* diagonal, T factor, const T* other, int64_t pitch, int64_t count, T* rows);
  // rows += factor * matrix other; matrix_t is (channels, pitch): the transposed matrix with padded rows.
  void (*add_product)(const T* matrix_t, T factor, const T* other, int64_t channels, int64_t pitch, int64_t count,
                      T* rows);
  // matrix (channels, pitch) += factor * sum over points of a b^T
  void (*add_outer)(const T* a, const T* b, T factor, int64_t channels, int64_t pitch, int64_t count, T* matrix);
  // x_k = factor * <a, vertex_a[row_k]>, y_k = factor * <b, vertex_b[row_k]>: grad_weight (count, d + 1) += x +
  // y; sum_x[p] = sum_k weight_k x_k, sum_y alike.
  void (*weight_gradient)(const PointPlaces<T>& places, T factor, const T* a, const T* vertex_a, const T* b,
                          const T* vertex_b, int64_t pitch, int64_t count, T* grad_weight, T* sum_x, T* sum_y);
};

// The first two are in embed_kernels.cpp, the others in kernels.cpp.
#define DK_DECLARE_ISA(isa)                         \
  namespace isa {                                   \
  template <typename T>                             \
  void embed(const EmbedBlock<T>& block);           \
  template <typename T>                             \
  void embed_precisely(const EmbedBlock<T>& block); \
  template <typename T>                             \
  const LatticeKernels<T>& lattice_kernels();       \
  }
DK_DECLARE_ISA(portable)
DK_DECLARE_ISA(avx2)
#undef DK_DECLARE_ISA

}  // namespace deeplab_kernels::cpu
