// Mean-field inference of the fully connected CRF (Kraehenbuehl, Koltun 2011) over permutohedral lattices, on the CPU.
//
//   Q_0 = softmax(-U)      E_t = -U - sum_m C_m F_m Q_{t-1}      Q_t = softmax(E_t)
//
// F_m is the normalised filter of kernel m (the point itself included) and C_m a (labels, labels) matrix that contains
// the kernel's weight: Potts with weight w is C = -w I. Float and double.
#pragma once

#include <memory>

#include "../permutohedral/permutohedral.h"

namespace deeplab_kernels::cpu {

template <typename T>
struct PairwiseKernel {
  Lattice<T> lattice;
  Normalization normalization = Normalization::kSymmetric;
  // (labels, labels), row-major: E_i -= sum_j compatibility[i][j] (F Q)_j. Multiples of the identity and diagonal
  // matrices are recognised and cost less.
  const T* compatibility = nullptr;
};

template <typename T>
struct MeanFieldProblem {
  int64_t batch = 0, labels = 0, points = 0;
  Strided<const T> unary;           // (batch, labels, points)
  const T* packed_unary = nullptr;  // in place of unary: (batch, points, row) as pack_unary writes them; not copied
  const uint8_t* mask = nullptr;    // (batch, points), contiguous; points with 0 send and receive nothing. Null: all 1
  const PairwiseKernel<T>* kernels = nullptr;  // lattices of the same batch, points and row
  int kernel_count = 0;
  LatticeScale scale = LatticeScale::kExactSum;
};

// Where a step writes what it has; null where it is not wanted.
template <typename T>
struct MeanFieldOutput {
  Strided<T> energy;  // E_t: the logits of Q_t, (batch, labels, points)
  Strided<T> q;       // Q_t
};

// Writes `count` rows of packed_channels(labels): -U of the points first, first + 1, ... of an image whose unary
// energies are (labels, points); padding is -infinity.
template <typename T>
void pack_unary(Strided<const T> unary, int64_t labels, int64_t first, int64_t count, T* rows);

// Inference step by step; mean_field() below does it at once. The unary energies, the mask, the kernels' matrices, the
// problem's array of kernels and `parallel` must outlive it.
template <typename T>
class MeanField {
 public:
  MeanField(const MeanFieldProblem<T>& problem, const Parallel& parallel);
  ~MeanField();
  MeanField(MeanField&&) noexcept;
  MeanField& operator=(MeanField&&) noexcept;

  // Q_0. energy is -U. saved, if given, receives Q_0 as rows of packed_channels(labels), (batch, points, row).
  void start(const MeanFieldOutput<T>& output = {}, T* saved = nullptr);
  // Continues from this Q instead, (batch, labels, points).
  void set_q(Strided<const T> q);
  // One iteration, from the Q of the last call. With more = false it prepares no further step: only start() and set_q()
  // may follow.
  void step(const MeanFieldOutput<T>& output = {}, bool more = true, T* saved = nullptr);

  // out = F_m q and out = C_m F_m q: what the energies and the KL divergence are made of. Independent of the above.
  void filter(int m, Strided<const T> q, Strided<T> out);
  void pairwise(int m, Strided<const T> q, Strided<T> out);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// Called after each iteration t = 1 ... iterations; may throw.
using MeanFieldProgress = void (*)(void* context, int64_t t);

// Elements of `saved` below: Q_0 ... Q_{iterations - 1} as rows of packed_channels(labels),
// (iterations, batch, points, row).
int64_t mean_field_saved_size(int64_t batch, int64_t labels, int64_t points, int64_t iterations);

// Writes E_T and Q_T of the last iteration (of the 0th: -U and softmax(-U)); saved may be null.
template <typename T>
void mean_field(const MeanFieldProblem<T>& problem, int64_t iterations, const MeanFieldOutput<T>& output, T* saved,
                const Parallel& parallel, MeanFieldProgress progress = nullptr, void* progress_context = nullptr);

// What the backward pass reads and writes; null where absent or unwanted.
template <typename T>
struct MeanFieldGradients {
  Strided<const T> grad_energy;                // (batch, labels, points): of E_T
  const T* saved = nullptr;                    // what mean_field saved
  Strided<T> grad_unary;                       // (batch, labels, points)
  T* const* grad_compatibility = nullptr;      // per kernel (labels, labels) or null
  const Strided<const T>* features = nullptr;  // per kernel (batch, d, points): those of its lattice
  const Strided<T>* grad_features =
      nullptr;  // per kernel (batch, d, points); includes the way through the normalisation
};

template <typename T>
void mean_field_backward(const MeanFieldProblem<T>& problem, int64_t iterations, const MeanFieldGradients<T>& gradients,
                         const Parallel& parallel);

}  // namespace deeplab_kernels::cpu
