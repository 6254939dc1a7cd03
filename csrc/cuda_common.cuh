// Shared by every CUDA C++ op.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace titok {

inline void check_cuda(cudaError_t status, const char* call) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(status));
  }
}

}  // namespace titok

#define TITOK_CHECK_CUDA(call) ::titok::check_cuda((call), #call)
