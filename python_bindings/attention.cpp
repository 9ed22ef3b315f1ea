#include "ops/attention.h"

#include <pybind11/stl.h>

#include "bindings.h"
#include "tensor_bridge.h"

namespace dpn::python {

void bind_attention(pybind11::module_& m) {
  using release_gil = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("attention", &attention, release_gil());
  m.def("attention_extend", &attention_extend, release_gil());
  m.def(
      "attention_decode",
      [](const Tensor& out, const Tensor& q, const Tensor& kv_cache, std::int64_t layer_in_cell,
         const Tensor& block_table, const Tensor& context_lens, float scale, const std::optional<Tensor>& workspace,
         Stream stream) {
        attention_decode(out, q, kv_cache, layer_in_cell, block_table, context_lens, scale,
                         workspace ? &*workspace : nullptr, stream);
      },
      release_gil());
  m.def("attention_decode_workspace_size", &attention_decode_workspace_size, release_gil());
}

}  // namespace dpn::python
