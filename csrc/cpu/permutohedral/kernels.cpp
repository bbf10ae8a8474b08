// Inner loops over rows of channels. Apart from lattice_kernels() everything has internal linkage.
#include "isa.h"
#include "rows.h"

namespace deeplab_kernels::cpu {
namespace DK_ISA {
namespace {

template <typename T>
struct Kernels {
  static void load(const T* values, int64_t channel_stride, int64_t point_stride, int64_t channels, int64_t pitch,
                   int64_t count, T sign, T pad, T* rows) {
    for (int64_t c0 = 0; c0 < pitch; c0 += kPack) {
      const int64_t width = channels - c0 < kPack ? channels - c0 : kPack;
      int64_t p = 0;
      if (point_stride == 1 && pitch > 1) {
        for (; p + kPack <= count; p += kPack) {
          Pack<T> v[kPack];
          for (int i = 0; i < kPack; ++i)
            v[i] = i < width ? load_pack(values + (c0 + i) * channel_stride + p) * sign : broadcast(pad);
          transpose(v);
          for (int i = 0; i < kPack; ++i) store_pack(rows + (p + i) * pitch + c0, v[i]);
        }
      }
      for (; p < count; ++p) {
        T* row = rows + p * pitch + c0;
        if (channel_stride == 1 && width == kPack) {
          store_pack(row, load_pack(values + c0 + p * point_stride) * sign);
          continue;
        }
        for (int64_t i = 0; i < width; ++i) row[i] = sign * values[(c0 + i) * channel_stride + p * point_stride];
        for (int64_t i = width; i < kPack && pitch > 1; ++i) row[i] = pad;
      }
    }
  }

  static void store(const T* rows, int64_t pitch, int64_t channels, int64_t count, T* values, int64_t channel_stride,
                    int64_t point_stride) {
    if (channel_stride == 1 && point_stride == channels && pitch > 1)
      return store_densely(rows, pitch, channels, count, values);
    for (int64_t c0 = 0; c0 < channels; c0 += kPack) {
      const int64_t width = channels - c0 < kPack ? channels - c0 : kPack;
      int64_t p = 0;
      if (point_stride == 1 && pitch > 1) {
        for (; p + kPack <= count; p += kPack) {
          Pack<T> v[kPack];
          for (int i = 0; i < kPack; ++i) v[i] = load_pack(rows + (p + i) * pitch + c0);
          transpose(v);
          for (int i = 0; i < kPack; ++i)
            if (i < width) store_pack(values + (c0 + i) * channel_stride + p, v[i]);
        }
      }
      for (; p < count; ++p)
        for (int64_t i = 0; i < width; ++i)
          values[(c0 + i) * channel_stride + p * point_stride] = rows[p * pitch + c0 + i];
    }
  }

  static void splat(const PointPlaces<T>& places, const T* point_scale, const T* rows, int64_t pitch, int64_t count,
                    T* vertex_rows) {
    over_simplex(places.vertices, [&](auto simplex) DK_INLINE_LAMBDA {
      over_row(pitch, [&](auto packs, int64_t offset) DK_INLINE_LAMBDA {
        using R = Row<T, packs.value>;
        const int vertices = simplex.value ? simplex.value : places.vertices;
        const int32_t* row_of = places.row;
        const T* weight = places.weight;
        // Neighbouring pixels often share a simplex. Where its rows fit the registers, they stay there meanwhile.
        if constexpr (simplex.value * packs.value > 0 && simplex.value * packs.value <= 9) {
          R sum[simplex.value];
          int32_t at[simplex.value];
          for (int64_t p = 0; p < count; ++p, row_of += vertices, weight += vertices) {
            bool same = p > 0;
            for (int k = 0; k < simplex.value && p > 0; ++k) same &= row_of[k] == at[k];
            if (!same) {
              for (int k = 0; k < simplex.value && p > 0; ++k) sum[k].store(vertex_rows + at[k] * pitch + offset);
              for (int k = 0; k < simplex.value; ++k) {
                at[k] = row_of[k];
                sum[k] = R::load(vertex_rows + at[k] * pitch + offset);
              }
            }
            R row = R::load(rows + p * pitch + offset);
            if (point_scale) row.scale(point_scale[p]);
            for (int k = 0; k < simplex.value; ++k) add_scaled(sum[k], weight[k], row);
          }
          for (int k = 0; k < simplex.value && count > 0; ++k) sum[k].store(vertex_rows + at[k] * pitch + offset);
          return;
        }
        for (int64_t p = 0; p < count; ++p, row_of += vertices, weight += vertices) {
          R row = R::load(rows + p * pitch + offset);
          if (point_scale) row.scale(point_scale[p]);
          for (int k = 0; k < vertices; ++k) {
            T* to = vertex_rows + row_of[k] * pitch + offset;
            R sum = R::load(to);
            add_scaled(sum, weight[k], row);
            sum.store(to);
          }
        }
      });
    });
  }

