#include "ops/route.h"

#include <pybind11/stl.h>

#include "bindings.h"
#include "tensor_bridge.h"

namespace dpn::python {

namespace {

using Optional = std::optional<Tensor>;

const Tensor* pointer(const Optional& t) { return t ? &*t : nullptr; }

}  // namespace

void bind_route(pybind11::module_& m) {
  m.def(
      "route",
      [](const Tensor& probs, const Tensor& experts, const Tensor& hidden, const Tensor& router_rows,
         const Tensor& cu_router_rows, const Tensor& predictor, const Optional& norm_weight, const Optional& norm_bias,
         const Optional& hidden_weight, float eps, const Optional& biases, const Optional& levels,
         const Optional& workspace, Stream stream) {
        route(probs, experts, hidden, router_rows, cu_router_rows, predictor, pointer(norm_weight), pointer(norm_bias),
              pointer(hidden_weight), eps, pointer(biases), pointer(levels), pointer(workspace), stream);
      },
      pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("route_workspace_size", &route_workspace_size);
}

}  // namespace dpn::python
