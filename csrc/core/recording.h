// Calls of ops that are recorded once and repeated, without what lies between them: for few rows, Python between two
// ops takes as long as a small op.
#pragma once

#include <functional>
#include <utility>
#include <vector>

namespace dpn {

class Recording {
 public:
  // From here to `end`, ops that the calling thread calls are recorded as well as run. Throws std::logic_error where
  // the thread records already.
  void begin();
  // Also where nothing has begun.
  void end();

  // Runs the recorded calls in their order, with what their memory holds now. The first that throws ends it.
  void replay() const;

  // The recording of the calling thread, or null.
  static Recording* active();

  void add(std::function<void()> call) { calls_.push_back(std::move(call)); }
  std::size_t size() const { return calls_.size(); }

 private:
  std::vector<std::function<void()>> calls_;
};

}  // namespace dpn
