#include "ops/norm.h"

#include "bindings.h"
#include "tensor_bridge.h"

namespace dpn::python {

void bind_norm(pybind11::module_& m) {
  using release_gil = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("rms_norm", &rms_norm, release_gil());
  m.def("add_rms_norm", &add_rms_norm, release_gil());
  m.def("layer_norm", &layer_norm, release_gil());
  m.def("add_layer_norm", &add_layer_norm, release_gil());
}

}  // namespace dpn::python
