// Runs CUDA kernels on a CPU to prove what they compute: each thread of a block is a fiber that
// runs until it waits for others. The order of threads and blocks is a seed's, so that a result
// which depends on it, a race, shows between seeds. What a GPU's memory model allows beyond that,
// such as a missing fence, does not show.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <exception>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "cuda_runtime.h"
#include "maskgit_step.h"
#include "sample_token.h"

namespace py = pybind11;

simulator::Index threadIdx, blockIdx;

namespace simulator {
namespace {

constexpr std::size_t kStack = 64 << 10;

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t start;
  jmp_buf state;
  bool started = false, done = false;
  int line = 0;  // where it waits
};

struct Warp {
  uint64_t values[2][32];
  unsigned arrived, generation;
  int line;
  unsigned asleep;  // rounds that others run alone
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  unsigned arrived = 0, generation = 0;
  int line = 0;
  uint64_t progress = 0;
  const std::function<void()>* kernel = nullptr;
  std::exception_ptr error;
  jmp_buf scheduler;
};

Block block;
uint64_t seed = 0;
std::mt19937_64 random_words;

void yield(int line) {
  Fiber& fiber = block.fibers[threadIdx.x];
  fiber.line = line;
  if (_setjmp(fiber.state) == 0) _longjmp(block.scheduler, 1);
}

// A thread of one block after another.
[[noreturn]] void run_fiber() {
  for (;;) {
    try {
      (*block.kernel)();
    } catch (...) {
      if (!block.error) block.error = std::current_exception();
    }
    block.fibers[threadIdx.x].done = true;
    ++block.progress;
    yield(0);
  }
}

void resume(unsigned thread) {
  Fiber& fiber = block.fibers[thread];
  threadIdx.x = thread;
  if (_setjmp(block.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.state, 1);
  fiber.started = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = kStack;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, run_fiber, 0);
  setcontext(&fiber.start);
}

// 0: ascending, 1: descending, otherwise another order each time.
struct Order {
  uint64_t count, factor = 1, first = 0;
  explicit Order(uint64_t count) : count(count) {
    if (seed == 1) factor = count - 1, first = count - 1;
    if (seed > 1) {
      first = random_words() % count;
      do factor = random_words() % count + 1;
      while (std::gcd(factor, count) != 1);
    }
  }
  unsigned operator[](uint64_t i) const {
    return static_cast<unsigned>((first + i * factor) % count);
  }
};

void run_block(unsigned threads) {
  block.warps.assign((threads + 31) / 32, {});
  block.arrived = 0;
  for (Fiber& fiber : block.fibers) fiber.done = false;
  for (bool busy = true; busy;) {
    busy = false;
    bool all = true;
    const uint64_t before = block.progress;
    const Order order(threads);
    for (unsigned i = 0; i < threads; ++i) {
      const unsigned thread = order[i];
      if (block.fibers[thread].done) continue;
      busy = true;
      if (block.warps[thread / 32].asleep > 0) {
        all = false;
        continue;
      }
      resume(thread);
      if (block.error) std::rethrow_exception(block.error);
    }
    for (Warp& warp : block.warps) {
      if (warp.asleep > 0) {
        --warp.asleep;
      } else if (seed > 1 && random_words() % 8 == 0) {
        warp.asleep = random_words() % 32;
      }
    }
    if (!busy || !all || block.progress != before) continue;
    std::string where;
    for (unsigned i = 0; i < threads; ++i) {
      const Fiber& fiber = block.fibers[i];
      where += fiber.done ? " returned" : " " + std::to_string(fiber.line);
    }
    throw std::runtime_error("threads wait for others that do not come, at lines" + where);
  }
}

}  // namespace

void check(bool right, const char* what) {
  if (!right) throw std::runtime_error(what);
}

void launch(unsigned blocks, unsigned threads, const std::function<void()>& kernel) {
  check(blocks > 0, "a grid without blocks");
  random_words.seed(seed);
  block.fibers.resize(threads);
  block.kernel = &kernel;
  block.error = nullptr;
  const Order order(blocks);
  try {
    for (unsigned i = 0; i < blocks; ++i) {
      blockIdx.x = order[i];
      run_block(threads);
    }
  } catch (...) {
    block.fibers.clear();  // some are in the midst of the kernel
    throw;
  }
}

void barrier(int line) {
  check(block.arrived == 0 || block.line == line, "threads of a block wait at different barriers");
  block.line = line;
  const unsigned generation = block.generation;
  if (++block.arrived == block.fibers.size()) {
    block.arrived = 0;
    ++block.generation;
    ++block.progress;
  }
  while (block.generation == generation) yield(line);
}

const uint64_t* exchange(unsigned mask, uint64_t value, int line) {
  check(mask == 0xffffffffu, "only whole warps exchange values here");
  Warp& warp = block.warps[threadIdx.x / 32];
  check(warp.arrived == 0 || warp.line == line, "lanes of a warp wait at different shuffles");
  warp.line = line;
  const unsigned generation = warp.generation;
  uint64_t* values = warp.values[generation % 2];
  values[threadIdx.x % 32] = value;
  if (++warp.arrived == 32) {
    warp.arrived = 0;
    ++warp.generation;
    ++block.progress;
  }
  while (warp.generation == generation) yield(line);
  return values;
}

void interleave() {
  if (seed <= 1) return;
  ++block.progress;
  yield(0);
}

}  // namespace simulator

namespace titok {

// The binding files name what this module has none of.
[[noreturn]] static void absent() { throw std::logic_error("the simulator has no CPU op"); }
std::size_t maskgit_step_cpu_workspace(int64_t, int64_t, int) { absent(); }
std::size_t sample_token_cpu_workspace(int64_t, int64_t, int) { absent(); }
void maskgit_step_cpu(const MaskgitStepArgs&) { absent(); }
void sample_token_cpu(const SampleTokenArgs&) { absent(); }

}  // namespace titok

std::vector<unsigned> run_fault(const std::string& name);
void bind_maskgit_step(py::module_& m);
void bind_sample_token(py::module_& m);

PYBIND11_MODULE(cuda_simulator, m) {
  m.def("set_order", [](uint64_t seed) { simulator::seed = seed; }, py::arg("seed"));
  m.def("run_fault", run_fault, py::arg("name"));
  bind_maskgit_step(m);
  bind_sample_token(m);
}
