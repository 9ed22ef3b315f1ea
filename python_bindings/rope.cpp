#include "ops/rope.h"

#include "bindings.h"
#include "tensor_bridge.h"

namespace dpn::python {

void bind_rope(pybind11::module_& m) {
  m.def("rope_store", &rope_store, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace dpn::python