  static void slice(const PointPlaces<T>& places, const T* point_scale, T factor, const T* vertex_rows, int64_t pitch,
                    int64_t count, const T* base, T* rows) {
    over_simplex(places.vertices, [&](auto simplex) DK_INLINE_LAMBDA {
      over_row(pitch, [&](auto packs, int64_t offset) DK_INLINE_LAMBDA {
        using R = Row<T, packs.value>;
        const int vertices = simplex.value ? simplex.value : places.vertices;
        const int32_t* row_of = places.row;
        const T* weight = places.weight;
        for (int64_t p = 0; p < count; ++p, row_of += vertices, weight += vertices) {
          R sum = R::zero();
          for (int k = 0; k < vertices; ++k) sum.add(weight[k], vertex_rows + row_of[k] * pitch + offset);
          sum.scale(point_scale ? factor * point_scale[p] : factor);
          if (base) sum.add(base + p * pitch + offset);
          sum.store(rows + p * pitch + offset);
        }
      });
    });
  }

  static void merge(const int32_t* vertex, const int32_t* begin, const int32_t* copy, const T* copies, int64_t first,
                    int64_t last, int64_t pitch, T* rows) {
    over_row(pitch, [&](auto packs, int64_t offset) DK_INLINE_LAMBDA {
      using R = Row<T, packs.value>;
      const int32_t end = begin[last];
      for (int64_t i = first; i < last; ++i) {
        R sum = R::load(rows + vertex[i] * pitch + offset);
        if (i + 8 < last) prefetch_row<packs.value>(rows + vertex[i + 8] * pitch + offset);
        for (int32_t j = begin[i]; j < begin[i + 1]; ++j) {
          if (j + 8 < end) prefetch_row<packs.value>(copies + copy[j + 8] * pitch + offset);
          sum.add(copies + copy[j] * pitch + offset);
        }
        sum.store(rows + vertex[i] * pitch + offset);
      }
    });
  }

  static void share(const int32_t* vertex, const T* rows, int64_t first, int64_t last, int64_t pitch, T* copies) {
    over_row(pitch, [&](auto packs, int64_t offset) DK_INLINE_LAMBDA {
      for (int64_t i = first; i < last; ++i) {
        if (i + 16 < last) prefetch_row<packs.value>(rows + vertex[i + 16] * pitch + offset);
        Row<T, packs.value>::load(rows + vertex[i] * pitch + offset).store(copies + i * pitch + offset);
      }
    });
  }

  static void blur(const int32_t* neighbours, const T* in, int64_t first, int64_t last, int64_t pitch, T* out) {
    over_row(pitch, [&](auto packs, int64_t offset) DK_INLINE_LAMBDA {
      using R = Row<T, packs.value>;
      for (int64_t v = first; v < last; ++v) {
        if (v + 8 < last) {
          prefetch_row<packs.value>(in + neighbours[2 * v + 16] * pitch + offset);
          prefetch_row<packs.value>(in + neighbours[2 * v + 17] * pitch + offset);
        }
        R sum = R::load(in + neighbours[2 * v] * pitch + offset);
        sum.add(in + neighbours[2 * v + 1] * pitch + offset);
        sum.scale(T(0.5));
        sum.add(in + v * pitch + offset);
        sum.store(out + v * pitch + offset);
      }
    });
  }

  static void softmax(const T* energy, int64_t pitch, int64_t count, T* q) {
    over_row_at_once(
        pitch,
        [&](auto packs) DK_INLINE_LAMBDA {
          constexpr int kTogether = packs.value < 4 ? 4 : 2;
          int64_t p = 0;
          for (; p + kTogether <= count; p += kTogether)
            short_softmax<packs.value, kTogether>(energy + p * pitch, q + p * pitch);
          for (; p < count; ++p) short_softmax<packs.value, 1>(energy + p * pitch, q + p * pitch);
        },
        [&] {
          for (int64_t p = 0; p < count; ++p) {
            const T* from = energy + p * pitch;
            T* to = q + p * pitch;
            Pack<T> most = load_pack(from), total{};
            for (int64_t c = kPack; c < pitch; c += kPack) {
              const Pack<T> e = load_pack(from + c);
              most = e > most ? e : most;
            }
            most = largest_of<T>(most);
            for (int64_t c = 0; c < pitch; c += kPack) {
              const Pack<T> e = exp_of(load_pack(from + c) - most);
              total += e;
              store_pack(to + c, e);
            }
            const Pack<T> inverse = broadcast(T(1) / sum_of<T>(total));
            for (int64_t c = 0; c < pitch; c += kPack) store_pack(to + c, load_pack(to + c) * inverse);
          }
        });
  }

