#include "ops/attention.h"

#include "bindings.h"
#include "tensor_bridge.h"

namespace dpn::python {

void bind_attention(pybind11::module_& m) {
  using release_gil = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("attention", &attention, release_gil());
  m.def("attention_extend", &attention_extend, release_gil());
  m.def("attention_decode", &attention_decode, release_gil());
}

}  // namespace dpn::python
