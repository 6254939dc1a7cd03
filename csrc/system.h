// What this machine can run: the CPU's vector instructions and the GPU code inside this build.
#pragma once

#include <algorithm>
#include <string>

namespace titok {

enum class Isa { portable, avx2, avx512, avx512vnni, avx512bf16, amx };

const char* isa_name(Isa isa);
// Best instruction set that this CPU and operating system support.
Isa detected_isa();
// The detected set, or the one below it where the CPU multiplies bfloat16 slower than float32.
Isa fastest_isa();
// The set in use: the fastest, or the one forced for tests.
Isa active_isa();
// Throws std::invalid_argument for an unknown name or a set this CPU lacks; "" restores detection.
void force_isa(const std::string& name);

// The variant of an op for the set in use. TITOK_OF_ISA is for an op that has it for AVX2 and for
// AVX-512F, TITOK_OF_ISA_AND_DTYPE for one that also has AVX-512 BF16 and, for bfloat16, AMX, and
// TITOK_OF_EACH_ISA for one that has it for every set.
#if defined(__x86_64__)
template <class T>
const T& of_isa(const T& portable, const T& avx2, const T& avx512, const T& avx512vnni,
                const T& avx512bf16, const T& amx) {
  switch (active_isa()) {
    case Isa::amx:
      return amx;
    case Isa::avx512bf16:
      return avx512bf16;
    case Isa::avx512vnni:
      return avx512vnni;
    case Isa::avx512:
      return avx512;
    case Isa::avx2:
      return avx2;
    default:
      return portable;
  }
}
#define TITOK_OF_ISA(op) \
  of_isa(op##_portable, op##_avx2, op##_avx512, op##_avx512, op##_avx512, op##_avx512)
#define TITOK_OF_ISA_AND_DTYPE(op, dtype)                                     \
  of_isa(op##_portable, op##_avx2, op##_avx512, op##_avx512, op##_avx512bf16, \
         (dtype) == DType::bfloat16 ? op##_amx : op##_avx512bf16)
#define TITOK_OF_EACH_ISA(op) \
  of_isa(op##_portable, op##_avx2, op##_avx512, op##_avx512vnni, op##_avx512bf16, op##_amx)
#else
#define TITOK_OF_ISA(op) (op##_portable)
#define TITOK_OF_ISA_AND_DTYPE(op, dtype) (op##_portable)
#define TITOK_OF_EACH_ISA(op) (op##_portable)
#endif

// As many of `most` threads as have at least `least` of the work: one may have to be woken.
inline int threads_for(double work, double least, double most) {
  return static_cast<int>(std::max(1.0, std::min(most, work / least)));
}

struct CudaCode {
  int binary_capability;  // of the machine code that the driver loads for this build
  const char* error;      // nullptr, or why this build's code cannot run there
};
// Asks the driver which of this build's code it would run on `device`.
CudaCode cuda_code(int device);
int cuda_runtime_version();

}  // namespace titok
