// The filter, its gradients and the passes that both and the mean field share.
#include "permutohedral.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "../instruction_set.h"
#include "../workspace.h"
#include "passes.h"

namespace deeplab_kernels::cpu {
namespace {

constexpr double kSmallestNorm = 1e-20;

template <typename T>
T filter_scale(LatticeScale kind, int d) {
  return T(kind == LatticeScale::kExactSum ? lattice_exact_scale(d) : lattice_pydensecrf_scale(d));
}

// Filters one channel given by value(image, point) and calls result(image, point, filtered).
template <typename T, typename Value, typename Result>
void filter_scalar(const LatticeData<T>& lattice, VertexRows<T>& rows, bool transpose, T scale, const Value& value,
                   const Result& result, const Parallel& parallel) {
  const LatticeKernels<T>& kernels = lattice_kernels<T>();
  constexpr int64_t kBlock = 64;
  parallel(lattice.plan.chunks(), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      T* to = rows.begin_chunk(c);
      over_blocks(lattice.plan, c, kBlock, [&](int64_t image, int64_t first, int64_t count) {
        T values[kBlock];
        for (int64_t p = 0; p < count; ++p) values[p] = value(image, first + p);
        kernels.splat(lattice.places(image, first), nullptr, values, 1, count, to);
      });
    }
  });
  rows.blur(transpose, parallel);
  parallel(lattice.plan.chunks(), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c)
      over_blocks(lattice.plan, c, kBlock, [&](int64_t image, int64_t first, int64_t count) {
        T values[kBlock];
        kernels.slice(lattice.places(image, first), nullptr, scale, rows.rows(), 1, count, nullptr, values);
        for (int64_t p = 0; p < count; ++p) result(image, first + p, values[p]);
      });
  });
}

}  // namespace

template <typename T>
const LatticeKernels<T>& lattice_kernels() {
#if defined(__x86_64__) && !defined(DEEPLAB_KERNELS_PORTABLE)
  if (chosen_instruction_set() != InstructionSet::kPortable) return avx2::lattice_kernels<T>();
#endif
  return portable::lattice_kernels<T>();
}

template <typename T>
VertexRows<T>::VertexRows(const LatticeData<T>& lattice, int64_t pitch) : lattice_(&lattice), pitch_(pitch) {
  for (Buffer<T>* rows : {&sums_, &result_}) {
    *rows = Buffer<T>(lattice.rows() * pitch);
    std::memset(rows->data() + lattice.vertices * pitch, 0, size_t(pitch) * sizeof(T));
  }
}

template <typename T>
T* VertexRows<T>::begin_chunk(int64_t chunk) const {
  const auto clear = [&](const Buffer<int32_t>& begin, int64_t offset) {
    std::memset(sums_.data() + (offset + begin[chunk]) * pitch_, 0,
                size_t((begin[chunk + 1] - begin[chunk]) * pitch_) * sizeof(T));
  };
  clear(lattice_->chunk_vertex, 0);
  clear(lattice_->chunk_copy, lattice_->vertices + 1);
  return sums_.data();
}

template <typename T>
void VertexRows<T>::blur(bool transpose, const Parallel& parallel) {
  const LatticeKernels<T>& kernels = lattice_kernels<T>();
  const LatticeData<T>& lattice = *lattice_;
  const int64_t vertices = lattice.vertices, d = lattice.d, copies = (vertices + 1) * pitch_;
  parallel(lattice.shared_vertex.size(), [&](int64_t begin, int64_t end) {
    kernels.merge(lattice.shared_vertex.data(), lattice.shared_begin.data(), lattice.shared_copy.data(),
                  sums_.data() + copies, begin, end, pitch_, sums_.data());
  });
  for (int64_t i = 0; i <= d; ++i) {
    const int64_t j = transpose ? d - i : i;
    const int32_t* neighbours = lattice.neighbour.data() + j * vertices * 2;
    parallel(vertices, [&](int64_t begin, int64_t end) {
      kernels.blur(neighbours, sums_.data(), begin, end, pitch_, result_.data());
    });
    std::swap(sums_, result_);
  }
  std::swap(sums_, result_);
  parallel(lattice.copies(), [&](int64_t begin, int64_t end) {
    kernels.share(lattice.copy_vertex.data(), result_.data(), begin, end, pitch_, result_.data() + copies);
  });
}