  static void softmax_backward(const T* q, int64_t pitch, int64_t count, T* grad) {
    for (int64_t p = 0; p < count; ++p, q += pitch, grad += pitch) {
      Pack<T> total{};
      for (int64_t c = 0; c < pitch; c += kPack) total += load_pack(q + c) * load_pack(grad + c);
      const Pack<T> mean = broadcast(sum_of<T>(total));
      for (int64_t c = 0; c < pitch; c += kPack) store_pack(grad + c, load_pack(q + c) * (load_pack(grad + c) - mean));
    }
  }

  static void add_diagonal(const T* diagonal, T factor, const T* other, int64_t pitch, int64_t count, T* rows) {
    for (int64_t p = 0; p < count; ++p)
      for (int64_t c = 0; c < pitch; ++c) rows[p * pitch + c] += factor * diagonal[c] * other[p * pitch + c];
  }

  static void add_product(const T* matrix_t, T factor, const T* other, int64_t channels, int64_t pitch, int64_t count,
                          T* rows) {
    over_row(pitch, [&](auto packs, int64_t offset) DK_INLINE_LAMBDA {
      using R = Row<T, packs.value>;
      for (int64_t p = 0; p < count; ++p) {
        R sum = R::zero();
        for (int64_t c = 0; c < channels; ++c) sum.add(other[p * pitch + c], matrix_t + c * pitch + offset);
        sum.scale(factor);
        sum.add(rows + p * pitch + offset);
        sum.store(rows + p * pitch + offset);
      }
    });
  }

  static void add_outer(const T* a, const T* b, T factor, int64_t channels, int64_t pitch, int64_t count, T* matrix) {
    over_row(pitch, [&](auto packs, int64_t offset) DK_INLINE_LAMBDA {
      using R = Row<T, packs.value>;
      for (int64_t c = 0; c < channels; ++c) {
        R sum = R::zero();
        for (int64_t p = 0; p < count; ++p) sum.add(a[p * pitch + c], b + p * pitch + offset);
        sum.scale(factor);
        sum.add(matrix + c * pitch + offset);
        sum.store(matrix + c * pitch + offset);
      }
    });
  }

  static void weight_gradient(const PointPlaces<T>& places, T factor, const T* a, const T* vertex_a, const T* b,
                              const T* vertex_b, int64_t pitch, int64_t count, T* grad_weight, T* sum_x, T* sum_y) {
    for (int64_t p = 0; p < count; ++p) sum_x[p] = sum_y[p] = T(0);
    over_row(pitch, [&](auto packs, int64_t offset) DK_INLINE_LAMBDA {
      using R = Row<T, packs.value>;
      const int32_t* row_of = places.row;
      const T* weight = places.weight;
      T* grad = grad_weight;
      for (int64_t p = 0; p < count;
           ++p, row_of += places.vertices, weight += places.vertices, grad += places.vertices) {
        const R row_a = R::load(a + p * pitch + offset), row_b = R::load(b + p * pitch + offset);
        T x_sum = T(0), y_sum = T(0);
        for (int k = 0; k < places.vertices; ++k) {
          const int64_t at = row_of[k] * pitch + offset;
          const T x = factor * row_a.dot(vertex_a + at), y = factor * row_b.dot(vertex_b + at);
          grad[k] += x + y;
          x_sum += weight[k] * x, y_sum += weight[k] * y;
        }
        sum_x[p] += x_sum, sum_y[p] += y_sum;
      }
    });
  }

 private:
  // Point after point, without gaps: what the last pack of a row has too many the next rows overwrite.
  static void store_densely(const T* rows, int64_t pitch, int64_t channels, int64_t count, T* values) {
    for (int64_t p = 0; p < count; ++p, rows += pitch, values += channels) {
      int64_t c = 0;
      for (; c < channels && c + kPack <= channels * (count - p); c += kPack)
        store_pack(values + c, load_pack(rows + c));
      for (; c < channels; ++c) values[c] = rows[c];
    }
  }

