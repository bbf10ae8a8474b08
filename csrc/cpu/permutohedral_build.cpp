// Builds the lattice: each chunk finds its own vertices, then the chunks' vertices are merged image by image. The
// outcome does not depend on how either is spread over threads.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <stdexcept>
#include <utility>

#include "../core/lattice_key.h"
#include "permutohedral_passes.h"

namespace deeplab_kernels::cpu {
namespace {

// Positions below this embed into int32 coordinates.
constexpr double kLargestPosition = 1 << 26;
// Above this, float has too few bits left for the place within a simplex.
constexpr double kLargestFloatPosition = 1 << 10;
constexpr double kLargestPydensecrfCoordinate = (1 << 15) - 1;

// lattice_scale of each axis. The factor common to all axes is rounded first, as in pydensecrf. Whether a vertex exists
// may hang on the last bit of a position, and so may a label: in float the order of operations is pydensecrf's, without
// fused multiply-adds (permutohedral_embed.h).
struct Scales {
  double value[kMaxLatticeDimension];
  explicit Scales(int d) {
    for (int i = 0; i < d; ++i) value[i] = lattice_scale(d, 1.0 / std::sqrt(double(i + 1) * double(i + 2)));
  }
  void round_to_float(int d) {
    const float common = float(std::sqrt(2.0 / 3.0) * (d + 1));
    for (int i = 0; i < d; ++i) value[i] = float(double(common) / std::sqrt(double(i + 1) * double(i + 2)));
  }
};

// Open addressing with the keys in the table; grows before it is half full.
template <typename Key>
class KeyTable {
 public:
  explicit KeyTable(int64_t expected) {
    bits_ = 6;
    while ((int64_t{1} << bits_) < 2 * expected) ++bits_;
    entries_.assign(size_t{1} << bits_, {Key{}, -1});
  }

  // Index of the key, or -1.
  int32_t find(const Key& key) const {
    for (uint64_t h = place(key);; h = (h + 1) & (entries_.size() - 1)) {
      const Entry& entry = entries_[h];
      if (entry.index < 0 || entry.key == key) return entry.index;
    }
  }

  // Index of the key, which becomes `index` if it is new.
  int32_t find_or_insert(const Key& key, int32_t index) {
    for (uint64_t h = place(key);; h = (h + 1) & (entries_.size() - 1)) {
      Entry& entry = entries_[h];
      if (entry.index < 0) {
        entry = {key, index};
        if (2 * ++count_ >= int64_t(entries_.size())) grow();
        return index;
      }
      if (entry.key == key) return entry.index;
    }
  }

  void prefetch(const Key& key) const { __builtin_prefetch(entries_.data() + place(key)); }

 private:
  struct Entry {
    Key key;
    int32_t index;
  };

  uint64_t place(const Key& key) const { return key.hash() >> (64 - bits_); }

  void grow() {
    std::vector<Entry> old(entries_.size() * 2, {Key{}, -1});
    old.swap(entries_);
    ++bits_;
    for (const Entry& entry : old) {
      if (entry.index < 0) continue;
      uint64_t h = place(entry.key);
      while (entries_[h].index >= 0) h = (h + 1) & (entries_.size() - 1);
      entries_[h] = entry;
    }
  }