template <typename T>
Normalizer<T>::Normalizer(const LatticeData<T>& lattice, Normalization normalization, LatticeScale scale_kind,
                          const uint8_t* mask, bool transpose, const Parallel& parallel)
    : scale(filter_scale<T>(scale_kind, lattice.d)) {
  const int64_t points = lattice.plan.points, total = lattice.plan.batch * points;
  const auto mask_of = [&](int64_t i) { return mask == nullptr || mask[i] != 0 ? T(1) : T(0); };
  if (mask != nullptr && normalization != Normalization::kSymmetric) {
    masking = Buffer<T>(total);
    parallel(total, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) masking[i] = mask_of(i);
    });
    before = after = masking.data();
  }
  if (normalization == Normalization::kNone) return;
  factor = Buffer<T>(total);
  VertexRows<T> rows(lattice, 1);
  filter_scalar(
      lattice, rows, false, scale, [&](int64_t b, int64_t p) { return mask_of(b * points + p); },
      [&](int64_t b, int64_t p, T n) {
        const int64_t i = b * points + p;
        const T sum = n + T(kSmallestNorm);
        const T value = normalization == Normalization::kSymmetric ? T(1) / std::sqrt(sum) : T(1) / sum;
        factor[i] = mask_of(i) == T(0) ? T(0) : value;
      },
      parallel);
  if (normalization == Normalization::kSymmetric) before = after = factor.data();
  if (normalization == Normalization::kBefore) (transpose ? after : before) = factor.data();
  if (normalization == Normalization::kAfter) (transpose ? before : after) = factor.data();
}

template <typename T>
FeatureGradient<T>::FeatureGradient(const LatticeData<T>& lattice, Normalization normalization, bool transpose,
                                    const uint8_t* mask)
    : lattice_(&lattice), normalization_(normalization), transpose_(transpose), mask_(mask) {
  const int64_t total = lattice.plan.batch * lattice.plan.points;
  grad_weight_ = Buffer<T>(total * (lattice.d + 1));
  std::memset(grad_weight_.data(), 0, grad_weight_.bytes());
  if (normalization == Normalization::kNone) return;
  grad_log_norm_ = Buffer<T>(total);
  std::memset(grad_log_norm_.data(), 0, grad_log_norm_.bytes());
}

template <typename T>
void FeatureGradient<T>::add(int64_t image, int64_t first, int64_t count, T scale, const T* a, const T* vertex_a,
                             const T* b, const T* vertex_b, int64_t pitch) {
  T after[64], before[64];
  const int64_t at = image * lattice_->plan.points + first;
  lattice_kernels<T>().weight_gradient(lattice_->places(image, first), scale, a, vertex_a, b, vertex_b, pitch, count,
                                       grad_weight_.data() + at * (lattice_->d + 1), after, before);
  if (normalization_ == Normalization::kNone) return;
  // n^-p stands after (before) the lattice: dL / d log n = -p times the sum of output (input) times its gradient.
  T power_after = T(0.5), power_before = T(0.5);
  if (normalization_ != Normalization::kSymmetric) {
    power_after = (normalization_ == Normalization::kAfter) != transpose_ ? T(1) : T(0);
    power_before = T(1) - power_after;
  }
  for (int64_t p = 0; p < count; ++p) grad_log_norm_[at + p] -= power_after * after[p] + power_before * before[p];
}

