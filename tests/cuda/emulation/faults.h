// Accesses of pages that may not be accessed, which tests put around tensors.
#pragma once

#include <csignal>

namespace dpn::emulation {

// While it lives, an access of such a page by a thread of the GPU ends the launch with its address; see `fail`.
class FaultHandler {
 public:
  FaultHandler();
  ~FaultHandler();
  FaultHandler(const FaultHandler&) = delete;
  FaultHandler& operator=(const FaultHandler&) = delete;

 private:
  stack_t stack_before_;
  struct sigaction segv_before_, bus_before_;
};

}  // namespace dpn::emulation