  std::vector<Entry> entries_;
  int bits_;
  int64_t count_ = 0;
};

// parallel(count, f), where f may run out of memory on any thread.
template <typename F>
void parallel_or_throw(const Parallel& parallel, int64_t count, const F& f) {
  std::atomic<bool> failed{false};
  parallel(count, [&](int64_t begin, int64_t end) {
    try {
      f(begin, end);
    } catch (const std::bad_alloc&) {
      failed = true;
    }
  });
  if (failed) throw std::bad_alloc();
}

// Embeds a chunk's points; returns the keys of its slots.
template <int kWords, typename T>
std::vector<LatticeKey<kWords>> embed_chunk(LatticeData<T>& lattice, const LatticeKeySteps<kWords>& steps,
                                            const Scales& scales, Strided<const T> features, int64_t chunk,
                                            bool precisely) {
  using Key = LatticeKey<kWords>;
  const LatticeKernels<T>& kernels = lattice_kernels<T>();
  const int d = lattice.d;
  std::vector<Key> keys;
  KeyTable<Key> table(2048);
  // Neighbouring points mostly share vertices.
  Key previous[kMaxLatticeDimension + 1];
  int32_t previous_slot[kMaxLatticeDimension + 1];
  for (int k = 0; k <= d; ++k) previous_slot[k] = -1;

  over_blocks(lattice.plan, chunk, kEmbedBlock, [&](int64_t image, int64_t first, int64_t count) {
    int32_t quotient[(kMaxLatticeDimension + 1) * kEmbedBlock], rank[(kMaxLatticeDimension + 1) * kEmbedBlock];
    const int64_t at = (image * lattice.plan.points + first) * (d + 1);
    const EmbedBlock<T> block{features.data + image * features.batch_stride + first * features.point_stride,
                              features.channel_stride,
                              features.point_stride,
                              count,
                              d,
                              scales.value,
                              lattice.weight.data() + at,
                              quotient,
                              rank};
    precisely ? kernels.embed_precisely(block) : kernels.embed(block);
    int32_t* slot = lattice.slot.data() + at;
    for (int64_t p = 0; p < count; ++p, slot += d + 1) {
      Key key = steps.first(quotient + p, kEmbedBlock), next[kMaxLatticeDimension + 2];
      for (int i = 0; i <= d; ++i) next[d + 1 - rank[i * kEmbedBlock + p]] = steps.lower[i];
      for (int k = 0; k <= d; ++k) {
        if (k > 0) key += next[k];
        if (previous_slot[k] < 0 || !(previous[k] == key)) {
          const auto fresh = int32_t(keys.size());
          previous[k] = key;
          previous_slot[k] = table.find_or_insert(key, fresh);
          if (previous_slot[k] == fresh) keys.push_back(key);
        }
        slot[k] = previous_slot[k];
      }
    }
  });
  return keys;
}

// vertices of all chunks -> slot_vertex, vertex_begin, vertex_slots, neighbour.
template <int kWords, typename T>
void merge_chunks(LatticeData<T>& lattice, const LatticeKeySteps<kWords>& steps,
                  std::vector<std::vector<LatticeKey<kWords>>> chunk_keys, const Parallel& parallel) {
  using Key = LatticeKey<kWords>;
  const ChunkPlan& plan = lattice.plan;
  const int d = lattice.d;
  const int64_t chunks = plan.chunks();
  lattice.chunk_begin = Buffer<int64_t>(chunks + 1);
  lattice.chunk_begin[0] = 0;
  for (int64_t c = 0; c < chunks; ++c)
    lattice.chunk_begin[c + 1] = lattice.chunk_begin[c] + int64_t(chunk_keys[c].size());
  const int64_t slots = lattice.chunk_begin[chunks];
  if (slots >= std::numeric_limits<int32_t>::max() - 1)
    throw std::length_error("the lattice has 2^31 or more vertices");
  Buffer<Key> keys(slots);
  parallel(chunks, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      std::copy(chunk_keys[c].begin(), chunk_keys[c].end(), keys.data() + lattice.chunk_begin[c]);
      chunk_keys[c] = {};
    }
  });