template <typename T>
void FeatureGradient<T>::finish(T scale, Strided<const T> features, Strided<T> grad_features,
                                const Parallel& parallel) {
  const LatticeData<T>& lattice = *lattice_;
  const LatticeKernels<T>& kernels = lattice_kernels<T>();
  const int d = lattice.d;
  const int64_t points = lattice.plan.points;
  if (normalization_ != Normalization::kNone) {
    // n = scale K mask: one more channel, whose output has the gradient dL/dn.
    const auto mask_of = [&](int64_t b, int64_t p) {
      return mask_ == nullptr || mask_[b * points + p] != 0 ? T(1) : T(0);
    };
    VertexRows<T> ones(lattice, 1), grads(lattice, 1);
    filter_scalar(
        lattice, ones, false, scale, mask_of,
        [&](int64_t b, int64_t p, T n) { grad_log_norm_[b * points + p] /= n + T(kSmallestNorm); }, parallel);
    filter_scalar(
        lattice, grads, true, scale, [&](int64_t b, int64_t p) { return grad_log_norm_[b * points + p]; },
        [](int64_t, int64_t, T) {}, parallel);
    parallel(lattice.plan.chunks(), [&](int64_t begin, int64_t end) {
      constexpr int64_t kBlock = 64;
      for (int64_t c = begin; c < end; ++c)
        over_blocks(lattice.plan, c, kBlock, [&](int64_t image, int64_t first, int64_t count) {
          T masks[kBlock], unused_x[kBlock], unused_y[kBlock];
          for (int64_t p = 0; p < count; ++p) masks[p] = mask_of(image, first + p);
          const int64_t at = image * points + first;
          kernels.weight_gradient(lattice.places(image, first), scale, grad_log_norm_.data() + at, ones.rows(), masks,
                                  grads.rows(), 1, count, grad_weight_.data() + at * (d + 1), unused_x, unused_y);
        });
    });
  }
  double scales[kMaxLatticeDimension];
  for (int i = 0; i < d; ++i) scales[i] = lattice_scale(d, 1.0 / std::sqrt(double(i + 1) * double(i + 2)));
  parallel(lattice.plan.batch * points, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / points, p = i % points;
      double position[kMaxLatticeDimension], barycentric[kMaxLatticeDimension + 2], grad[kMaxLatticeDimension];
      int32_t greedy[kMaxLatticeDimension + 1], rank[kMaxLatticeDimension + 1];
      const T* in = features.data + b * features.batch_stride + p * features.point_stride;
      T* out = grad_features.data + b * grad_features.batch_stride + p * grad_features.point_stride;
      for (int k = 0; k < d; ++k) position[k] = double(in[k * features.channel_stride]) * scales[k];
      lattice_simplex(position, d, greedy, rank, barycentric);
      for (int k = 0; k <= d; ++k) barycentric[k] = double(grad_weight_[i * (d + 1) + k]);
      lattice_simplex_backward(barycentric, rank, d, grad);
      for (int k = 0; k < d; ++k) out[k * grad_features.channel_stride] = T(grad[k] * scales[k]);
    }
  });
}

template <typename T>
Lattice<T>::Lattice(int64_t batch, int d, int64_t points, Strided<const T> features, const Parallel& parallel,
                    Embedding embedding, int64_t row)
    : data_(std::make_shared<LatticeData<T>>(
          build_lattice(batch, d, points, row, features, embedding, &problem_, parallel))) {}

template <typename T>
int64_t Lattice<T>::batch() const {
  return data_ ? data_->plan.batch : 0;
}
template <typename T>
int Lattice<T>::dimension() const {
  return data_ ? data_->d : 0;
}
template <typename T>
int64_t Lattice<T>::points() const {
  return data_ ? data_->plan.points : 0;
}
template <typename T>
int64_t Lattice<T>::row() const {
  return data_ ? data_->plan.row : 0;
}
template <typename T>
int64_t Lattice<T>::vertices() const {
  return data_ ? data_->vertices : 0;
}

namespace {

struct Header {
  int64_t magic, element, batch, points, row, d, vertices, copies, shared;
};
constexpr int64_t kMagic = 0x334c4b44;  // changes with the layout

// Calls f(buffer, size) for each array, in the order of packing. `data` may be const.
template <typename Data, typename F>
void over_arrays(Data& data, const Header& header, F&& f) {
  const ChunkPlan plan(header.batch, header.points, header.row);
  const int64_t corners = plan.batch * plan.points * (header.d + 1);
  f(data.weight, corners);
  f(data.row, corners);
  f(data.chunk_vertex, plan.chunks() + 1);
  f(data.chunk_copy, plan.chunks() + 1);
  f(data.copy_vertex, header.copies);
  f(data.shared_vertex, header.shared);
  f(data.shared_begin, header.shared + 1);
  f(data.shared_copy, header.copies);
  f(data.neighbour, (header.d + 1) * header.vertices * 2);
}

template <typename T>
Header header_of(const LatticeData<T>& data) {
  return {kMagic, int64_t(sizeof(T)), data.plan.batch, data.plan.points,         data.plan.row,
          data.d, data.vertices,      data.copies(),   data.shared_vertex.size()};
}

}  // namespace

template <typename T>
size_t Lattice<T>::memory() const {
  size_t bytes = 0;
  if (data_) over_arrays(*data_, header_of(*data_), [&](const auto& buffer, int64_t) { bytes += buffer.bytes(); });
  return bytes;
}

template <typename T>
size_t Lattice<T>::packed_bytes() const {
  return sizeof(Header) + memory();
}

template <typename T>
void Lattice<T>::pack(void* bytes) const {
  if (!data_) {
    const Header none{kMagic, int64_t(sizeof(T)), 0, 0, 0, 0, 0, 0, 0};
    std::memcpy(bytes, &none, sizeof none);
    return;
  }
  const Header header = header_of(*data_);
  auto* to = static_cast<unsigned char*>(bytes);
  std::memcpy(to, &header, sizeof header);
  to += sizeof header;
  over_arrays(*data_, header, [&](const auto& buffer, int64_t) {
    if (buffer.bytes() > 0) std::memcpy(to, buffer.data(), buffer.bytes());
    to += buffer.bytes();
  });
}

