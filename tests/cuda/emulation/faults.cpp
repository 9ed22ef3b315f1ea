#include "faults.h"

#include <ucontext.h>

#include <cstdint>
#include <string>

#include "machine.h"

namespace dpn::emulation {

namespace {

// A handler needs a stack of its own: that of a thread may be what the thread has left.
alignas(16) unsigned char handler_stack[64 * 1024];

// The kernel's code stands at a load or a store and holds no lock, so a string may be made here, and the scheduler may
// go on from here.
void on_fault(int, siginfo_t* info, void* context) {
  std::string kind = "access";
#ifdef __x86_64__
  kind = static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_ERR] & 2 ? "write" : "read";
#else
  (void)context;
#endif
  fail("invalid " + kind + " of address " + std::to_string(reinterpret_cast<std::uintptr_t>(info->si_addr)));
}

}  // namespace

FaultHandler::FaultHandler() {
  stack_t stack{};
  stack.ss_sp = handler_stack;
  stack.ss_size = sizeof handler_stack;
  sigaltstack(&stack, &stack_before_);
  struct sigaction action{};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;  // left by a jump, which would leave the signal blocked
  sigaction(SIGSEGV, &action, &segv_before_);
  sigaction(SIGBUS, &action, &bus_before_);
}

FaultHandler::~FaultHandler() {
  sigaction(SIGSEGV, &segv_before_, nullptr);
  sigaction(SIGBUS, &bus_before_, nullptr);
  sigaltstack(&stack_before_, nullptr);
}

}  // namespace dpn::emulation
