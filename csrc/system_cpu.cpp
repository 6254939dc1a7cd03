#include "system.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <atomic>
#include <stdexcept>

namespace titok {
namespace {

std::atomic<int> forced{-1};

Isa probe() {
#if defined(__x86_64__)
  // __builtin_cpu_supports also checks that the operating system saves the registers.
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  if (f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    if (!__builtin_cpu_supports("avx512f")) return Isa::avx2;
    if (!__builtin_cpu_supports("avx512vnni")) return Isa::avx512;
    return __builtin_cpu_supports("avx512bf16") ? Isa::avx512bf16 : Isa::avx512vnni;
  }
#endif
  return Isa::portable;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
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

Isa active_isa() {
  const int isa = forced.load(std::memory_order_relaxed);
  return isa < 0 ? detected_isa() : static_cast<Isa>(isa);
}

void force_isa(const std::string& name) {
  if (name.empty()) {
    forced = -1;
    return;
  }
  for (const Isa isa : {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512vnni, Isa::avx512bf16}) {
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
      "isa: '" + name + "' is not one of 'portable', 'avx2', 'avx512', 'avx512vnni', 'avx512bf16'");
}

}  // namespace titok
