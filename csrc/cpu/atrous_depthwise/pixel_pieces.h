// How training by pixels is cut into pieces of work, and how threads take them. For the per-instruction-set files only:
// everything here has internal linkage.
#pragma once

#include "isa.h"
#include "pixel_rows.h"

namespace deeplab_kernels::cpu {
namespace {

// Some rows of one image and chunk of channels, in the order in which they are taken.
struct PixelPiece {
  int64_t chunk, image, begin, end;
  int64_t rows() const { return end - begin; }
};

// How the work is cut: a matter of the shape alone, so that sums are the same for any number of threads.
template <typename T>
struct PixelCut {
  using A = acc_t<T>;
  using Channels = typename PixelRows<A>::Channels;
  static constexpr int64_t L = kLanes<A>;
  // Rows of so many channels are short enough for the second-level cache, seven of them in use at a time, and their
  // pixels long enough for memory.
  static constexpr int64_t kChunk = 64;
  static constexpr int64_t kFewestPieces = 32;

  int64_t channel_count, images, row_count, chunks, most, parts;

  PixelCut(const DepthwiseShape& s, int64_t rows) : channel_count(s.channels), images(s.batch), row_count(rows) {
    chunks = larger(1, rounded_up(channel_count, L) / kChunk);
    most = bound(1);
    for (int64_t chunk = 1; chunk < chunks; ++chunk) most = larger(most, bound(chunk + 1) - bound(chunk));
    parts = larger(1, smaller(rows / 4, (kFewestPieces + chunks * images - 1) / (chunks * images)));
    if (rows == 0) images = 0;
  }
  int64_t pieces_of_chunk() const { return images * parts; }
  int64_t pieces() const { return chunks * pieces_of_chunk(); }
  PixelPiece piece(int64_t p) const {
    const int64_t part = p % parts;
    return {p / pieces_of_chunk(), p / parts % images, row_count * part / parts, row_count * (part + 1) / parts};
  }
  Channels channels(int64_t chunk) const {
    const int64_t begin = bound(chunk), end = bound(chunk + 1);
    return {begin * L, end - begin, smaller(end * L, channel_count) - begin * L - L};
  }
  // The first vector of a chunk: one that begins a cache line, where pixels do.
  int64_t bound(int64_t chunk) const {
    const int64_t of_line = Pixels<T>::kVectorsOfLine, all = (channel_count + L - 1) / L;
    return smaller(all, (all + of_line - 1) / of_line * chunk / chunks * of_line);
  }
  // Calls f(lane, its channel).
  template <typename F>
  void each_lane(int64_t chunk, const F& f) const {
    const Channels c = channels(chunk);
    for (int64_t lane = 0; lane < c.vectors * L; ++lane) f(lane, c.first + c.at(lane / L) + lane % L);
  }
};

// The pieces of both passes, and what joins their sums. A thread takes whole chunks where there are enough of them:
// the second pass finds in the caches what the first one read.
template <typename Cut, typename First, typename Join, typename Second, typename JoinSecond>
void run_pieces(const Cut& first_cut, const Cut& second_cut, const Parallel& parallel, const First& first,
                const Join& join, const Second& second, const JoinSecond& join_second) {
  auto of_chunk = [](const Cut& cut, int64_t chunk, const auto& pass) {
    if (cut.pieces() > 0) pass(chunk * cut.pieces_of_chunk(), (chunk + 1) * cut.pieces_of_chunk());
  };
  if (first_cut.chunks >= 2 * parallel.threads()) {
    parallel(first_cut.chunks, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        of_chunk(first_cut, chunk, first), join(chunk);
        of_chunk(second_cut, chunk, second), join_second(chunk);
      }
    });
    return;
  }
  auto each_chunk = [&](const auto& f) {
    parallel(first_cut.chunks, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) f(chunk);
    });
  };
  parallel(first_cut.pieces(), [&](int64_t begin, int64_t end) { first(begin, end); });
  each_chunk(join);
  parallel(second_cut.pieces(), [&](int64_t begin, int64_t end) { second(begin, end); });
  each_chunk(join_second);
}

}  // namespace
}  // namespace deeplab_kernels::cpu
