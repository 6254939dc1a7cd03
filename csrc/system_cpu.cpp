#include "system.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include <atomic>
#include <stdexcept>

namespace titok {
namespace {

std::atomic<int> forced{-1};

#if defined(__x86_64__)
// Whether the CPU has the tile registers, with products of bfloat16, and the operating system gives
// them to this process: it saves them only of those that ask.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr unsigned all = 1u << 22 | 1u << 24;               // AMX-BF16, AMX-TILE
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & all) == all &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

Isa probe() {
#if defined(__x86_64__)
  // __builtin_cpu_supports also checks that the operating system saves the registers.
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  if (f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    if (!__builtin_cpu_supports("avx512f")) return Isa::avx2;
    if (!__builtin_cpu_supports("avx512vnni")) return Isa::avx512;
    if (!__builtin_cpu_supports("avx512bf16")) return Isa::avx512vnni;
    return may_use_tiles() ? Isa::amx : Isa::avx512bf16;
  }
#endif
  return Isa::portable;
}

// From Sapphire Rapids on, Intel leaves bfloat16 to the tile registers, which a virtual machine may
// lack: vdpbf16ps takes four times as long as each of the two float32 products that it replaces.
bool bfloat16_is_slow() {
#if defined(__x86_64__)
  constexpr unsigned kFloat16 = 1u << 23;  // AVX512-FP16, which Cooper Lake lacks
  unsigned a = 0, b = 0, c = 0, d = 0;
  return detected_isa() == Isa::avx512bf16 && __builtin_cpu_is("intel") &&
         __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kFloat16);
#else
  return false;
#endif
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::amx:
      return "amx";
    case Isa::avx512bf16:
      return "avx512bf16";
    case Isa::avx512vnni:
      return "avx512vnni";
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "portable";
  }
}

Isa detected_isa() {
  static const Isa isa = probe();  // cpuid leaves a virtual machine: microseconds
  return isa;
}

Isa fastest_isa() {
  static const Isa isa = bfloat16_is_slow() ? Isa::avx512vnni : detected_isa();
  return isa;
}

Isa active_isa() {
  const int isa = forced.load(std::memory_order_relaxed);
  return isa < 0 ? fastest_isa() : static_cast<Isa>(isa);
}

void force_isa(const std::string& name) {
  if (name.empty()) {
    forced = -1;
    return;
  }
  for (const Isa isa :
       {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512vnni, Isa::avx512bf16, Isa::amx}) {
    if (name != isa_name(isa)) continue;
    if (isa > detected_isa()) {
      throw std::invalid_argument("isa: '" + name +
                                  "' is not supported by this CPU; the best is '" +
                                  isa_name(detected_isa()) + "'");
    }
    forced = static_cast<int>(isa);
    return;
  }
  throw std::invalid_argument(
      "isa: '" + name +
      "' is not one of 'portable', 'avx2', 'avx512', 'avx512vnni', 'avx512bf16', 'amx'");
}

}  // namespace titok
