// Shared by every op's host code: element types and a thread team. No torch, no Python.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace titok {

enum class DType { float32, float16, bfloat16 };

// Internal: files that are compiled for one instruction set include this too.
static constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// The threads of one parallel region: `fn(Team::Member)` runs once per thread, the caller's
// included, and every thread is joined before `run` returns. Nothing outlives a call, so the
// process may fork between calls and no pool spins beside torch's.
class Team {
 public:
  struct Member {
    Team& team;
    int index;
    int size;

    // Inlined into files that are compiled for one instruction set, never linked across them.
    __attribute__((always_inline)) void barrier() const { team.wait(); }

    // This member's share of [0, count), in multiples of `grain`.
    struct Range {
      int64_t begin, end;
    };
    __attribute__((always_inline)) Range share(int64_t count, int64_t grain = 1) const {
      const int64_t grains = (count + grain - 1) / grain;
      const auto bound = [&](int64_t i) {
        const int64_t at = grains * i / size * grain;
        return at < count ? at : count;
      };
      return {bound(index), bound(index + 1)};
    }
  };

  template <class Fn>
  static void run(int threads, const Fn& fn) {
    Team team;
    std::vector<std::thread> others;
    others.reserve(threads > 1 ? threads - 1 : 0);
    {
      // Members start only once the size is known: a machine out of threads gets a smaller team.
      std::unique_lock<std::mutex> hold(team.mutex_);
      for (int i = 1; i < threads; ++i) {
        try {
          others.emplace_back([&team, &fn, i] {
            {
              std::unique_lock<std::mutex> started(team.mutex_);
            }
            fn(Member{team, i, team.size_});
          });
        } catch (const std::exception&) {
          break;
        }
      }
      team.size_ = static_cast<int>(others.size()) + 1;
    }
    fn(Member{team, 0, team.size_});
    for (auto& thread : others) thread.join();
  }

 private:
  void wait();  // out of line: files compiled for one instruction set must not define it

  std::mutex mutex_;
  std::condition_variable released_;
  int size_ = 1;
  int arrived_ = 0;
  int64_t generation_ = 0;
};

}  // namespace titok
