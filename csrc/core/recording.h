// Calls of ops that are recorded once and repeated, without what lies between them: for few rows, Python between two
// ops takes as long as a small op.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

namespace dpn {

// Owned by shared pointers. One that its owners give up while it records has ended.
class Recording : public std::enable_shared_from_this<Recording> {
 public:
  // From here to `end`, ops that the calling thread calls are recorded as well as run. Throws std::logic_error where
  // the thread records already, or another thread records this.
  void begin();
  // May be called by any thread. Does nothing if nothing has begun.
  void end() { is_active_ = false; }

  // Runs the recorded calls in their order, with what their memory holds now. The first that throws ends it. Throws
  // std::logic_error while the calling thread records.
  void replay() const;

  // The recording of the calling thread, or null.
  static std::shared_ptr<Recording> active();

  void add(std::function<void()> call) { calls_.push_back(std::move(call)); }
  std::size_t size() const { return calls_.size(); }

 private:
  std::vector<std::function<void()>> calls_;
  std::atomic<bool> is_active_{false};
};

}  // namespace dpn
