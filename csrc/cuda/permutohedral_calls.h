// The launches behind permutohedral.h, for one type: shared by the filter and the dense CRF.
#pragma once

#include "permutohedral_passes.h"

namespace deeplab_kernels::cuda {

// Rows are padded as on the CPU (cpu::kChannelPack): whole 32-byte sectors.
constexpr int64_t padded_channels(int64_t channels) { return ceil_div(channels, 8) * 8; }

// The lattice's arrays in its block of memory. Returns the block's bytes.
template <typename T>
int64_t lay_out_lattice(const LatticeShape& shape, void* block, Lattice<T>* lattice) {
  int64_t bytes = 0;
  auto place = [&]<typename E>(E*& array, int64_t count) {
    array = reinterpret_cast<E*>(static_cast<char*>(block) + bytes);
    bytes += ceil_div(count * int64_t(sizeof(E)), 256) * 256;
  };
  Lattice<T> l{};
  l.total = shape.total(), l.entries = shape.entries(), l.d = shape.dimension;
  place(l.vertices, 1);
  place(l.weight, l.entries);
  place(l.vertex, l.entries);
  place(l.list_vertex, l.entries);
  place(l.list_entry, l.entries);
  place(l.start, l.entries + 1);
  place(l.neighbour, l.entries * (l.d + 1) * 2);
  if (lattice) *lattice = l;
  return bytes;
}

// The lattice's building and what else embeds points: permutohedral_build.cu.
template <typename T>
void build_lattice(const Context& context, const LatticeShape& shape, const T* features, const Lattice<T>& lattice);
template <typename T>
void run_feature_gradient(const Context& context, const LatticeShape& shape, const T* features,
                          const T* grad_out_weight, const T* grad_in_weight, T* grad_features);

template <typename T>
void run_fill(const Context& context, T* data, int64_t count, T value);

// (batch, channels, points) to rows and back, times a factor.
template <typename T>
void run_to_rows(const Context& context, const LatticeShape& shape, const T* data, int64_t channels, T factor, T* rows);
template <typename T>
void run_from_rows(const Context& context, const LatticeShape& shape, const T* rows, int64_t channels, T factor,
                   T* data);

// The passes over one lattice.
template <typename T>
struct LatticeFilter {
  // Factors per point before and after the filter, null for 1; `factor` is what the normalisation contributed.
  struct Factors {
    const T* in = nullptr;
    const T* out = nullptr;
    const T* factor = nullptr;
  };
  struct Weights {
    const Weighted<T>* splat = nullptr;
    const Weighted<T>* slice = nullptr;
  };
  // Memory of the vertices' values, two of them while blurring, and of the splat's parts.
  struct Buffers {
    T* values = nullptr;
    T* other = nullptr;
    T* parts = nullptr;
  };
  static constexpr int64_t kOneChannel = kVector<T>;  // stride of rows of one channel

  LatticeShape shape;
  Lattice<T> lattice;
  Normalization normalization;
  const T* mask;  // per point, 1 or 0; null: all 1
  T scale;

  LatticeFilter(const LatticeShape& shape, const Lattice<T>& lattice, Normalization normalization, const T* mask);

  int64_t value_count(int64_t stride) const { return lattice.entries * stride; }
  int64_t part_count(int64_t stride) const { return ceil_div(lattice.entries, kChunk) * 2 * stride; }
  Buffers buffers(const Context& context, int64_t stride) const;

  Factors factors(const Context& context, const Buffers& buffers) const;
  Weights weights(const Context& context, const T* in, const T* out) const;
  // buffers.values = B S rows, or B^T S rows.
  void splat_and_blur(const Context& context, const Weights& weights, const T* rows, int64_t stride, bool transpose,
                      const Buffers& buffers) const;
  void slice(const Context& context, const Weights& weights, const T* blurred, int64_t stride, T* rows) const;
  void add_entry_gradient(const Context& context, const T* rows, const T* blurred, int64_t stride, const T* factor,
                          T* grad_weight) const;
  // From the gradients of the weights' uses on the way out and in, without the normalisation's, which it adds to them.
  void finish_feature_gradient(const Context& context, const Factors& factors, const Buffers& buffers,
                               const T* features, T* grad_out_weight, T* grad_in_weight, T* grad_features) const;

 private:
  const T* ones(const Context& context) const;
};

extern template struct LatticeFilter<float>;
extern template struct LatticeFilter<double>;

}  // namespace deeplab_kernels::cuda
