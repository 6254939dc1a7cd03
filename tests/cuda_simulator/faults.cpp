// Faulty kernels, which the simulator must find out.
#include <string>
#include <vector>

#include "cuda_runtime.h"

namespace {

constexpr unsigned kThreads = 64;

__global__ void half_a_barrier_kernel(unsigned*) {
  if (threadIdx.x < 32) __syncthreads();
}

__global__ void two_barriers_kernel(unsigned*) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void lane_left_behind_kernel(unsigned* out) {
  if (threadIdx.x % 32 == 7) return;
  *out = __ballot_sync(0xffffffffu, true);
}

__global__ void missing_barrier_kernel(unsigned* out) {
  __shared__ unsigned values[kThreads];
  values[threadIdx.x] = kThreads * blockIdx.x + threadIdx.x;
  out[1 + threadIdx.x] = values[(threadIdx.x + 1) % kThreads];
}

__global__ void reused_too_early_kernel(unsigned* out) {
  __shared__ unsigned value;
  for (unsigned round = 0; round < 8; ++round) {
    if (threadIdx.x == 0) value = round;
    __syncthreads();
    out[1 + threadIdx.x] += value * value;
  }
}

__global__ void lost_update_kernel(unsigned* out) {
  const unsigned before = *out;
  atomicAdd(out + 1, 1u);
  *out = before + 1;
}

}  // namespace

std::vector<unsigned> run_fault(const std::string& name) {
  const auto kernel = name == "half a barrier"     ? half_a_barrier_kernel
                      : name == "two barriers"     ? two_barriers_kernel
                      : name == "lane left"        ? lane_left_behind_kernel
                      : name == "missing barrier"  ? missing_barrier_kernel
                      : name == "reused too early" ? reused_too_early_kernel
                      : name == "lost update"      ? lost_update_kernel
                                                   : nullptr;
  if (kernel == nullptr) throw std::invalid_argument(name);
  std::vector<unsigned> out(1 + kThreads);
  const cudaLaunchConfig_t config{2, kThreads, 0, nullptr};
  cudaLaunchKernelEx(&config, kernel, out.data());
  return out;
}
