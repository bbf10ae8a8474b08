// Fetching ahead of the passes over planes (NCHW). For the per-instruction-set files only.
#pragma once

#include "isa.h"
#include "plane_packing.h"

namespace deeplab_kernels::cpu {
namespace {

template <typename T, bool kNhwc>
class PlaneFetch : public PlanePacking<T, kNhwc> {
  using Base = PlanePacking<T, kNhwc>;

 protected:
  using Base::Base;
  using Base::L, Base::s_, Base::cut_, Base::first_, Base::pieces, Base::piece, Base::fresh_inputs, Base::finished,
      Base::band, Base::inputs_of;

  // Memory that will be wanted soon, fetched by the loops over tiles a few lines with every vector: more at once would
  // have to wait for one another. The first is as large as x, the second as large as the results.
  struct Ahead {
    const char *at = nullptr, *end = nullptr;
    const char* next(int64_t bytes) {
      if (at >= end) return nullptr;
      const char* begin = at;
      at += bytes;
      return begin;
    }
  };
  // The part for a tile of R rows.
  template <int R, int kStride>
  struct Fetch {
    const char *x = nullptr, *result = nullptr;
    DK_INLINE void operator()(int64_t k) const {
      if constexpr (!kNhwc) {
        constexpr int kBytes = R * int(sizeof(T));
        if (x) lines<kBytes * kStride * kStride>(x, k);
        if (result) lines<kBytes>(result, k);
      }
    }
    template <int kBytes>
    DK_INLINE static void lines(const char* from, int64_t k) {
#pragma GCC unroll 16
      for (int l = 0; l < (kBytes * L + 63) / 64; ++l) __builtin_prefetch(from + k * kBytes + l * 64);
    }
  };
  template <int R, int kStride>
  DK_INLINE Fetch<R, kStride> next_fetch(int64_t tiles) const {
    if constexpr (kNhwc) return {};
    const int64_t bytes = tiles * R * int64_t(sizeof(T));
    return {ahead_[0].next(bytes * kStride * s_.in_w), ahead_[1].next(bytes * s_.out_w)};
  }
  // Of image n.
  void aim(int which, const T* tensor, int64_t channel, int64_t n, IndexRange rows, int64_t height,
           int64_t width) const {
    if (channel >= s_.channels || tensor == nullptr) return;
    auto at = [&](int64_t row) {
      return reinterpret_cast<const char*>(tensor + ((n * s_.channels + channel) * height + row) * width);
    };
    ahead_[which] = {at(rows.begin), at(rows.end)};
  }
  // What is worked on after piece i of image n: the next piece, image or channel.
  struct Place {
    int64_t channel, image, piece;
  };
  Place following(int64_t n, int64_t i) const {
    if (i + 1 < pieces()) return {first_, n, i + 1};
    if (n + 1 < s_.batch) return {first_, n + 1, 0};
    return {first_ + 1, 0, 0};
  }
  void fetch_for_forward(const T* x, int64_t n, int64_t i, const T* out) const {
    if (kNhwc || !cut_.resident) return;
    const Place next = following(n, i);
    aim(0, x, next.channel, next.image, fresh_inputs(next.piece), s_.in_h, s_.in_w);
    if (n == 0 && i + 1 == pieces()) aim(1, out, first_, 0, piece(0), s_.out_h, s_.out_w);
  }
  // What the next task reads and writes.
  void fetch_for_inference(int64_t task, const T* x, const T* out) const {
    if (kNhwc) return;
    const int64_t channel = task / (cut_.bands * s_.batch), n = task / cut_.bands % s_.batch;
    const IndexRange rows = band(task % cut_.bands, s_.out_h);
    aim(0, x, channel, n, inputs_of(rows), s_.in_h, s_.in_w);
    aim(1, out, channel, n, rows, s_.out_h, s_.out_w);
  }
  void fetch_for_sums(const BackwardTensors<T>& z, int64_t n, int64_t i) const {
    if (kNhwc) return;
    const Place next = following(n, i);
    if (next.channel != first_) return aim(0, z.grad_x, first_, 0, finished(0), s_.in_h, s_.in_w);
    aim_at_inputs(z, next);
  }
  void fetch_for_gradients(const BackwardTensors<T>& z, int64_t n, int64_t i) const {
    if (kNhwc) return;
    const Place next = following(n, i);
    if (next.channel != first_) return aim_at_inputs(z, next);
    aim(0, z.grad_x, first_, next.image, finished(next.piece), s_.in_h, s_.in_w);
  }
  void aim_at_inputs(const BackwardTensors<T>& z, const Place& at) const {
    aim(0, z.x, at.channel, at.image, fresh_inputs(at.piece), s_.in_h, s_.in_w);
    aim(1, z.grad_out, at.channel, at.image, piece(at.piece), s_.out_h, s_.out_w);
  }

  mutable Ahead ahead_[2];
};

}  // namespace
}  // namespace deeplab_kernels::cpu
