#include "ops/advance_layout.h"

#include <pybind11/stl.h>

#include "bindings.h"
#include "tensor_bridge.h"

namespace dpn::python {

namespace {

using Optional = std::optional<Tensor>;

const Tensor* pointer(const Optional& t) { return t ? &*t : nullptr; }

}  // namespace

void bind_advance_layout(pybind11::module_& m) {
  m.def(
      "advance_layout",
      [](const Tensor& chosen, const Tensor& experts, const Tensor& scales, const Tensor& out_cu_seqlens,
         const Tensor& out_image_starts, const Tensor& out_grids, const Tensor& out_router_rows,
         const Tensor& positions, const Tensor& cache_rows, const Optional& routed, const Optional& probs,
         const Optional& forced, const Tensor& kernels, std::int64_t min_visual_tokens, const Tensor& cu_seqlens,
         const Tensor& first_positions, const Tensor& first_cache_rows, const Tensor& cu_images,
         const Tensor& image_starts, const Tensor& grids, const Tensor& router_rows, const Tensor& cu_router_rows,
         Stream stream) {
        advance_layout(chosen, experts, scales, out_cu_seqlens, out_image_starts, out_grids, out_router_rows, positions,
                       cache_rows, pointer(routed), pointer(probs), pointer(forced), kernels, min_visual_tokens,
                       cu_seqlens, first_positions, first_cache_rows, cu_images, image_starts, grids, router_rows,
                       cu_router_rows, stream);
      },
      pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace dpn::python