  // Each (image, part of the hashes) has a table of the first slot with each key.
  const int64_t parts =
      std::max<int64_t>(1, std::min<int64_t>(16, parallel.threads() / std::max<int64_t>(1, plan.batch)));
  const auto part_of = [parts](const Key& key) {
    return parts == 1 ? 0 : int64_t((key.hash() & 0xffffffff) * uint64_t(parts) >> 32);
  };
  std::vector<KeyTable<Key>> tables;
  for (int64_t i = 0; i < plan.batch * parts; ++i)
    tables.emplace_back(slots / std::max<int64_t>(1, plan.batch * parts) / 2);
  Buffer<int32_t> first_slot(slots);
  parallel_or_throw(parallel, plan.batch * parts, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / parts, part = task % parts;
      const int64_t from = lattice.chunk_begin[image * plan.chunks_per_image];
      const int64_t to = lattice.chunk_begin[(image + 1) * plan.chunks_per_image];
      KeyTable<Key>& table = tables[task];
      for (int64_t s = from; s < to; ++s) {
        if (s + 8 < to) table.prefetch(keys[s + 8]);
        if (part_of(keys[s]) == part) first_slot[s] = table.find_or_insert(keys[s], int32_t(s));
      }
    }
  });

  // Vertices in the order of their first slots, and their slots.
  lattice.slot_vertex = Buffer<int32_t>(slots);
  std::vector<int32_t> count;
  std::vector<int32_t> vertex_slot;
  count.reserve(size_t(slots)), vertex_slot.reserve(size_t(slots));
  for (int64_t s = 0; s < slots; ++s) {
    if (first_slot[s] == s) {
      lattice.slot_vertex[s] = int32_t(count.size());
      count.push_back(1);
      vertex_slot.push_back(int32_t(s));
    } else {
      lattice.slot_vertex[s] = lattice.slot_vertex[first_slot[s]];
      ++count[lattice.slot_vertex[s]];
    }
  }
  const int64_t vertices = lattice.vertices = int64_t(count.size());
  lattice.vertex_begin = Buffer<int32_t>(vertices + 1);
  lattice.vertex_slots = Buffer<int32_t>(slots);
  int32_t sum = 0;
  for (int64_t v = 0; v < vertices; ++v) {
    lattice.vertex_begin[v] = sum;
    sum += count[v];
    count[v] = lattice.vertex_begin[v];
  }
  lattice.vertex_begin[vertices] = sum;
  for (int64_t s = 0; s < slots; ++s) lattice.vertex_slots[count[lattice.slot_vertex[s]]++] = int32_t(s);

  lattice.neighbour = Buffer<int32_t>((d + 1) * vertices * 2);
  parallel(lattice.neighbour.size(), [&](int64_t begin, int64_t end) {
    std::fill(lattice.neighbour.data() + begin, lattice.neighbour.data() + end, int32_t(vertices));
  });
  parallel(vertices, [&](int64_t begin, int64_t end) {
    // Some vertices at a time, so that the table's cache misses overlap.
    constexpr int64_t kTogether = 8;
    Key next[kTogether * (kMaxLatticeDimension + 1)];
    const KeyTable<Key>* where[kTogether * (kMaxLatticeDimension + 1)];
    int64_t image = 0;
    for (int64_t v0 = begin; v0 < end; v0 += kTogether) {
      const int64_t last = std::min(v0 + kTogether, end);
      int at = 0;
      for (int64_t v = v0; v < last; ++v) {
        const int32_t s = vertex_slot[v];
        while (s >= lattice.chunk_begin[(image + 1) * plan.chunks_per_image]) ++image;
        for (int j = 0; j <= d; ++j, ++at) {
          next[at] = steps.neighbour(keys[s], j);
          where[at] = &tables[image * parts + part_of(next[at])];
          where[at]->prefetch(next[at]);
        }
      }
      at = 0;
      for (int64_t v = v0; v < last; ++v)
        for (int j = 0; j <= d; ++j, ++at) {
          const int32_t found = where[at]->find(next[at]);
          if (found < 0) continue;
          // Each vertex is the next of at most one other: no two threads write the same place.
          const int64_t u = lattice.slot_vertex[found];
          lattice.neighbour[(j * vertices + v) * 2 + 1] = int32_t(u);
          lattice.neighbour[(j * vertices + u) * 2] = int32_t(v);
        }
    }
  });
}

template <int kWords, typename T>
void build(LatticeData<T>& lattice, const LatticeKeyLayout& layout, const Scales& scales, Strided<const T> features,
           bool precisely, const Parallel& parallel) {
  const LatticeKeySteps<kWords> steps(layout);
  std::vector<std::vector<LatticeKey<kWords>>> chunk_keys(size_t(lattice.plan.chunks()));
  parallel_or_throw(parallel, lattice.plan.chunks(), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) chunk_keys[c] = embed_chunk(lattice, steps, scales, features, c, precisely);
  });
  merge_chunks<kWords>(lattice, steps, std::move(chunk_keys), parallel);
}

