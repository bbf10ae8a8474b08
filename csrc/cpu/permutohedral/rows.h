// Rows of channels in registers, and loops over them whose counts the compiler knows. For the per-instruction-set files
// only: everything here has internal linkage.
#pragma once

#include <cstdint>

#define DK_INLINE inline __attribute__((always_inline))
#define DK_INLINE_LAMBDA __attribute__((always_inline))

namespace deeplab_kernels::cpu {
namespace DK_ISA {
namespace {

constexpr int kPack = 8;

template <typename T>
struct PackOf {
  typedef T type __attribute__((vector_size(kPack * sizeof(T))));
  typedef T unaligned __attribute__((vector_size(kPack * sizeof(T)), aligned(alignof(T)), may_alias));
};
template <typename T>
using Pack = typename PackOf<T>::type;

template <typename T>
DK_INLINE Pack<T> load_pack(const T* p) {
  return *reinterpret_cast<const typename PackOf<T>::unaligned*>(p);
}
template <typename T>
DK_INLINE void store_pack(T* p, Pack<T> v) {
  *reinterpret_cast<typename PackOf<T>::unaligned*>(p) = v;
}
template <typename T>
DK_INLINE Pack<T> broadcast(T value) {
  return value - Pack<T>{};
}
template <typename T>
DK_INLINE T sum_of(Pack<T> v) {
  v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
  v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5);
  return v[0] + v[1];
}
// In every element.
template <typename T>
DK_INLINE Pack<T> largest_of(Pack<T> v) {
  const Pack<T> halves = __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
  v = v > halves ? v : halves;
  const Pack<T> quarters = __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5);
  v = v > quarters ? v : quarters;
  const Pack<T> pairs = __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6);
  return v > pairs ? v : pairs;
}

// Eight packs as the rows of a matrix.
template <typename V>
DK_INLINE void transpose(V* v) {
  V a[8];
  for (int i = 0; i < 4; ++i) {
    a[2 * i] = __builtin_shufflevector(v[2 * i], v[2 * i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
    a[2 * i + 1] = __builtin_shufflevector(v[2 * i], v[2 * i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      v[i + j] = __builtin_shufflevector(a[i + j], a[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      v[i + j + 2] = __builtin_shufflevector(a[i + j], a[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  for (int i = 0; i < 4; ++i) {
    const V low = __builtin_shufflevector(v[i], v[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    v[i + 4] = __builtin_shufflevector(v[i], v[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    v[i] = low;
  }
}

// kPacks packs of a row in registers; kPacks = 0: a row of one element.
template <typename T, int kPacks>
struct Row {
  Pack<T> v[kPacks];
  DK_INLINE static Row zero() { return Row{}; }
  DK_INLINE static Row load(const T* p) {
    Row r;
    for (int i = 0; i < kPacks; ++i) r.v[i] = load_pack(p + i * kPack);
    return r;
  }
  DK_INLINE void store(T* p) const {
    for (int i = 0; i < kPacks; ++i) store_pack(p + i * kPack, v[i]);
  }
  DK_INLINE void add(const T* p) {
    for (int i = 0; i < kPacks; ++i) v[i] += load_pack(p + i * kPack);
  }
  DK_INLINE void add(T factor, const T* p) {
    const Pack<T> f = broadcast(factor);
    for (int i = 0; i < kPacks; ++i) v[i] += f * load_pack(p + i * kPack);
  }
  DK_INLINE void scale(T factor) {
    const Pack<T> f = broadcast(factor);
    for (int i = 0; i < kPacks; ++i) v[i] *= f;
  }
  DK_INLINE T dot(const T* p) const {
    Pack<T> s{};
    for (int i = 0; i < kPacks; ++i) s += v[i] * load_pack(p + i * kPack);
    return sum_of<T>(s);
  }
};
template <typename T>
struct Row<T, 0> {
  T v;
  DK_INLINE static Row zero() { return {T(0)}; }
  DK_INLINE static Row load(const T* p) { return {*p}; }
  DK_INLINE void store(T* p) const { *p = v; }
  DK_INLINE void add(const T* p) { v += *p; }
  DK_INLINE void add(T factor, const T* p) { v += factor * *p; }
  DK_INLINE void scale(T factor) { v *= factor; }
  DK_INLINE T dot(const T* p) const { return v * *p; }
};

template <int kPacks>
struct Packs {
  static constexpr int value = kPacks;
};

// Calls f(Packs<n>, offset) for groups of at most four packs of a row.
template <typename F>
DK_INLINE void over_row(int64_t pitch, const F& f) {
  if (pitch == 1) return f(Packs<0>(), int64_t(0));
  int64_t offset = 0;
  for (; pitch - offset > 4 * kPack; offset += 4 * kPack) f(Packs<4>(), offset);
  switch ((pitch - offset) / kPack) {
    case 1:
      return f(Packs<1>(), offset);
    case 2:
      return f(Packs<2>(), offset);
    case 3:
      return f(Packs<3>(), offset);
    default:
      return f(Packs<4>(), offset);
  }
}

// Calls f(Packs<n>) where a row of n packs fits the registers, else g().
template <typename F, typename G>
DK_INLINE void over_row_at_once(int64_t pitch, const F& f, const G& g) {
  switch (pitch / kPack) {
    case 1:
      return f(Packs<1>());
    case 2:
      return f(Packs<2>());
    case 3:
      return f(Packs<3>());
    case 4:
      return f(Packs<4>());
    default:
      return g();
  }
}

// Calls f(Packs<n>) with the number of vertices of a simplex if it is a common one (d = 2, 3, 5), else 0.
template <typename F>
DK_INLINE void over_simplex(int vertices, const F& f) {
  switch (vertices) {
    case 3:
      return f(Packs<3>());
    case 4:
      return f(Packs<4>());
    case 6:
      return f(Packs<6>());
    default:
      return f(Packs<0>());
  }
}

}  // namespace
}  // namespace DK_ISA
}  // namespace deeplab_kernels::cpu
