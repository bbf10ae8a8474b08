// Embeds points into the lattice, kPack at a time.
//
// Products and sums are rounded one by one, in the order of operations of lattice_simplex: that order is pydensecrf's,
// and with it float features fall into the same simplices to the last bit.
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

#include "../../core/permutohedral.h"
#include "isa.h"

namespace deeplab_kernels::cpu {
namespace DK_ISA {
namespace {

constexpr int kPack = 8;

// lattice_simplex for kPack points at a time, in E.
template <typename T, typename E>
struct Embedding {
  typedef T Unaligned __attribute__((vector_size(kPack * sizeof(T)), aligned(alignof(T)), may_alias));
  typedef E Float __attribute__((vector_size(kPack * sizeof(E))));
  using Index = decltype(Float{} < Float{});

  static void run(const EmbedBlock<T>& block) {
    switch (block.d) {
      case 2:
        return run<2>(block);
      case 3:
        return run<3>(block);
      case 5:
        return run<5>(block);
      default:
        return run<0>(block);
    }
  }

 private:
  template <int kDimension>
  static void run(const EmbedBlock<T>& block) {
    constexpr int kMost = (kDimension ? kDimension : kMaxLatticeDimension) + 1;
    const int d = kDimension ? kDimension : block.d;
    const E size = E(d + 1), down = E(1) / size;
    for (int64_t p0 = 0; p0 < block.count; p0 += kPack) {
      const int64_t count = block.count - p0 < kPack ? block.count - p0 : kPack;
      Float elevated[kMost], tail{};
      for (int i = d; i > 0; --i) {
        const T* from = block.features + (i - 1) * block.channel_stride + p0 * block.point_stride;
        Float value{};
        if (count == kPack && block.point_stride == 1) {
          value = __builtin_convertvector(*reinterpret_cast<const Unaligned*>(from), Float);
        } else {
          for (int64_t p = 0; p < count; ++p) value[p] = E(from[p * block.point_stride]);
        }
        value *= E(block.scale[i - 1]);
        elevated[i] = tail - E(i) * value;
        tail += value;
      }
      elevated[0] = tail;

      Index quotient[kMost], rank[kMost], sum{};
      Float residual[kMost];
      for (int i = 0; i <= d; ++i) {
        const Float scaled = elevated[i] * down;
        Index floor = __builtin_convertvector(scaled, Index);
        floor += scaled < __builtin_convertvector(floor, Float);
        const Float below = __builtin_convertvector(floor, Float) * size, above = below + size;
        const Index up = (above - elevated[i]) < (elevated[i] - below);
        quotient[i] = floor - up;
        sum += quotient[i];
        residual[i] = elevated[i] - (up ? above : below);
        rank[i] = Index{} + i;
      }
      for (int i = 0; i < d; ++i)
        for (int j = i + 1; j <= d; ++j) {
          const Index less = residual[i] < residual[j];
          rank[i] -= less;
          rank[j] += less;
        }
      for (int i = 0; i <= d; ++i) {
        rank[i] += sum;
        const Index low = rank[i]<0, high = rank[i]> d;
        rank[i] += ((d + 1) & low) - ((d + 1) & high);
        quotient[i] -= low - high;
        residual[i] = (residual[i] + ((low ? -size : Float{}) + (high ? size : Float{}))) * down;
      }
      // Vertex k's weight: the residual of rank d - k less that of rank d + 1 - k.
      Float sorted[kMost];
      for (int r = 0; r <= d; ++r) {
        sorted[r] = Float{};
        for (int i = 0; i <= d; ++i) sorted[r] += rank[i] == r ? residual[i] : Float{};
      }
      T* weight = block.weight + p0 * (d + 1);
      for (int k = 0; k <= d; ++k) {
        const Float w = k == 0 ? sorted[d] + (E(1) - sorted[0]) : sorted[d - k] - sorted[d + 1 - k];
        for (int64_t p = 0; p < count; ++p) weight[p * (d + 1) + k] = T(w[p]);
      }
      for (int i = 0; i <= d; ++i)
        for (int p = 0; p < kPack; ++p) {
          block.quotient[i * kEmbedBlock + p0 + p] = int32_t(quotient[i][p]);
          block.rank[i * kEmbedBlock + p0 + p] = int32_t(rank[i][p]);
        }
    }
  }
};

}  // namespace

template <typename T>
void embed(const EmbedBlock<T>& block) {
  Embedding<T, T>::run(block);
}
template <typename T>
void embed_precisely(const EmbedBlock<T>& block) {
  Embedding<T, double>::run(block);
}
template void embed<float>(const EmbedBlock<float>&);
template void embed<double>(const EmbedBlock<double>&);
template void embed_precisely<float>(const EmbedBlock<float>&);
template void embed_precisely<double>(const EmbedBlock<double>&);

}  // namespace DK_ISA
}  // namespace deeplab_kernels::cpu
