// An op as it is bound: it runs, and is added to the calling thread's recording if there is one.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

#include "core/recording.h"

namespace dpn::python {

// A recorded call copies its arguments. A tensor owns no memory, so the caller keeps the memory that it points to.
template <class... Arguments>
auto recorded(void (*op)(Arguments...)) {
  return [op](Arguments... arguments) {
    op(arguments...);
    if (const auto recording = Recording::active()) {
      recording->add([op, ... copies = std::decay_t<Arguments>(arguments)] { op(copies...); });
    }
  };
}

// A function whose result depends on what tensors hold, which a recording would keep as it was.
template <class Result, class... Arguments>
auto not_recorded(const char* name, Result (*function)(Arguments...)) {
  return [name, function](Arguments... arguments) {
    if (Recording::active()) throw std::logic_error(std::string(name) + " reads values: it cannot be recorded");
    return function(arguments...);
  };
}

}  // namespace dpn::python
