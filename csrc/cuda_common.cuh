// Shared by every CUDA C++ op.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace titok {

inline void check_cuda(cudaError_t status, const char* call) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(status));
  }
}

#define TITOK_CHECK_CUDA(call) ::titok::check_cuda((call), #call)

// Each block gets `shared_bytes` of dynamic shared memory.
template <class... Parameters, class... Arguments>
void launch_kernel(void (*kernel)(Parameters...), int64_t blocks, unsigned threads,
                   std::size_t shared_bytes, void* stream, const Arguments&... arguments) {
  if (blocks > INT32_MAX) {
    throw std::runtime_error(std::to_string(blocks) + " blocks are more than a grid can have");
  }
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(blocks);
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  TITOK_CHECK_CUDA(cudaLaunchKernelEx(&config, kernel, arguments...));
}

}  // namespace titok
