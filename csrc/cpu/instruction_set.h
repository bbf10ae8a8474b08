// Which of the per-instruction-set files (x_avx2.cpp, ...) serve.
#pragma once

namespace deeplab_kernels::cpu {

enum class InstructionSet { kPortable, kAvx2, kAvx512 };

// The best this CPU has, or the one that the environment variable DEEPLAB_KERNELS_CPU_ISA names, if this CPU has it.
InstructionSet chosen_instruction_set();

// Its name: "avx512", "avx2" or "portable".
const char* instruction_set();

}  // namespace deeplab_kernels::cpu
