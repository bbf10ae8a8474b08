// Launches of permutohedral_passes.h, and the calls of permutohedral.h.
#include "permutohedral_calls.h"

namespace deeplab_kernels::cuda {

template <typename T>
void run_fill(const Context& context, T* data, int64_t count, T value) {
  launch("fill", fill<T>, at_most(ceil_div(count, kBuildThreads), kVertexBlocks), dim3(kBuildThreads), 0,
         context.stream, data, count, value);
}

template <typename T>
void run_to_rows(const Context& context, const LatticeShape& shape, const T* data, int64_t channels, T factor,
                 T* rows) {
  const int64_t tiles = ceil_div(shape.points, kTile);
  launch("to_rows", to_rows<T>, shape.batch * tiles, dim3(kTile, kTileRows), kTile * (kTile + 1) * sizeof(T),
         context.stream, data, channels, shape.points, padded_channels(channels), tiles, factor, rows);
}

template <typename T>
void run_from_rows(const Context& context, const LatticeShape& shape, const T* rows, int64_t channels, T factor,
                   T* data) {
  const int64_t tiles = ceil_div(shape.points, kTile);
  launch("from_rows", from_rows<T>, shape.batch * tiles, dim3(kTile, kTileRows), kTile * (kTile + 1) * sizeof(T),
         context.stream, rows, channels, shape.points, padded_channels(channels), tiles, factor, data);
}

template <typename T>
LatticeFilter<T>::LatticeFilter(const LatticeShape& shape, const Lattice<T>& lattice, Normalization normalization,
                                const T* mask)
    : shape(shape),
      lattice(lattice),
      normalization(normalization),
      mask(mask),
      scale(T(lattice_exact_scale(shape.dimension))) {}

template <typename T>
auto LatticeFilter<T>::buffers(const Context& context, int64_t stride) const -> Buffers {
  stride = at_least(stride, kOneChannel);  // the normalisation's
  return {context.scratch_array<T>(value_count(stride)), context.scratch_array<T>(value_count(stride)),
          context.scratch_array<T>(part_count(stride))};
}

template <typename T>
const T* LatticeFilter<T>::ones(const Context& context) const {
  T* rows = context.scratch_array<T>(lattice.total * kOneChannel);
  run_fill(context, rows, lattice.total * kOneChannel, T(1));
  return rows;
}

template <typename T>
auto LatticeFilter<T>::weights(const Context& context, const T* in, const T* out) const -> Weights {
  auto* splat = context.scratch_array<Weighted<T>>(lattice.entries);
  auto* slice = context.scratch_array<Weighted<T>>(lattice.entries);
  launch("weigh_entries", weigh_entries<T>, ceil_div(lattice.entries, kBuildThreads), dim3(kBuildThreads), 0,
         context.stream, lattice, in, out, scale, splat, slice);
  return {splat, slice};
}

template <typename T>
void LatticeFilter<T>::splat_and_blur(const Context& context, const Weights& weights, const T* rows, int64_t stride,
                                      bool transpose, const Buffers& buffers) const {
  const int64_t entries = lattice.entries, chunks = ceil_div(entries, kChunk);
  const dim3 block = row_block(stride / kVector<T>);
  const int directions = lattice.d + 1;
  // The last direction ends in buffers.values.
  T* from = directions % 2 ? buffers.other : buffers.values;
  T* to = directions % 2 ? buffers.values : buffers.other;
  launch("splat_chunks", splat_chunks<T>, row_blocks(chunks, block), block, 0, context.stream, lattice.list_vertex,
         weights.splat, entries, lattice.vertices, rows, stride, from, buffers.parts);
  launch("splat_joins", splat_joins<T>, row_blocks(chunks, block), block, 0, context.stream, lattice.list_vertex,
         lattice.start, entries, lattice.vertices, buffers.parts, stride, from);
  for (int j = 0; j < directions; ++j) {
    const int direction = transpose ? directions - 1 - j : j;
    launch("blur", blur<T>, vertex_blocks(entries, block), block, 0, context.stream,
           lattice.neighbour + direction * entries * 2, lattice.vertices, from, stride, to);
    T* const next = from;
    from = to, to = next;
  }
}

template <typename T>
void LatticeFilter<T>::slice(const Context& context, const Weights& weights, const T* blurred, int64_t stride,
                             T* rows) const {
  const dim3 block = row_block(stride / kVector<T>);
  launch("slice_rows", slice_rows<T>, row_blocks(lattice.total, block), block, 0, context.stream, weights.slice,
         lattice.d, lattice.total, blurred, stride, rows);
}

template <typename T>
auto LatticeFilter<T>::factors(const Context& context, const Buffers& buffers) const -> Factors {
  if (normalization == Normalization::kNone) return {mask, mask, nullptr};
  T* n = context.scratch_array<T>(lattice.total * kOneChannel);
  T* factor = context.scratch_array<T>(lattice.total);
  const Weights plain = weights(context, mask, nullptr);
  splat_and_blur(context, plain, ones(context), kOneChannel, false, buffers);
  slice(context, plain, buffers.values, kOneChannel, n);
  launch("normalization_factors", normalization_factors<T>, ceil_div(lattice.total, kBuildThreads), dim3(kBuildThreads),
         0, context.stream, n, kOneChannel, lattice.total, normalization == Normalization::kSymmetric, mask, factor);
  return {normalization == Normalization::kAfter ? mask : factor,
          normalization == Normalization::kBefore ? mask : factor, factor};
}

template <typename T>
void LatticeFilter<T>::add_entry_gradient(const Context& context, const T* rows, const T* blurred, int64_t stride,
                                          const T* factor, T* grad_weight) const {
  launch("entry_gradient", entry_gradient<T>, ceil_div(lattice.entries, kBuildThreads), dim3(kBuildThreads), 0,
         context.stream, lattice, rows, blurred, stride, factor, scale, grad_weight);
}

template <typename T>
void LatticeFilter<T>::finish_feature_gradient(const Context& context, const Factors& factors, const Buffers& buffers,
                                               const T* features, T* grad_out_weight, T* grad_in_weight,
                                               T* grad_features) const {
  if (normalization != Normalization::kNone) {
    T* grad_n = context.scratch_array<T>(lattice.total * kOneChannel);
    const T* const none = nullptr;
    launch("normalization_gradient", normalization_gradient<T>, ceil_div(lattice.total, kBuildThreads),
           dim3(kBuildThreads), 0, context.stream, lattice, factors.factor, normalization == Normalization::kSymmetric,
           normalization == Normalization::kBefore ? none : grad_out_weight,
           normalization == Normalization::kAfter ? none : grad_in_weight, kOneChannel, grad_n);
    const T* one = ones(context);
    splat_and_blur(context, weights(context, mask, nullptr), one, kOneChannel, false, buffers);
    add_entry_gradient(context, grad_n, buffers.values, kOneChannel, nullptr, grad_out_weight);
    splat_and_blur(context, weights(context, nullptr, nullptr), grad_n, kOneChannel, true, buffers);
    // One of the row's channels is the gradient, the others are 0.
    add_entry_gradient(context, one, buffers.values, kOneChannel, mask, grad_in_weight);
  }
  run_feature_gradient(context, shape, features, grad_out_weight, grad_in_weight, grad_features);
}

template struct LatticeFilter<float>;
template struct LatticeFilter<double>;
template void run_fill(const Context&, float*, int64_t, float);
template void run_fill(const Context&, double*, int64_t, double);
template void run_to_rows(const Context&, const LatticeShape&, const float*, int64_t, float, float*);
template void run_to_rows(const Context&, const LatticeShape&, const double*, int64_t, double, double*);
template void run_from_rows(const Context&, const LatticeShape&, const float*, int64_t, float, float*);
template void run_from_rows(const Context&, const LatticeShape&, const double*, int64_t, double, double*);

namespace {

template <typename F>
void dispatch(Dtype dtype, F&& f) {
  if (dtype == Dtype::kFloat64) return f(double());
  f(float());
}

template <typename T>
LatticeFilter<T> filter_of(const LatticeShape& shape, const void* block, Normalization normalization) {
  Lattice<T> lattice;
  lay_out_lattice(shape, const_cast<void*>(block), &lattice);
  return LatticeFilter<T>(shape, lattice, normalization, nullptr);
}

template <typename T>
void filter(const Context& context, const LatticeShape& shape, const void* lattice, int64_t channels, const T* values,
            Normalization normalization, bool transpose, T* out) {
  const int64_t stride = padded_channels(channels);
  const auto filter = filter_of<T>(shape, lattice, normalization);
  const auto buffers = filter.buffers(context, stride);
  const auto factors = filter.factors(context, buffers);
  const auto weights =
      filter.weights(context, transpose ? factors.out : factors.in, transpose ? factors.in : factors.out);
  T* rows = context.scratch_array<T>(shape.total() * stride);
  run_to_rows(context, shape, values, channels, T(1), rows);
  filter.splat_and_blur(context, weights, rows, stride, transpose, buffers);
  filter.slice(context, weights, buffers.values, stride, rows);
  run_from_rows(context, shape, rows, channels, T(1), out);
}

template <typename T>
void filter_backward(const Context& context, const LatticeShape& shape, const void* lattice, int64_t channels,
                     const T* grad_out, const T* values, const T* features, Normalization normalization, bool transpose,
                     T* grad_values, T* grad_features) {
  const int64_t stride = padded_channels(channels), entries = shape.entries();
  const auto filter = filter_of<T>(shape, lattice, normalization);
  const auto buffers = filter.buffers(context, stride);
  const auto factors = filter.factors(context, buffers);
  const auto forward = filter.weights(context, factors.in, factors.out);
  const auto reverse = factors.in == factors.out ? forward : filter.weights(context, factors.out, factors.in);
  // grad_out . F^T values = values . F grad_out: the transposed filter's gradients are those of F, its input and the
  // gradient of its output exchanged.
  T* v = context.scratch_array<T>(shape.total() * stride);
  T* g = context.scratch_array<T>(shape.total() * stride);
  T* result = context.scratch_array<T>(shape.total() * stride);
  run_to_rows(context, shape, transpose ? grad_out : values, channels, T(1), v);
  run_to_rows(context, shape, transpose ? values : grad_out, channels, T(1), g);
  T* out_weight = context.scratch_array<T>(entries);
  T* in_weight = context.scratch_array<T>(entries);
  run_fill(context, out_weight, entries, T(0));
  run_fill(context, in_weight, entries, T(0));
  filter.splat_and_blur(context, forward, v, stride, false, buffers);
  filter.add_entry_gradient(context, g, buffers.values, stride, factors.out, out_weight);
  if (grad_values && transpose) filter.slice(context, forward, buffers.values, stride, result);
  filter.splat_and_blur(context, reverse, g, stride, true, buffers);
  filter.add_entry_gradient(context, v, buffers.values, stride, factors.in, in_weight);
  if (grad_values && !transpose) filter.slice(context, reverse, buffers.values, stride, result);
  if (grad_values) run_from_rows(context, shape, result, channels, T(1), grad_values);
  filter.finish_feature_gradient(context, factors, buffers, features, out_weight, in_weight, grad_features);
}

}  // namespace

int64_t lattice_bytes(Dtype dtype, const LatticeShape& shape) {
  int64_t bytes = 0;
  dispatch(dtype, [&](auto value) { bytes = lay_out_lattice<decltype(value)>(shape, nullptr, nullptr); });
  return bytes;
}

void lattice_build(const Context& context, Dtype dtype, const LatticeShape& shape, const void* features,
                   void* lattice) {
  dispatch(dtype, [&](auto value) {
    using T = decltype(value);
    Lattice<T> arrays;
    lay_out_lattice(shape, lattice, &arrays);
    build_lattice(context, shape, static_cast<const T*>(features), arrays);
  });
}

void permutohedral_filter(const Context& context, Dtype dtype, const LatticeShape& shape, const void* lattice,
                          int64_t channels, const void* values, Normalization normalization, bool transpose,
                          void* out) {
  if (shape.total() == 0 || channels == 0) return;
  dispatch(dtype, [&](auto value) {
    using T = decltype(value);
    filter<T>(context, shape, lattice, channels, static_cast<const T*>(values), normalization, transpose,
              static_cast<T*>(out));
  });
}

void permutohedral_filter_backward(const Context& context, Dtype dtype, const LatticeShape& shape, const void* lattice,
                                   int64_t channels, const void* grad_out, const void* values, const void* features,
                                   Normalization normalization, bool transpose, void* grad_values,
                                   void* grad_features) {
  if (shape.total() == 0) return;
  if (!grad_features) {
    if (grad_values)
      permutohedral_filter(context, dtype, shape, lattice, channels, grad_out, normalization, !transpose, grad_values);
    return;
  }
  dispatch(dtype, [&](auto value) {
    using T = decltype(value);
    filter_backward<T>(context, shape, lattice, channels, static_cast<const T*>(grad_out),
                       static_cast<const T*>(values), static_cast<const T*>(features), normalization, transpose,
                       static_cast<T*>(grad_values), static_cast<T*>(grad_features));
  });
}

}  // namespace deeplab_kernels::cuda
