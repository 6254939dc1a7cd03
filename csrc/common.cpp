#include "common.h"

namespace titok {

void Team::wait() {
  if (size_ == 1) return;
  std::unique_lock<std::mutex> lock(mutex_);
  const int64_t generation = generation_;
  if (++arrived_ == size_) {
    arrived_ = 0;
    ++generation_;
    released_.notify_all();
  } else {
    released_.wait(lock, [&] { return generation_ != generation; });
  }
}

}  // namespace titok
