// What this machine can run: the CPU's vector instructions and the GPU code inside this build.
#pragma once

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

struct CudaCode {
  int device_capability;  // 10 * major + minor of the device
  int binary_capability;  // of the machine code that the driver loads for this build
  int ptx_capability;     // of the PTX it was compiled from
  const char* error;      // nullptr, or why this build's code cannot run there
};
// Asks the driver which of this build's code it would run on `device`.
CudaCode cuda_code(int device);
int cuda_runtime_version();

}  // namespace titok
