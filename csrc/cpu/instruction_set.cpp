#include "instruction_set.h"

#include <cstdlib>
#include <cstring>

namespace deeplab_kernels::cpu {
namespace {

bool supported(InstructionSet set) {
#if defined(__x86_64__) && !defined(DEEPLAB_KERNELS_PORTABLE)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (set == InstructionSet::kAvx2) return avx2;
  if (set == InstructionSet::kAvx512)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
  return set == InstructionSet::kPortable;
}

const char* name(InstructionSet set) {
  return set == InstructionSet::kAvx512 ? "avx512" : set == InstructionSet::kAvx2 ? "avx2" : "portable";
}

InstructionSet choose() {
  const char* wanted = std::getenv("DEEPLAB_KERNELS_CPU_ISA");
  const InstructionSet sets[] = {InstructionSet::kAvx512, InstructionSet::kAvx2, InstructionSet::kPortable};
  if (wanted)
    for (InstructionSet set : sets)
      if (std::strcmp(wanted, name(set)) == 0 && supported(set)) return set;
  for (InstructionSet set : sets)
    if (supported(set)) return set;
  return InstructionSet::kPortable;
}

}  // namespace

InstructionSet chosen_instruction_set() {
  static const InstructionSet set = choose();
  return set;
}

const char* instruction_set() { return name(chosen_instruction_set()); }

}  // namespace deeplab_kernels::cpu