struct Bounds {
  double low[kMaxLatticeDimension], high[kMaxLatticeDimension];
};

// Extends [low, high] by `count` values; NaN or an infinity makes it infinite for good.
template <typename T>
void add_bounds(const T* in, int64_t stride, int64_t count, double* low, double* high) {
  constexpr int64_t kLanes = 8;
  T least[kLanes], most[kLanes], wrong[kLanes];
  for (int64_t l = 0; l < kLanes; ++l) least[l] = most[l] = in[0], wrong[l] = T(0);
  for (int64_t p = 0; p < count; p += kLanes)
    for (int64_t l = 0; l < kLanes; ++l) {
      const T value = in[std::min(p + l, count - 1) * stride];
      least[l] = value < least[l] ? value : least[l];
      most[l] = value > most[l] ? value : most[l];
      wrong[l] += value - value;  // NaN for NaN and infinities
    }
  for (int64_t l = 0; l < kLanes; ++l) {
    *low = std::min<double>(*low, least[l]);
    *high = std::max<double>(*high, most[l]);
  }
  for (int64_t l = 0; l < kLanes; ++l)
    if (wrong[l] != T(0))
      *low = -std::numeric_limits<double>::infinity(), *high = std::numeric_limits<double>::infinity();
}

// Smallest and largest feature of each axis; NaN or an infinity becomes infinite bounds.
template <typename T>
Bounds find_bounds(int64_t batch, int d, int64_t points, Strided<const T> features, const Parallel& parallel) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  constexpr int64_t kPiece = 8192;
  const int64_t pieces = (points + kPiece - 1) / kPiece;
  std::vector<Bounds> of_piece(size_t(batch * pieces));
  parallel(batch * pieces, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t image = piece / pieces, first = piece % pieces * kPiece;
      Bounds& bounds = of_piece[size_t(piece)];
      for (int i = 0; i < d; ++i) {
        bounds.low[i] = kInfinity, bounds.high[i] = -kInfinity;
        const T* in = features.data + image * features.batch_stride + i * features.channel_stride;
        add_bounds(in + first * features.point_stride, features.point_stride, std::min(kPiece, points - first),
                   &bounds.low[i], &bounds.high[i]);
      }
    }
  });
  Bounds all;
  for (int i = 0; i < d; ++i) {
    all.low[i] = kInfinity, all.high[i] = -kInfinity;
    for (const Bounds& b : of_piece) {
      all.low[i] = std::min(all.low[i], b.low[i]);
      all.high[i] = std::max(all.high[i], b.high[i]);
    }
  }
  return all;
}

template <typename T>
FeatureProblem find_problem(int64_t batch, int d, int64_t points, Strided<const T> features, const Bounds& bounds) {
  const Scales scales(d);
  bool good = true;
  for (int i = 0; i < d; ++i)
    good &= std::max(std::abs(bounds.low[i]), std::abs(bounds.high[i])) * scales.value[i] < kLargestPosition;
  if (good) return {};
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t p = 0; p < points; ++p)
      for (int i = 0; i < d; ++i) {
        const double value =
            features.data[b * features.batch_stride + i * features.channel_stride + p * features.point_stride];
        const double limit = kLargestPosition / scales.value[i];
        if (!std::isfinite(value)) return {FeatureProblem::kNotFinite, b, i, p, limit};
        if (!(std::abs(value) < limit)) return {FeatureProblem::kTooLarge, b, i, p, limit};
      }
  return {};
}

// Bound of the vertices' coordinates, whose neighbours' included; low and high are of each axis' positions.
double largest_coordinate(int d, const double* low, const double* high) {
  double bound = 0, tail = 0;
  for (int i = d; i > 0; --i) {
    const double reach = std::max(std::abs(low[i - 1]), std::abs(high[i - 1]));
    bound = std::max(bound, tail + i * reach);
    tail += reach;
  }
  return std::max(bound, tail) + 2 * (d + 1);
}

}  // namespace

