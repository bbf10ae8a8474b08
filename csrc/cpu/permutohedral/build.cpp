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

#include "../../core/lattice_key.h"
#include "bounds.h"
#include "passes.h"
#include "table.h"

namespace deeplab_kernels::cpu {
namespace {

// Above this, float has too few bits left for the place within a simplex.
constexpr double kLargestFloatPosition = 1 << 10;
constexpr double kLargestPydensecrfCoordinate = (1 << 15) - 1;

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

// The keys of the vertices around points that are embedded, (count, d + 1), and their hashes. kDimension: d where it is
// known, else 0.
template <int kWords, int kDimension>
void find_keys(const LatticeKeySteps<kWords>& steps, const int32_t* quotient, const int32_t* rank, int64_t count,
               LatticeKey<kWords>* keys, uint64_t* hashes) {
  const int d = kDimension ? kDimension : steps.layout.d;
  for (int64_t p = 0; p < count; ++p) {
    LatticeKey<kWords> key = steps.template first<kDimension>(quotient + p, kEmbedBlock);
    LatticeKey<kWords> next[(kDimension ? kDimension : kMaxLatticeDimension) + 2];
    for (int i = 0; i <= d; ++i) next[d + 1 - rank[i * kEmbedBlock + p]] = steps.lower[i];
    for (int k = 0; k <= d; ++k) {
      if (k > 0) key += next[k];
      *keys++ = key;
      *hashes++ = key.hash();
    }
  }
}

// Embeds a chunk's points; returns the keys of its slots. The table is empty.
template <int kWords, int kDimension, typename T>
std::vector<LatticeKey<kWords>> embed_chunk(LatticeData<T>& lattice, const LatticeKeySteps<kWords>& steps,
                                            const Scales& scales, Strided<const T> features, int64_t chunk,
                                            bool precisely, KeyTable<LatticeKey<kWords>>& table) {
  using Key = LatticeKey<kWords>;
  constexpr int kMost = (kDimension ? kDimension : kMaxLatticeDimension) + 1;
  // Several points' keys come before their look-ups, whose branches are hard to predict.
  constexpr int64_t kTogether = kEmbedBlock / kWords;
  const LatticeKernels<T>& kernels = lattice_kernels<T>();
  const int d = lattice.d;
  std::vector<Key> keys;
  keys.reserve(8192);
  int32_t quotient[kMost * kEmbedBlock], rank[kMost * kEmbedBlock];
  Key together[kMost * kTogether];
  uint64_t hashes[kMost * kTogether];

  over_blocks(lattice.plan, chunk, kEmbedBlock, [&](int64_t image, int64_t first, int64_t count) {
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
    int32_t* slot = lattice.row.data() + at;
    for (int64_t p = 0; p < count; p += kTogether) {
      const int64_t points = std::min(kTogether, count - p);
      find_keys<kWords, kDimension>(steps, quotient + p, rank + p, points, together, hashes);
      for (int64_t i = 0; i < points * (d + 1); ++i, ++slot) {
        const auto fresh = int32_t(keys.size());
        *slot = table.find_or_insert(together[i], hashes[i], fresh);
        if (*slot == fresh) keys.push_back(together[i]);
      }
    }
  });
  return keys;
}

// copy_vertex and the copies of each vertex, in the order of the chunks.
template <typename T>
void set_copies(LatticeData<T>& lattice, const std::vector<int32_t>& copy_vertex) {
  const auto copies = int64_t(copy_vertex.size());
  lattice.copy_vertex = Buffer<int32_t>(copies), lattice.shared_copy = Buffer<int32_t>(copies);
  std::copy(copy_vertex.begin(), copy_vertex.end(), lattice.copy_vertex.data());
  std::vector<int32_t> at(size_t(lattice.vertices), 0);  // the number of copies, then where the next one goes
  int64_t shared = 0;
  for (const int32_t v : copy_vertex) shared += at[size_t(v)]++ == 0;
  lattice.shared_vertex = Buffer<int32_t>(shared), lattice.shared_begin = Buffer<int32_t>(shared + 1);
  int32_t i = 0, sum = 0;
  for (int32_t v = 0; v < int32_t(lattice.vertices); ++v) {
    const int32_t count = at[size_t(v)];
    if (count == 0) continue;
    lattice.shared_vertex[i] = v, lattice.shared_begin[i++] = at[size_t(v)] = sum;
    sum += count;
  }
  lattice.shared_begin[shared] = sum;
  for (int32_t c = 0; c < int32_t(copies); ++c) lattice.shared_copy[at[size_t(copy_vertex[size_t(c)])]++] = c;
}

// The first slot with each key, by image and part of the hashes, so that threads can fill and read the tables.
template <typename Key>
struct SlotTables {
  int64_t parts;
  std::vector<KeyTable<Key>> tables;
  std::vector<KeyFilter> filters;

