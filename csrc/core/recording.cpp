#include "core/recording.h"

#include <stdexcept>

namespace dpn {

namespace {

Recording*& recording_of_thread() {
  thread_local Recording* recording = nullptr;
  return recording;
}

}  // namespace

void Recording::begin() {
  if (recording_of_thread()) throw std::logic_error("this thread records already: one recording at a time");
  recording_of_thread() = this;
}

void Recording::end() {
  if (recording_of_thread() == this) recording_of_thread() = nullptr;
}

void Recording::replay() const {
  if (recording_of_thread()) throw std::logic_error("this thread records: a recording cannot be repeated meanwhile");
  for (const auto& call : calls_) call();
}

Recording* Recording::active() { return recording_of_thread(); }

}  // namespace dpn