ChunkPlan::ChunkPlan(int64_t batch, int64_t points, int64_t row) : batch(batch), points(points), row(row) {
  if (points == 0) {
    this->batch = 0;
    return;
  }
  // Few, so that few vertices lie in several; enough for the threads of a large machine where there is much to do.
  const int64_t wanted = std::clamp<int64_t>((points + 15) / 16, 2048, 131072);
  if (row < 2 * kSegment || row >= points) {
    this->row = points;
    chunk_width = (wanted + kSegment - 1) / kSegment * kSegment;
  } else {
    // About square.
    const int64_t side = std::max<int64_t>(1, int64_t(std::lround(std::sqrt(double(wanted)) / kSegment)));
    chunk_width = std::min(side * kSegment, row);
    chunk_height = std::max<int64_t>(1, wanted / chunk_width);
  }
  across = (this->row + chunk_width - 1) / chunk_width;
  const int64_t rows = (points + this->row - 1) / this->row;
  chunks_per_image = across * ((rows + chunk_height - 1) / chunk_height);
}

template <typename T>
FeatureProblem find_feature_problem(int64_t batch, int d, int64_t points, Strided<const T> features,
                                    const Parallel& parallel) {
  return find_problem(batch, d, points, features, find_bounds(batch, d, points, features, parallel));
}

template <typename T>
LatticeData<T> build_lattice(int64_t batch, int d, int64_t points, int64_t row, Strided<const T> features,
                             Embedding embedding, FeatureProblem* problem, const Parallel& parallel) {
  LatticeData<T> lattice;
  const Bounds bounds = find_bounds(batch, d, points, features, parallel);
  *problem = find_problem(batch, d, points, features, bounds);
  lattice.d = d;
  if (problem->kind == FeatureProblem::kNone) lattice.plan = ChunkPlan(batch, points, row);
  const int64_t total = lattice.plan.batch * lattice.plan.points;
  lattice.weight = Buffer<T>(total * (d + 1));
  lattice.slot = Buffer<int32_t>(total * (d + 1));
  Scales scales(d);
  double low[kMaxLatticeDimension] = {}, high[kMaxLatticeDimension] = {}, largest = 0;
  for (int i = 0; i < d; ++i) {
    if (total == 0) break;
    low[i] = bounds.low[i] * scales.value[i];
    high[i] = bounds.high[i] * scales.value[i];
    largest = std::max({largest, std::abs(low[i]), std::abs(high[i])});
  }
  const LatticeKeyLayout layout = LatticeKeyLayout::make(d, low, high);
  const bool in_float = embedding == Embedding::kPydensecrf
                            ? largest_coordinate(d, low, high) <= kLargestPydensecrfCoordinate
                            : largest <= kLargestFloatPosition;
  const bool precisely = !in_float || sizeof(T) == sizeof(double);
  if (!precisely) scales.round_to_float(d);
  if (layout.words == 1) {
    build<1>(lattice, layout, scales, features, precisely, parallel);
  } else if (layout.words == 2) {
    build<2>(lattice, layout, scales, features, precisely, parallel);
  } else if (layout.words <= 4) {
    build<4>(lattice, layout, scales, features, precisely, parallel);
  } else {
    build<kMaxLatticeKeyWords>(lattice, layout, scales, features, precisely, parallel);
  }
  return lattice;
}

#define DK_INSTANTIATE(T)                                                                                    \
  template FeatureProblem find_feature_problem<T>(int64_t, int, int64_t, Strided<const T>, const Parallel&); \
  template LatticeData<T> build_lattice<T>(int64_t, int, int64_t, int64_t, Strided<const T>, Embedding,      \
                                           FeatureProblem*, const Parallel&);
DK_INSTANTIATE(float)
DK_INSTANTIATE(double)

}  // namespace deeplab_kernels::cpu