  SlotTables(int64_t batch, int64_t threads)
      : parts(std::clamp<int64_t>(threads / std::max<int64_t>(1, batch), 1, 16)),
        tables(size_t(batch * parts)),
        filters(size_t(batch * parts)) {}
  int64_t part_of(uint64_t hash) const { return int64_t((hash & 0xffffffff) * uint64_t(parts) >> 32); }
  int64_t table_of(int64_t image, uint64_t hash) const { return image * parts + part_of(hash); }

  // Enters the slots of a table's image, [from, to), whose hashes are in its part. first_slot: the first with the key.
  void fill(int64_t table, const Buffer<Key>& keys, const Buffer<uint64_t>& hashes, int64_t from, int64_t to,
            const Buffer<int32_t>& first_slot) {
    const int64_t expected = (to - from) / parts * 3 / 4, part = table % parts;
    KeyTable<Key> slots(expected);
    KeyFilter filter(expected);
    for (int64_t s = from; s < to; ++s) {
      if (s + 8 < to && part_of(hashes[s + 8]) == part) slots.prefetch(hashes[s + 8]);
      if (part_of(hashes[s]) != part) continue;
      first_slot[s] = slots.find_or_insert(keys[s], hashes[s], int32_t(s));
      filter.insert(hashes[s]);
    }
    tables[size_t(table)] = std::move(slots), filters[size_t(table)] = std::move(filter);
  }
};

// Sets the neighbours of the vertices [begin, end), which have the keys of their first slots.
template <int kWords, typename T>
void find_neighbours(LatticeData<T>& lattice, const LatticeKeySteps<kWords>& steps,
                     const SlotTables<LatticeKey<kWords>>& slots, const Buffer<LatticeKey<kWords>>& keys,
                     const std::vector<int64_t>& chunk_begin, const Buffer<int32_t>& vertex_slot,
                     const Buffer<int32_t>& slot_row, int64_t begin, int64_t end) {
  // Some vertices at a time and in steps, so that the caches' misses overlap. About half of the neighbours do not
  // exist.
  constexpr int64_t kTogether = 32;
  struct Candidate {
    LatticeKey<kWords> key;
    uint64_t hash;
    int64_t table;
    int32_t vertex, direction, slot;
  };
  Candidate candidates[kTogether * (kMaxLatticeDimension + 1)];
  // Keeps the candidates for which keep(candidate) is true.
  const auto filter = [&](int count, const auto& keep) {
    int kept = 0;
    for (int i = 0; i < count; ++i) {
      const bool stays = keep(candidates[i]);
      candidates[kept] = candidates[i];
      kept += stays;
    }
    return kept;
  };
  int64_t image = 0;
  for (int64_t v0 = begin; v0 < end; v0 += kTogether) {
    int count = 0;
    for (int64_t v = v0; v < std::min(v0 + kTogether, end); ++v) {
      const LatticeKey<kWords> key = keys[vertex_slot[v]];
      const LatticeKey<kWords>* to_neighbours = steps.to_neighbours(key);
      while (vertex_slot[v] >= chunk_begin[size_t((image + 1) * lattice.plan.chunks_per_image)]) ++image;
      for (int j = 0; j <= lattice.d; ++j) {
        Candidate& c = candidates[count++];
        c.key = key;
        c.key += to_neighbours[j];
        c.hash = c.key.hash();
        c.table = slots.table_of(image, c.hash);
        c.vertex = int32_t(v), c.direction = j;
        slots.filters[size_t(c.table)].prefetch(c.hash);
      }
    }
    count = filter(count, [&](const Candidate& c) { return slots.filters[size_t(c.table)].may_have(c.hash); });
    for (int i = 0; i < count; ++i) slots.tables[size_t(candidates[i].table)].prefetch(candidates[i].hash);
    count = filter(count, [&](Candidate& c) {
      c.slot = slots.tables[size_t(c.table)].find(c.key, c.hash);
      __builtin_prefetch(slot_row.data() + c.slot);
      return c.slot >= 0;
    });
    for (int i = 0; i < count; ++i) {
      const int32_t v = candidates[i].vertex, u = slot_row[candidates[i].slot];
      int32_t* neighbour = lattice.neighbour.data() + candidates[i].direction * lattice.vertices * 2;
      // Each vertex is the next of at most one other: no two threads write the same place.
      neighbour[int64_t{2} * v + 1] = u;
      neighbour[int64_t{2} * u] = v;
    }
  }
}

// The chunks' slots -> vertices, copies, neighbours.
template <int kWords, typename T>
void merge_chunks(LatticeData<T>& lattice, const LatticeKeySteps<kWords>& steps,
                  std::vector<std::vector<LatticeKey<kWords>>> chunk_keys, const Parallel& parallel) {
  using Key = LatticeKey<kWords>;
  const ChunkPlan& plan = lattice.plan;
  const int d = lattice.d;
  const int64_t chunks = plan.chunks();
  std::vector<int64_t> chunk_begin(size_t(chunks) + 1);
  for (size_t c = 0; c < chunk_keys.size(); ++c) chunk_begin[c + 1] = chunk_begin[c] + int64_t(chunk_keys[c].size());
  const int64_t slots = chunk_begin.back();
  if (slots >= std::numeric_limits<int32_t>::max() - 1)
    throw std::length_error("the lattice has 2^31 or more vertices");
  Buffer<Key> keys(slots);
  Buffer<uint64_t> hashes(slots);
  parallel(chunks, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      int64_t s = chunk_begin[size_t(c)];
      for (const Key& key : chunk_keys[size_t(c)]) keys[s] = key, hashes[s++] = key.hash();
      chunk_keys[size_t(c)] = {};
    }
  });
  SlotTables<Key> tables(plan.batch, parallel.threads());
  Buffer<int32_t> first_slot(slots);
  parallel_or_throw(parallel, int64_t(tables.tables.size()), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t image = t / tables.parts;
      tables.fill(t, keys, hashes, chunk_begin[size_t(image * plan.chunks_per_image)],
                  chunk_begin[size_t((image + 1) * plan.chunks_per_image)], first_slot);
    }
  });

  // Vertices in the order of their first slots; the other slots become copies, in slot_row -1 - c meanwhile.
  Buffer<int32_t> slot_row(slots), vertex_slot(slots);
  lattice.chunk_vertex = Buffer<int32_t>(chunks + 1), lattice.chunk_copy = Buffer<int32_t>(chunks + 1);
  std::vector<int32_t> copy_vertex;
  int32_t vertices = 0;
  for (int64_t c = 0; c < chunks; ++c) {
    lattice.chunk_vertex[c] = vertices, lattice.chunk_copy[c] = int32_t(copy_vertex.size());
    for (int64_t s = chunk_begin[c]; s < chunk_begin[c + 1]; ++s) {
      if (first_slot[s] == s) {
        vertex_slot[vertices] = int32_t(s);
        slot_row[s] = vertices++;
      } else {
        slot_row[s] = -1 - int32_t(copy_vertex.size());
        copy_vertex.push_back(slot_row[first_slot[s]]);
      }
    }
  }
  lattice.vertices = vertices;
  lattice.chunk_vertex[chunks] = vertices, lattice.chunk_copy[chunks] = int32_t(copy_vertex.size());
  set_copies(lattice, copy_vertex);
  parallel(chunks, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      int32_t* row_of_slot = slot_row.data() + chunk_begin[c];
      for (int64_t s = 0; s < chunk_begin[c + 1] - chunk_begin[c]; ++s)
        if (row_of_slot[s] < 0) row_of_slot[s] = vertices - row_of_slot[s];
      over_blocks(plan, c, kEmbedBlock, [&](int64_t image, int64_t first, int64_t count) {
        int32_t* row = lattice.row.data() + (image * plan.points + first) * (d + 1);
        for (int64_t i = 0; i < count * (d + 1); ++i) row[i] = row_of_slot[row[i]];
      });
    }
  });

  lattice.neighbour = Buffer<int32_t>(int64_t{2} * (d + 1) * vertices);
  parallel(lattice.neighbour.size(), [&](int64_t begin, int64_t end) {
    std::fill(lattice.neighbour.data() + begin, lattice.neighbour.data() + end, vertices);
  });
  parallel(vertices, [&](int64_t begin, int64_t end) {
    find_neighbours(lattice, steps, tables, keys, chunk_begin, vertex_slot, slot_row, begin, end);
  });
}

