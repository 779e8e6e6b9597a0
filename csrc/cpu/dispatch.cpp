// Which instruction set runs: the best one this CPU has, unless TAPS_FAST_CPU_ISA asks for another it also has.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace taps_fast::cpu {
namespace {

const Kernels& choose() {
  const char* variable = std::getenv("TAPS_FAST_CPU_ISA");
  const std::string wanted = variable ? variable : "";
  const Kernels* best = nullptr;
  const auto offer = [&](bool supported, const Kernels& table) {
    if (supported && (wanted.empty() || wanted == table.name)) best = &table;
  };
  offer(true, kernels_generic());
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  offer(avx2, kernels_avx2());
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  offer(avx512, kernels_avx512());
  // VDPBF16PS multiplies two pairs a lane. AMD runs it at the rate of a float32 multiply-add, Intel's cores at half of
  // that, which gains nothing and rounds the summed weight: there it has to be asked for.
  const bool pairs = avx512 && __builtin_cpu_supports("avx512bf16");
  offer(pairs && (__builtin_cpu_is("amd") || !wanted.empty()), kernels_avx512bf16());
#endif
  if (!best)
    throw std::runtime_error(
        "taps_fast: TAPS_FAST_CPU_ISA must be generic, avx2, avx512 or avx512bf16, and one this CPU has, got '" +
        wanted + "'");
  return *best;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace taps_fast::cpu
