#include "core/recording.h"

#include <stdexcept>

namespace dpn {

namespace {

std::weak_ptr<Recording>& recording_of_thread() {
  thread_local std::weak_ptr<Recording> recording;
  return recording;
}

}  // namespace

void Recording::begin() {
  if (active()) throw std::logic_error("this thread records already: one recording at a time");
  if (is_active_.exchange(true)) throw std::logic_error("another thread records this already");
  recording_of_thread() = weak_from_this();
}

void Recording::replay() const {
  if (active()) throw std::logic_error("this thread records: a recording cannot be repeated meanwhile");
  for (const auto& call : calls_) call();
}

std::shared_ptr<Recording> Recording::active() {
  std::shared_ptr<Recording> recording = recording_of_thread().lock();
  return recording && recording->is_active_ ? recording : nullptr;
}

}  // namespace dpn
