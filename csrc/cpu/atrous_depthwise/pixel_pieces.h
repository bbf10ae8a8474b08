// How training by pixels is cut into pieces of work, and how threads take them. For the per-instruction-set files only:
// everything here has internal linkage.
#pragma once

#include "isa.h"
#include "pixel_rows.h"

namespace deeplab_kernels::cpu {
namespace {

// Some rows of one image, tile of columns and chunk of channels, in the order in which they are taken.
struct PixelPiece {
  int64_t chunk, image, tile, begin, end;
  int64_t rows() const { return end - begin; }
};

DK_INLINE int64_t count_of(const IndexRange& range) { return range.end - range.begin; }

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

  // Tiles of the columns of x with the results that read them, or of those of the results with what they read of x:
  // neighbouring tiles share some of that.
  enum class Tiles { kOfX, kOfResults };
  // Of these channels, or about half as many and so on, in tiles of columns as wide as rows in use fit half of the
  // second-level cache: long parts of a pixel, if not whole pixels, so that memory is read and written in its order.
  static constexpr int64_t kMostChannels = 768;
  static constexpr int64_t kTileBytes = 224 << 10;

  DepthwiseShape s;
  int64_t channel_count, images, row_count, tiles, chunks, most, parts;
  Tiles tiles_of;

  static PixelCut tiled(const DepthwiseShape& s, int64_t rows, Tiles of) {
    const int64_t whole = of == Tiles::kOfX ? s.in_w : s.out_w, stride = s.stride_w;
    for (int64_t width = smaller(s.channels, kMostChannels);; width /= 2) {
      const int64_t held = kTileBytes / (width * int64_t(sizeof(A)));  // columns of all rows in use
      const int64_t columns = of == Tiles::kOfX ? (held * stride - 6 * s.rate_w) / (3 + 2 * stride)
                                                : (held - 3 * (2 * s.rate_w + 1)) / (3 * stride + 1);
      if (columns >= smaller(whole, larger(8, 8 * s.rate_w)))
        return PixelCut(s, rows, width, (whole + columns - 1) / columns, of);
      if (width <= kChunk) return PixelCut(s, rows, kChunk, 1, of);
    }
  }

  // width: channels of a chunk, about.
  PixelCut(const DepthwiseShape& shape, int64_t rows, int64_t width = kChunk, int64_t tile_count = 1,
           Tiles of = Tiles::kOfX)
      : s(shape), channel_count(s.channels), images(s.batch), row_count(rows), tiles(tile_count), tiles_of(of) {
    chunks = larger(1, rounded_up(channel_count, L) / width);
    most = bound(1);
    for (int64_t chunk = 1; chunk < chunks; ++chunk) most = larger(most, bound(chunk + 1) - bound(chunk));
    const int64_t maps = chunks * images * tiles;
    parts = larger(1, smaller(rows / 4, (kFewestPieces + maps - 1) / maps));
    if (rows == 0) images = 0;
  }
  int64_t pieces_of_chunk() const { return images * tiles * parts; }
  int64_t pieces() const { return chunks * pieces_of_chunk(); }
  PixelPiece piece(int64_t p) const {
    const int64_t part = p % parts, map = p / parts;
    return {p / pieces_of_chunk(), map / tiles % images, map % tiles, row_count * part / parts,
            row_count * (part + 1) / parts};
  }
  // Columns of a tile; of x those of whole strides.
  IndexRange x(int64_t tile) const {
    if (tiles == 1) return {0, s.in_w};
    if (tiles_of == Tiles::kOfX) {
      const int64_t steps = (s.in_w + s.stride_w - 1) / s.stride_w;
      return {steps * tile / tiles * s.stride_w, smaller(s.in_w, steps * (tile + 1) / tiles * s.stride_w)};
    }
    const IndexRange read = results(tile);
    const int64_t begin = smaller(s.in_w, larger(0, read.begin * s.stride_w - s.pad_left));
    return {begin, larger(begin, smaller(s.in_w, (read.end - 1) * s.stride_w - s.pad_left + 2 * s.rate_w + 1))};
  }
  IndexRange results(int64_t tile) const {
    if (tiles == 1) return {0, s.out_w};
    if (tiles_of == Tiles::kOfResults) return {s.out_w * tile / tiles, s.out_w * (tile + 1) / tiles};
    const IndexRange columns = x(tile);
    const int64_t first = larger(0, columns.begin + s.pad_left - 2 * s.rate_w);
    const int64_t begin = smaller(s.out_w, (first + s.stride_w - 1) / s.stride_w);
    return {begin, larger(begin, smaller(s.out_w, (columns.end - 1 + s.pad_left) / s.stride_w + 1))};
  }
  // At most, of a tile.
  int64_t x_columns() const {
    int64_t columns = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) columns = larger(columns, count_of(x(tile)));
    return columns;
  }
  int64_t result_columns() const {
    int64_t columns = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) columns = larger(columns, count_of(results(tile)));
    return columns;
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

// The pieces of both passes, and what joins their sums. A thread takes whole chunks where there are enough of them, the
// same in both passes: the second one finds in the caches what the first one read.
template <typename Cut, typename First, typename Join, typename Second, typename JoinSecond>
void run_pieces(const Cut& first_cut, const Cut& second_cut, const Parallel& parallel, const First& first,
                const Join& join, const Second& second, const JoinSecond& join_second) {
  auto of_chunk = [](const Cut& cut, int64_t chunk, const auto& pass) {
    if (cut.pieces() > 0) pass(chunk * cut.pieces_of_chunk(), (chunk + 1) * cut.pieces_of_chunk());
  };
  if (first_cut.chunks >= 2 * parallel.threads() && first_cut.chunks == second_cut.chunks) {
    parallel(first_cut.chunks, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        of_chunk(first_cut, chunk, first), join(chunk);
        of_chunk(second_cut, chunk, second), join_second(chunk);
      }
    });
    return;
  }
  auto each_chunk = [&](const Cut& cut, const auto& f) {
    parallel(cut.chunks, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) f(chunk);
    });
  };
  parallel(first_cut.pieces(), [&](int64_t begin, int64_t end) { first(begin, end); });
  each_chunk(first_cut, join);
  parallel(second_cut.pieces(), [&](int64_t begin, int64_t end) { second(begin, end); });
  each_chunk(second_cut, join_second);
}

}  // namespace
}  // namespace deeplab_kernels::cpu
