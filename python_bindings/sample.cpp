#include "ops/sample.h"

#include "bindings.h"
#include "tensor_bridge.h"

namespace dpn::python {

void bind_sample(pybind11::module_& m) {
  m.def("sample", &sample, pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("sample_greedy", &sample_greedy, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace dpn::python
