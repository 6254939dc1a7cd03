// Stands in for CUDA's header: csrc/*.cu compiled with it run on a CPU (simulator.cpp).
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ thread_local  // one host thread runs a block, and one block at a time

namespace simulator {

struct Index {
  unsigned x;
};

void launch(unsigned blocks, unsigned threads, const std::function<void()>& kernel);
void barrier(int line);
// What each lane of the warp gives, once all have come; until the next call of the warp.
const uint64_t* exchange(unsigned mask, uint64_t value, int line);
// Lets other threads run where memory that blocks share changes.
void interleave();
void check(bool right, const char* what);

template <class T>
uint64_t to_bits(T x) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "as the hardware's shuffles of one or two words");
  uint64_t bits = 0;
  memcpy(&bits, &x, sizeof x);
  return bits;
}
template <class T>
T from_bits(uint64_t bits) {
  T x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

}  // namespace simulator

extern simulator::Index threadIdx, blockIdx;

struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline void __syncthreads(int line = __builtin_LINE()) { simulator::barrier(line); }
inline void __threadfence() {}
inline unsigned lane_of_thread() { return threadIdx.x % 32; }

template <class T>
T __shfl_sync(unsigned mask, T x, int lane, int line = __builtin_LINE()) {
  return simulator::from_bits<T>(simulator::exchange(mask, simulator::to_bits(x), line)[lane % 32]);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int lanes, int line = __builtin_LINE()) {
  return __shfl_sync(mask, x, static_cast<int>(lane_of_thread()) ^ lanes, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T x, int distance, int line = __builtin_LINE()) {
  const int lane = static_cast<int>(lane_of_thread());
  return __shfl_sync(mask, x, lane < distance ? lane : lane - distance, line);
}
inline unsigned __ballot_sync(unsigned mask, bool vote, int line = __builtin_LINE()) {
  const uint64_t* votes = simulator::exchange(mask, vote, line);
  unsigned result = 0;
  for (int lane = 0; lane < 32; ++lane) result |= static_cast<unsigned>(votes[lane]) << lane;
  return result;
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned x, int line = __builtin_LINE()) {
  const uint64_t* values = simulator::exchange(mask, x, line);
  unsigned sum = 0;
  for (int lane = 0; lane < 32; ++lane) sum += static_cast<unsigned>(values[lane]);
  return sum;
}
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }

template <class T>
T atomicAdd(T* address, T value) {
  simulator::interleave();
  const T before = *address;
  *address = before + value;
  return before;
}

template <class T>
T __ldg(const T* address) {
  simulator::check(reinterpret_cast<std::uintptr_t>(address) % sizeof(T) == 0, "misaligned load");
  return *address;
}

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline uint64_t __umul64hi(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline unsigned __float2uint_rn(float x) { return static_cast<unsigned>(lrintf(x)); }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

struct cudaLaunchConfig_t {
  unsigned gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  simulator::check(config->dynamicSmemBytes <= 48 << 10, "more shared memory than a block has");
  simulator::launch(config->gridDim, config->blockDim, [&] { kernel(arguments...); });
  return cudaSuccess;
}

#define __CUDACC__
#define __CUDA_ARCH__ 900