  template <int kPacks>
  DK_INLINE static void prefetch_row(const T* row) {
    // Rows begin at multiples of 32 bytes, or hold one element.
    constexpr int kBytes = (kPacks ? kPacks * kPack : 1) * int(sizeof(T));
    for (int i = 0; i + 64 <= kBytes; i += 64) __builtin_prefetch(reinterpret_cast<const char*>(row) + i);
    __builtin_prefetch(reinterpret_cast<const char*>(row) + kBytes - 1);
  }

  // Rows that stay in registers. One row's chain of dependent steps is long: several rows fill each other's gaps.
  template <int kPacks, int kRows>
  DK_INLINE static void short_softmax(const T* energy, T* q) {
    using R = Row<T, kPacks>;
    R row[kRows];
    Pack<T> most[kRows], total[kRows];
    for (int r = 0; r < kRows; ++r) {
      row[r] = R::load(energy + r * kPacks * kPack);
      most[r] = row[r].v[0];
      for (int i = 1; i < kPacks; ++i) most[r] = row[r].v[i] > most[r] ? row[r].v[i] : most[r];
    }
    for (int r = 0; r < kRows; ++r) most[r] = largest_of<T>(most[r]), total[r] = Pack<T>{};
    for (int i = 0; i < kPacks; ++i)
      for (int r = 0; r < kRows; ++r) {
        row[r].v[i] = exp_of(row[r].v[i] - most[r]);
        total[r] += row[r].v[i];
      }
    for (int r = 0; r < kRows; ++r) {
      row[r].scale(T(1) / sum_of<T>(total[r]));
      row[r].store(q + r * kPacks * kPack);
    }
  }

  template <int kPacks>
  DK_INLINE static void add_scaled(Row<T, kPacks>& sum, T factor, const Row<T, kPacks>& row) {
    if constexpr (kPacks == 0) {
      sum.v += factor * row.v;
    } else {
      const Pack<T> f = broadcast(factor);
      for (int i = 0; i < kPacks; ++i) sum.v[i] += f * row.v[i];
    }
  }

  DK_INLINE static Pack<double> exp_of(Pack<double> x) {
    Pack<double> r;
    for (int i = 0; i < kPack; ++i) r[i] = __builtin_exp(x[i]);
    return r;
  }

  // x is not above 0 here. Below -88, about the logarithm of the smallest normal number: 0. Relative error: 2e-7
  // plus what rounding x to a float may do.
  DK_INLINE static Pack<float> exp_of(Pack<float> x) {
    typedef int32_t Integers __attribute__((vector_size(kPack * 4)));
    const Pack<float> least = broadcast(-88.0f), clamped = x > least ? x : least;
    // 2^(n + r), n an integer: adding 1.5 * 2^23 rounds to one, which with 127 stands in the low bits: the exponent. At
    // -88 it is 0, and the power 0.
    const Pack<float> shifted = clamped * 1.44269504f + (12582912.0f + 127.0f);
    const Pack<float> r = clamped * 1.44269504f - (shifted - (12582912.0f + 127.0f));
    Pack<float> y = broadcast(1.32647273e-3f);
    y = y * r + 9.67151299e-3f;
    y = y * r + 5.55073358e-2f;
    y = y * r + 2.40222424e-1f;
    y = y * r + 6.93147004e-1f;
    y = y * r + 1.0f;
    return y * reinterpret_cast<Pack<float>>(reinterpret_cast<Integers>(shifted) << 23);
  }
};

template <typename T>
constexpr LatticeKernels<T> kTable = {
    embed<T>,
    embed_precisely<T>,
    Kernels<T>::load,
    Kernels<T>::store,
    Kernels<T>::splat,
    Kernels<T>::slice,
    Kernels<T>::merge,
    Kernels<T>::share,
    Kernels<T>::blur,
    Kernels<T>::softmax,
    Kernels<T>::softmax_backward,
    Kernels<T>::add_diagonal,
    Kernels<T>::add_product,
    Kernels<T>::add_outer,
    Kernels<T>::weight_gradient,
};

}  // namespace

template <typename T>
const LatticeKernels<T>& lattice_kernels() {
  return kTable<T>;
}
template const LatticeKernels<float>& lattice_kernels<float>();
template const LatticeKernels<double>& lattice_kernels<double>();

}  // namespace DK_ISA
}  // namespace deeplab_kernels::cpu
