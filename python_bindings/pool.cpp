#include "ops/pool.h"

#include <pybind11/stl.h>

#include "bindings.h"
#include "core/check.h"
#include "tensor_bridge.h"

namespace dpn::python {

void bind_pool(pybind11::module_& m) {
  using release_gil = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def(
      "pool",
      [](const Tensor& out, const Tensor& x, const Tensor& cu_seqlens, const Tensor& cu_images,
         const Tensor& image_starts, const Tensor& grids, const Tensor& experts, const Tensor& kernels,
         const Tensor& out_cu_seqlens, const std::optional<Tensor>& scales, const std::optional<Tensor>& lengths,
         const std::string& function, const std::optional<std::vector<Tensor>>& conv_weights, Stream stream) {
        pool(out, x, cu_seqlens, cu_images, image_starts, grids, experts, kernels, out_cu_seqlens,
             scales ? &*scales : nullptr, lengths ? &*lengths : nullptr, function, conv_weights, stream);
      },
      release_gil());
  // The number of rows of pool's output, read without a round trip through a one-element torch tensor.
  m.def("pool_num_out_tokens", [](const Tensor& out_cu_seqlens) {
    const Checker check("pool");
    Dim num_offsets("num_seqs + 1");
    check.contiguous("out_cu_seqlens", out_cu_seqlens, {&num_offsets}, {DType::i32})
        .condition(num_offsets > 0, "out_cu_seqlens is empty, expected num_seqs + 1 entries");
    const std::int64_t last = out_cu_seqlens.as<std::int32_t>()[num_offsets - 1];
    check.condition(last >= 0, "out_cu_seqlens ends with " + std::to_string(last) + ", expected at least 0");
    return last;
  });
}

}  // namespace dpn::python