template <typename T>
Lattice<T> Lattice<T>::unpack(const void* bytes, size_t size) {
  Lattice result;
  Header header;
  if (size < sizeof header) return result;
  std::memcpy(&header, bytes, sizeof header);
  if (header.magic != kMagic || header.element != int64_t(sizeof(T)) || header.d < 1 || header.d > kMaxLatticeDimension)
    return result;
  auto data = std::make_shared<LatticeData<T>>();
  size_t expected = sizeof header;
  over_arrays(*data, header, [&](auto& buffer, int64_t count) { expected += size_t(count) * sizeof(buffer[0]); });
  if (expected != size) return result;
  const auto* from = static_cast<const unsigned char*>(bytes) + sizeof header;
  over_arrays(*data, header, [&](auto& buffer, int64_t count) {
    buffer = std::remove_reference_t<decltype(buffer)>(count);
    if (buffer.bytes() > 0) std::memcpy(buffer.data(), from, buffer.bytes());
    from += buffer.bytes();
  });
  data->plan = ChunkPlan(header.batch, header.points, header.row);
  data->d = int(header.d);
  data->vertices = header.vertices;
  result.data_ = std::move(data);
  return result;
}

template <typename T>
void permutohedral_filter(const Lattice<T>& lattice, int64_t channels, Strided<const T> values, Strided<T> out,
                          Normalization normalization, LatticeScale scale, bool transpose, const Parallel& parallel) {
  if (!lattice.data() || lattice.points() == 0 || channels == 0) return;
  const LatticeData<T>& data = *lattice.data();
  const Normalizer<T> normalizer(data, normalization, scale, nullptr, transpose, parallel);
  const LatticeKernels<T>& kernels = lattice_kernels<T>();
  const int64_t points = data.plan.points;
  // Many channels go in slices, so that their vertex rows stay small.
  constexpr int64_t kSlice = 64;
  VertexRows<T> rows(data, filter_pitch(std::min(channels, kSlice)));
  for (int64_t c0 = 0; c0 < channels; c0 += kSlice) {
    const int64_t width = std::min(kSlice, channels - c0), pitch = filter_pitch(std::min(channels, kSlice));
    const int64_t block = block_points(pitch);
    parallel(data.plan.chunks(), [&](int64_t begin, int64_t end) {
      T* scratch = static_cast<T*>(thread_scratch(size_t(block * pitch) * sizeof(T)));
      for (int64_t c = begin; c < end; ++c) {
        T* to = rows.begin_chunk(c);
        over_blocks(data.plan, c, block, [&](int64_t image, int64_t first, int64_t count) {
          const T* in =
              values.data + image * values.batch_stride + c0 * values.channel_stride + first * values.point_stride;
          kernels.load(in, values.channel_stride, values.point_stride, width, pitch, count, T(1), T(0), scratch);
          const T* before = normalizer.before ? normalizer.before + image * points + first : nullptr;
          kernels.splat(data.places(image, first), before, scratch, pitch, count, to);
        });
      }
    });
    rows.blur(transpose, parallel);
    parallel(data.plan.chunks(), [&](int64_t begin, int64_t end) {
      T* scratch = static_cast<T*>(thread_scratch(size_t(block * pitch) * sizeof(T)));
      for (int64_t c = begin; c < end; ++c)
        over_blocks(data.plan, c, block, [&](int64_t image, int64_t first, int64_t count) {
          const T* after = normalizer.after ? normalizer.after + image * points + first : nullptr;
          kernels.slice(data.places(image, first), after, normalizer.scale, rows.rows(), pitch, count, nullptr,
                        scratch);
          T* to = out.data + image * out.batch_stride + c0 * out.channel_stride + first * out.point_stride;
          kernels.store(scratch, pitch, width, count, to, out.channel_stride, out.point_stride);
        });
    });
  }
}

