#include "ops/activation.h"

#include "bindings.h"
#include "tensor_bridge.h"

namespace dpn::python {

void bind_activation(pybind11::module_& m) {
  using release_gil = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("silu_mul", &silu_mul, release_gil());
  m.def("activation", &activation, release_gil());
}

}  // namespace dpn::python
