// Storage types and 16-byte (or narrower) packs of elements: loads and stores in the storage type, arithmetic in the
// accumulation type (double for double, float otherwise).
#pragma once

#include <cstring>

#include "../core/atrous_depthwise.h"
#include "launch.h"

namespace deeplab_kernels::cuda {

template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <typename T>
using acc_t = typename Accumulate<T>::type;

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ double widen(double v) { return v; }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
__device__ __forceinline__ T narrow(acc_t<T> v);
template <>
__device__ __forceinline__ float narrow<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ double narrow<double>(double v) {
  return v;
}
template <>
__device__ __forceinline__ __half narrow<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// Elements in 16 bytes.
template <typename T>
constexpr int kVector = 16 / int(sizeof(T));

template <int kBytes>
struct RawBytes;
template <>
struct RawBytes<16> {
  using type = uint4;
};
template <>
struct RawBytes<8> {
  using type = uint2;
};

// V elements as they lie in memory: one load, still to be converted.
template <typename T, int V>
using Raw = typename RawBytes<V* int(sizeof(T))>::type;

template <typename A, int V>
struct Pack {
  A v[V];
};

template <typename T, int V>
__device__ __forceinline__ Raw<T, V> load_raw(const T* aligned) {
  return __ldg(reinterpret_cast<const Raw<T, V>*>(aligned));
}

// __stwb is a plain store that the compiler may not split into narrower ones.
template <typename T, int V>
__device__ __forceinline__ void store_raw(T* aligned, const Raw<T, V>& raw) {
  __stwb(reinterpret_cast<Raw<T, V>*>(aligned), raw);
}

template <typename T, int V>
__device__ __forceinline__ Pack<acc_t<T>, V> unpack(const Raw<T, V>& raw) {
  T elements[V];
  memcpy(elements, &raw, sizeof(raw));
  Pack<acc_t<T>, V> pack;
#pragma unroll
  for (int e = 0; e < V; ++e) pack.v[e] = widen(elements[e]);
  return pack;
}

template <typename T, int V>
__device__ __forceinline__ Raw<T, V> pack_raw(const Pack<acc_t<T>, V>& pack) {
  T elements[V];
#pragma unroll
  for (int e = 0; e < V; ++e) elements[e] = narrow<T>(pack.v[e]);
  Raw<T, V> raw;
  memcpy(&raw, elements, sizeof(raw));
  return raw;
}

// A pack of which only elements [first, last) exist. A full one of an aligned address is one memory access.
struct Part {
  int first, last;
  bool aligned;

  template <int V>
  __device__ __forceinline__ bool whole() const {
    return aligned && first == 0 && last == V;
  }
};

// Missing elements read as zero.
template <typename T, int V>
__device__ __forceinline__ Pack<acc_t<T>, V> load_part(const T* address, Part part) {
  if (part.whole<V>()) return unpack<T, V>(load_raw<T, V>(address));
  Pack<acc_t<T>, V> pack;
#pragma unroll
  for (int e = 0; e < V; ++e) pack.v[e] = e >= part.first && e < part.last ? widen(address[e]) : acc_t<T>(0);
  return pack;
}

template <typename T, int V>
__device__ __forceinline__ void store_part(T* address, const Pack<acc_t<T>, V>& pack, Part part) {
  if (part.whole<V>()) {
    store_raw<T, V>(address, pack_raw<T, V>(pack));
    return;
  }
#pragma unroll
  for (int e = 0; e < V; ++e)
    if (e >= part.first && e < part.last) address[e] = narrow<T>(pack.v[e]);
}

inline bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

DK_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
DK_HOST_DEVICE constexpr int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }
DK_HOST_DEVICE constexpr int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace deeplab_kernels::cuda
