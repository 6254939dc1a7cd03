#include "common.h"

#include <dlfcn.h>
#include <pthread.h>

#include <exception>
#include <thread>
#include <vector>

namespace titok {
namespace {

// Some 100 us. Without, sample_token at V = 262,144 takes 0.50 ms for 0.39.
constexpr int kSpins = 4000;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// The entry points that compilers call, of the OpenMP library that torch loaded. To link with one
// would load another, with a pool of its own, wherever torch brings its own under another name.
struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned threads, unsigned flags) = nullptr;
  int (*index)() = nullptr;
  int (*size)() = nullptr;

  OpenMP() {
    void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    if (!torch) return;
    find(torch, "omp_get_thread_num", index);
    find(torch, "omp_get_num_threads", size);
    if (index && size) find(torch, "GOMP_parallel", parallel);
    pthread_atfork(nullptr, nullptr, [] { forked = true; });
  }
  template <class F>
  static void find(void* torch, const char* name, F& function) {
    function = reinterpret_cast<F>(dlsym(torch, name));
  }

  static bool forked;
};
bool OpenMP::forked = false;

const OpenMP openmp;

void start_threads(int threads, const void* member, void (*call)(const void*, int, int)) {
  std::vector<std::thread> others;
  others.reserve(threads - 1);
  std::mutex known;
  int size = 1;
  {
    // Members start only once the size is known: a machine out of threads gets a smaller team.
    std::unique_lock<std::mutex> hold(known);
    for (int i = 1; i < threads; ++i) {
      try {
        others.emplace_back([&known, &size, member, call, i] {
          {
            std::unique_lock<std::mutex> started(known);
          }
          call(member, i, size);
        });
      } catch (const std::exception&) {
        break;
      }
    }
    size = static_cast<int>(others.size()) + 1;
  }
  call(member, 0, size);
  for (auto& thread : others) thread.join();
}

}  // namespace

void Team::start(int pool, int threads, const void* member, Call call) {
  if (!openmp.parallel || OpenMP::forked) return start_threads(threads, member, call);
  struct Region {
    const void* member;
    Call call;
  } region{member, call};
  const auto body = [](void* region) {
    const Region& own = *static_cast<Region*>(region);
    own.call(own.member, openmp.index(), openmp.size());
  };
  openmp.parallel(body, &region, static_cast<unsigned>(pool), 0);
}

void Team::wait(int size) {
  if (size == 1) return;
  const int64_t generation = generation_.load(std::memory_order_acquire);
  const auto released = [&] { return generation_.load(std::memory_order_acquire) != generation; };
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
    arrived_.store(0, std::memory_order_relaxed);
    std::unique_lock<std::mutex> lock(mutex_);
    generation_.store(generation + 1, std::memory_order_release);
    released_.notify_all();
    return;
  }
  for (int i = 0; i < kSpins; ++i) {
    if (released()) return;
    pause();
  }
  std::unique_lock<std::mutex> lock(mutex_);
  released_.wait(lock, released);
}

}  // namespace titok