template <typename T>
void permutohedral_filter_backward(const Lattice<T>& lattice, int64_t channels, Strided<const T> grad_out,
                                   Strided<const T> values, Strided<const T> features, Strided<T> grad_values,
                                   Strided<T> grad_features, Normalization normalization, LatticeScale scale,
                                   bool transpose, const Parallel& parallel) {
  if (!lattice.data() || lattice.points() == 0) return;
  if (grad_features.data == nullptr) {
    if (grad_values.data != nullptr)
      permutohedral_filter(lattice, channels, grad_out, grad_values, normalization, scale, !transpose, parallel);
    return;
  }
  const LatticeData<T>& data = *lattice.data();
  const Normalizer<T> normalizer(data, normalization, scale, nullptr, transpose, parallel);
  const LatticeKernels<T>& kernels = lattice_kernels<T>();
  const int64_t points = data.plan.points;
  FeatureGradient<T> gradient(data, normalization, transpose, nullptr);
  constexpr int64_t kSlice = 64;
  const int64_t pitch = filter_pitch(std::min(channels, kSlice)), block = block_points(pitch);
  if (channels > 0) {
    VertexRows<T> forward(data, pitch), backward(data, pitch);
    for (int64_t c0 = 0; c0 < channels; c0 += kSlice) {
      const int64_t width = std::min(kSlice, channels - c0);
      // Rows of a block of either array, with the factors of the normalisation.
      const auto load = [&](Strided<const T> from, const T* factors, int64_t image, int64_t first, int64_t count,
                            T* to) {
        kernels.load(from.data + image * from.batch_stride + c0 * from.channel_stride + first * from.point_stride,
                     from.channel_stride, from.point_stride, width, pitch, count, T(1), T(0), to);
        if (factors == nullptr) return;
        for (int64_t p = 0; p < count; ++p)
          for (int64_t k = 0; k < pitch; ++k) to[p * pitch + k] *= factors[image * points + first + p];
      };
      parallel(data.plan.chunks(), [&](int64_t begin, int64_t end) {
        T* scratch = static_cast<T*>(thread_scratch(size_t(block * pitch) * sizeof(T)));
        for (int64_t c = begin; c < end; ++c) {
          T* forward_rows = forward.begin_chunk(c);
          T* backward_rows = backward.begin_chunk(c);
          over_blocks(data.plan, c, block, [&](int64_t image, int64_t first, int64_t count) {
            load(values, normalizer.before, image, first, count, scratch);
            kernels.splat(data.places(image, first), nullptr, scratch, pitch, count, forward_rows);
            load(grad_out, normalizer.after, image, first, count, scratch);
            kernels.splat(data.places(image, first), nullptr, scratch, pitch, count, backward_rows);
          });
        }
      });
      forward.blur(transpose, parallel);
      backward.blur(!transpose, parallel);
      parallel(data.plan.chunks(), [&](int64_t begin, int64_t end) {
        T* scratch = static_cast<T*>(thread_scratch(size_t(2 * block * pitch) * sizeof(T)));
        T* other = scratch + block * pitch;
        for (int64_t c = begin; c < end; ++c)
          over_blocks(data.plan, c, block, [&](int64_t image, int64_t first, int64_t count) {
            load(grad_out, normalizer.after, image, first, count, scratch);
            load(values, normalizer.before, image, first, count, other);
            gradient.add(image, first, count, normalizer.scale, scratch, forward.rows(), other, backward.rows(), pitch);
            if (grad_values.data == nullptr) return;
            const T* before = normalizer.before ? normalizer.before + image * points + first : nullptr;
            kernels.slice(data.places(image, first), before, normalizer.scale, backward.rows(), pitch, count, nullptr,
                          scratch);
            kernels.store(scratch, pitch, width, count,
                          grad_values.data + image * grad_values.batch_stride + c0 * grad_values.channel_stride +
                              first * grad_values.point_stride,
                          grad_values.channel_stride, grad_values.point_stride);
          });
      });
    }
  }
  gradient.finish(normalizer.scale, features, grad_features, parallel);
}

#define DK_INSTANTIATE(T)                                                                                        \
  template const LatticeKernels<T>& lattice_kernels<T>();                                                        \
  template class VertexRows<T>;                                                                                  \
  template struct Normalizer<T>;                                                                                 \
  template class FeatureGradient<T>;                                                                             \
  template class Lattice<T>;                                                                                     \
  template void permutohedral_filter<T>(const Lattice<T>&, int64_t, Strided<const T>, Strided<T>, Normalization, \
                                        LatticeScale, bool, const Parallel&);                                    \
  template void permutohedral_filter_backward<T>(const Lattice<T>&, int64_t, Strided<const T>, Strided<const T>, \
                                                 Strided<const T>, Strided<T>, Strided<T>, Normalization,        \
                                                 LatticeScale, bool, const Parallel&);
DK_INSTANTIATE(float)
DK_INSTANTIATE(double)

}  // namespace deeplab_kernels::cpu