// embed_chunk for all chunks; the keys of their slots.
template <int kWords, typename T>
std::vector<std::vector<LatticeKey<kWords>>> embed_chunks(LatticeData<T>& lattice, const LatticeKeySteps<kWords>& steps,
                                                          const Scales& scales, Strided<const T> features,
                                                          bool precisely, const Parallel& parallel) {
  using Key = LatticeKey<kWords>;
  std::vector<std::vector<Key>> keys(size_t(lattice.plan.chunks()));
  auto embed = embed_chunk<kWords, 0, T>;
  if constexpr (kWords == 1) {
    if (lattice.d == 2) embed = embed_chunk<kWords, 2, T>;
    if (lattice.d == 5) embed = embed_chunk<kWords, 5, T>;
  }
  parallel_or_throw(parallel, lattice.plan.chunks(), [&](int64_t begin, int64_t end) {
    KeyTable<Key> table(2048);
    for (int64_t c = begin; c < end; ++c) {
      if (c > begin) table.clear();
      keys[size_t(c)] = embed(lattice, steps, scales, features, c, precisely, table);
    }
  });
  return keys;
}

template <int kWords, typename T>
void build(LatticeData<T>& lattice, const LatticeKeyLayout& layout, const Scales& scales, Strided<const T> features,
           bool precisely, const Parallel& parallel) {
  const LatticeKeySteps<kWords> steps(layout);
  merge_chunks<kWords>(lattice, steps, embed_chunks<kWords>(lattice, steps, scales, features, precisely, parallel),
                       parallel);
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
  lattice.row = Buffer<int32_t>(total * (d + 1));
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
