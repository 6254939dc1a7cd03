// Shared by every op's host code: element types and a thread team. No torch, no Python.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>

namespace titok {

enum class DType { float32, float16, bfloat16 };

// Internal: files that are compiled for one instruction set include this too.
static constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Where the parts of a workspace begin, each on a cache line of its own.
struct Workspace {
  std::size_t size = 0;

  // Inlined into files that are compiled for one instruction set, never linked across them.
  __attribute__((always_inline)) std::size_t take(int64_t bytes) {
    const std::size_t here = size;
    size += static_cast<std::size_t>(round_up(bytes, 64));
    return here;
  }
};

// While it lives, subnormal numbers are what they are, even in a thread that flushes them to zero:
// results depend on the inputs alone.
class Subnormals {
 public:
  // Inlined into files that are compiled for one instruction set, never linked across them.
  __attribute__((always_inline)) Subnormals() : saved_(get()) { set(saved_ & ~kFlush); }
  __attribute__((always_inline)) ~Subnormals() { set(saved_); }
  Subnormals(const Subnormals&) = delete;
  Subnormals& operator=(const Subnormals&) = delete;

 private:
#if defined(__x86_64__)
  using Control = unsigned;
  static constexpr Control kFlush = 0x8040;
  __attribute__((always_inline)) static Control get() { return __builtin_ia32_stmxcsr(); }
  __attribute__((always_inline)) static void set(Control x) { __builtin_ia32_ldmxcsr(x); }
#elif defined(__aarch64__)
  using Control = uint64_t;
  static constexpr Control kFlush = uint64_t{1} << 24;
  __attribute__((always_inline)) static Control get() {
    Control x;
    asm volatile("mrs %0, fpcr" : "=r"(x));
    return x;
  }
  __attribute__((always_inline)) static void set(Control x) {
    asm volatile("msr fpcr, %0" ::"r"(x));
  }
#else
  using Control = unsigned;
  static constexpr Control kFlush = 0;
  __attribute__((always_inline)) static Control get() { return 0; }
  __attribute__((always_inline)) static void set(Control) {}
#endif

  Control saved_;
};

// The threads of one parallel region: `fn(Team::Member)` runs once per thread, the caller's
// included. They are those of torch's own OpenMP pool, which after every op of torch still spin for
// milliseconds: threads beside them would share their cores. In a forked child, where OpenMP would
// wait forever, and where torch has no OpenMP, they start and end with the region.
class Team {
 public:
  struct Member {
    Team& team;
    int index;
    int size;

    // Inlined into files that are compiled for one instruction set, never linked across them.
    __attribute__((always_inline)) void barrier() const { team.wait(size); }

    // This member's share of [0, count), in multiples of `grain`.
    struct Range {
      int64_t begin, end;
    };
    __attribute__((always_inline)) Range share(int64_t count, int64_t grain = 1) const {
      const int64_t grains = (count + grain - 1) / grain;
      const auto bound = [&](int64_t i) __attribute__((always_inline)) {
        const int64_t at = grains * i / size * grain;
        return at < count ? at : count;
      };
      return {bound(index), bound(index + 1)};
    }
  };

  // `threads` or fewer of torch's `pool`. Asked for another number than torch does, OpenMP would
  // end and start threads again and again: all of them come, and some leave at once.
  template <class Fn>
  static void run(int threads, int pool, const Fn& fn) {
    Team team;
    const auto member = [&](int index, int size) {
      if (size > threads) size = threads;
      if (index >= size) return;
      const Subnormals subnormals;
      fn(Member{team, index, size});
    };
    if (threads <= 1) {
      threads = 1;
      return member(0, 1);
    }
    using Each = decltype(member);
    start(pool, threads, &member, [](const void* each, int index, int size) {
      (*static_cast<const Each*>(each))(index, size);
    });
  }

 private:
  using Call = void (*)(const void* member, int index, int size);

  // Out of line: files that are compiled for one instruction set must not define them.
  static void start(int pool, int threads, const void* member, Call call);
  void wait(int size);

  std::mutex mutex_;
  std::condition_variable released_;
  std::atomic<int> arrived_{0};
  std::atomic<int64_t> generation_{0};
};

}  // namespace titok
