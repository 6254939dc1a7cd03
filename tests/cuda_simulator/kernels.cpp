// The CUDA C++ ops, compiled for a CPU.
#include "cuda_runtime.h"

namespace titok {
namespace {

__shared__ float4 shared_logits[3 << 10];  // a kernel's `extern __shared__` array: 48 KiB

}  // namespace
}  // namespace titok

#include "../../csrc/maskgit_step_cuda.cu"
#include "../../csrc/sample_token_cuda.cu"
