#include "ops/linear.h"

#include <pybind11/stl.h>

#include "bindings.h"
#include "tensor_bridge.h"

namespace dpn::python {

void bind_linear(pybind11::module_& m) {
  m.def(
      "linear",
      [](const Tensor& out, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
        linear(out, x, weight, bias ? &*bias : nullptr);
      },
      pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace dpn::python
