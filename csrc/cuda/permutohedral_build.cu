// Launches of permutohedral_build.h.
#include "permutohedral_build.h"
#include "permutohedral_calls.h"
#include "sort.h"

namespace deeplab_kernels::cuda {
namespace {

int64_t blocks_of(int64_t count) { return ceil_div(count, kBuildThreads); }

template <int kD>
struct Dimension {
  static constexpr int value = kD;
};

// f(Dimension<d>()) for the dimensions of images (positions, or positions and colours, in 2-D and 3-D),
// f(Dimension<0>()) otherwise.
template <typename F>
void dispatch_dimension(int d, F&& f) {
  switch (d) {
    case 2:
      return f(Dimension<2>());
    case 3:
      return f(Dimension<3>());
    case 5:
      return f(Dimension<5>());
    case 6:
      return f(Dimension<6>());
    default:
      return f(Dimension<0>());
  }
}

template <typename T>
AxisScales<T> axis_scales(int d) {
  AxisScales<T> scales{};
  for (int i = 0; i < d; ++i)
    scales.scale[i] = T(lattice_scale<double>(d, 1.0 / std::sqrt(double(i + 1) * double(i + 2))));
  return scales;
}

uint32_t table_slots(int64_t entries) {
  uint32_t slots = 32;
  while (slots < entries + entries / 2 + 1) slots *= 2;
  return slots;
}

int bit_width(int64_t value) {
  int bits = 1;
  while (value >> bits) ++bits;
  return bits;
}

}  // namespace

template <typename T>
void build_lattice(const Context& context, const LatticeShape& shape, const T* features, const Lattice<T>& lattice) {
  const int d = shape.dimension;
  const int64_t total = shape.total(), entries = shape.entries();
  if (entries == 0) {
    launch("fill", fill<int32_t>, 1, dim3(kBuildThreads), 0, context.stream, lattice.vertices, int64_t(1), 0);
    return;
  }
  const uint32_t slots = table_slots(entries);
  const int64_t number_blocks = ceil_div(entries, kScanThreads * kNumberRounds);
  const int64_t shared = (kScanWarps + 1) * sizeof(int32_t);
  int32_t* code = context.scratch_array<int32_t>(total * d);
  TableSlot* table = context.scratch_array<TableSlot>(slots);
  int32_t* slot = context.scratch_array<int32_t>(entries);
  int32_t* owner = context.scratch_array<int32_t>(entries);
  int32_t* sums = context.scratch_array<int32_t>(number_blocks);
  uint32_t* entry = context.scratch_array<uint32_t>(entries);
  const Simplices simplices{code, shape.points, d};
  const dim3 threads(kBuildThreads);

  launch("fill", fill<TableSlot>, at_most(blocks_of(slots), kVertexBlocks), threads, 0, context.stream, table,
         int64_t(slots), kEmptySlot);
  dispatch_dimension(d, [&](auto dimension) {
    constexpr int kD = decltype(dimension)::value;
    launch("embed_points", embed_points<T, kD>, blocks_of(total), threads, 0, context.stream, features, total,
           shape.points, d, axis_scales<T>(d), code, lattice.weight);
    launch("insert_vertices", insert_vertices<kD>, blocks_of(entries), threads, 0, context.stream, simplices, entries,
           table, slots - 1, slot);
  });
  launch("count_owners", count_owners, number_blocks, dim3(kScanThreads), shared, context.stream, table, slot, entries,
         sums);
  launch("scan_sums", scan_sums, 1, dim3(kScanThreads), shared, context.stream, sums, number_blocks, lattice.vertices);
  launch("number_vertices", number_vertices, number_blocks, dim3(kScanThreads), shared, context.stream, table, slot,
         entries, sums, owner);
  launch("name_vertices", name_vertices, blocks_of(entries), threads, 0, context.stream, table, slot, entries,
         lattice.vertex, entry);
  sort_pairs(context, reinterpret_cast<const uint32_t*>(lattice.vertex), entry,
             reinterpret_cast<uint32_t*>(lattice.list_vertex), reinterpret_cast<uint32_t*>(lattice.list_entry), entries,
             bit_width(entries));
  launch("start_lists", start_lists, blocks_of(entries), threads, 0, context.stream, lattice.list_vertex, entries,
         lattice.vertices, lattice.start);
  const dim3 directions(d + 1, kBuildThreads / (d + 1));
  dispatch_dimension(d, [&](auto dimension) {
    launch("find_neighbours", find_neighbours<decltype(dimension)::value>, vertex_blocks(entries, directions),
           directions, 0, context.stream, simplices, table, slots - 1, owner, lattice.vertices, entries,
           lattice.neighbour);
  });
}

template <typename T>
void run_feature_gradient(const Context& context, const LatticeShape& shape, const T* features,
                          const T* grad_out_weight, const T* grad_in_weight, T* grad_features) {
  const int d = shape.dimension;
  dispatch_dimension(d, [&](auto dimension) {
    launch("feature_gradient", feature_gradient<T, decltype(dimension)::value>, blocks_of(shape.total()),
           dim3(kBuildThreads), 0, context.stream, features, shape.total(), shape.points, d, axis_scales<T>(d),
           grad_out_weight, grad_in_weight, grad_features);
  });
}

template void build_lattice(const Context&, const LatticeShape&, const float*, const Lattice<float>&);
template void build_lattice(const Context&, const LatticeShape&, const double*, const Lattice<double>&);
template void run_feature_gradient(const Context&, const LatticeShape&, const float*, const float*, const float*,
                                   float*);
template void run_feature_gradient(const Context&, const LatticeShape&, const double*, const double*, const double*,
                                   double*);

}  // namespace deeplab_kernels::cuda
