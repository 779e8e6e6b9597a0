// Which instruction set runs: the best one this CPU has, unless TAPS_FAST_CPU_ISA asks for another it also has.
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace taps_fast::cpu {
namespace {

#if defined(__x86_64__)
/// Asked by number: not every compiler that knows AMX has a name for it here.
bool cpu_has_amx() {
#if defined(TAPS_FAST_EMULATE_AMX)
  return true;
#else
  constexpr unsigned kBFloat16 = 1u << 22, kTiles = 1u << 24;
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kBFloat16) && (d & kTiles);
#endif
}
#endif

const Kernels& choose() {
  const char* variable = std::getenv("TAPS_FAST_CPU_ISA");
  const std::string wanted = variable ? variable : "";
  const char* refusal = nullptr;  // of AMX
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
  // Asked only where it matters: the process gets a permission, and its threads more to save.
  if (wanted.empty() || wanted == "avx512amx") {
    refusal = pairs && cpu_has_amx() ? amx_refusal() : "the CPU has no AMX for bfloat16";
    offer(!refusal, kernels_avx512amx());
  }
#endif
  if (!best)
    throw std::runtime_error(
        "taps_fast: TAPS_FAST_CPU_ISA must be generic, avx2, avx512, avx512bf16 or avx512amx, and one this CPU has, "
        "got '" +
        wanted + "'" + (refusal ? std::string(" (") + refusal + ")" : ""));
  return *best;
}

bool is_intel() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

bool rows_come_by_themselves() { return is_intel(); }

bool vendor_multiplies_faster() { return is_intel(); }

}  // namespace taps_fast::cpu
