// Which instruction set serves. The per-instruction-set files, kernels.cpp and x_kernels.cpp, are compiled once for
// each set, whose name DK_ISA is their namespace's.
#pragma once

namespace deeplab_kernels::cpu {

enum class InstructionSet { kPortable, kAvx2, kAvx512 };

// The best this CPU has, or the one that the environment variable DEEPLAB_KERNELS_CPU_ISA names, if this CPU has it.
InstructionSet chosen_instruction_set();

// Its name: "avx512", "avx2" or "portable".
const char* instruction_set();

// Declares what the file of each instruction set offers, in the namespaces that those files name.
#define DK_EACH_INSTRUCTION_SET(declare) declare(portable) declare(avx2) declare(avx512)

// Calls f with the kernels of the instruction set in use. The other two stay declarations where they are not built.
template <typename Portable, typename Avx2, typename Avx512, typename F>
void with_kernels(F&& f) {
#if defined(__x86_64__) && !defined(DEEPLAB_KERNELS_PORTABLE)
  if (chosen_instruction_set() == InstructionSet::kAvx512) return f(Avx512());
  if (chosen_instruction_set() == InstructionSet::kAvx2) return f(Avx2());
#endif
  f(Portable());
}

}  // namespace deeplab_kernels::cpu
