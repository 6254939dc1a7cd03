#include "cuda_common.cuh"
#include "system.h"

namespace titok {
namespace {

// Never launched: its attributes name the code that the driver picked from this build.
__global__ void system_probe_kernel() {}

}  // namespace

CudaCode cuda_code(int device) {
  int previous = 0;
  TITOK_CHECK_CUDA(cudaGetDevice(&previous));
  TITOK_CHECK_CUDA(cudaSetDevice(device));
  cudaFuncAttributes attributes{};
  const cudaError_t status = cudaFuncGetAttributes(&attributes, system_probe_kernel);
  cudaGetLastError();
  TITOK_CHECK_CUDA(cudaSetDevice(previous));
  return {attributes.binaryVersion, status == cudaSuccess ? nullptr : cudaGetErrorString(status)};
}

int cuda_runtime_version() {
  int version = 0;
  TITOK_CHECK_CUDA(cudaRuntimeGetVersion(&version));
  return version;
}

}  // namespace titok
