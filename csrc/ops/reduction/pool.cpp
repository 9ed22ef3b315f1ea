#include "ops/reduction/pool.h"

#include "core/check.h"
#include "ops/reduction/pooled_grid.h"

namespace dpn {

namespace {

void run(const PoolParams& params, const Tensor& x, Stream stream){DPN_CALL_KERNEL(pool_kernel, params, x, stream)}

PoolFunction function_of(const Checker& check, const std::string& name) {
  check.condition(name == "max" || name == "avg" || name == "conv",
                  "function is " + quoted(name) + ", expected 'max', 'avg' or 'conv'");
  return name == "max" ? PoolFunction::max : name == "avg" ? PoolFunction::avg : PoolFunction::conv;
}

// Number of rows of sequence b after pooling.
std::int64_t pooled_length(const Checker& check, const PoolParams& p, std::int64_t b) {
  std::int64_t length = p.cu_seqlens[b + 1] - p.cu_seqlens[b];
  check_images(check, p.images, b, length);
  for (std::int64_t i = p.images.cu_images[b]; i < p.images.cu_images[b + 1]; ++i) {
    const std::int64_t expert = p.experts[i];
    if (expert == -1) continue;
    if (expert < -1 || expert >= p.num_experts) check.range(at("experts", i).c_str(), expert, -1, p.num_experts - 1);
    const Grid grid = grid_at(p.images.grids, i), kernel = grid_at(p.kernels, expert);
    if (!fits(kernel, grid)) {
      check.fail(at("experts", i) + " has the kernel " + grid_text(kernel.height, kernel.width) +
                 ", which does not fit its grid " + grid_text(grid.height, grid.width));
    }
    length -= num_rows(grid) - num_rows(pooled_grid(grid, kernel));
  }
  return length;
}

// Checks the content of the tensors: offsets, kernels and images, and that `out_cu_seqlens` is the result of the
// experts.
void check_content(const Checker& check, const PoolParams& p) {
  check_offsets(check, "cu_seqlens", p.cu_seqlens, p.num_seqs, p.num_tokens);
  check_offsets(check, "out_cu_seqlens", p.out_cu_seqlens, p.num_seqs, p.num_out_tokens);
  check_offsets(check, "cu_images", p.images.cu_images, p.num_seqs, p.images.num_images, "num_images");
  check_entries(check, "kernels", p.kernels, 2 * p.num_experts, 1, kLargestKernel);
  for (std::int64_t b = 0; b < p.num_seqs; ++b) {
    const std::int64_t expected = pooled_length(check, p, b);
    const std::int64_t given = p.out_cu_seqlens[b + 1] - p.out_cu_seqlens[b];
    if (given != expected) {
      check.fail("out_cu_seqlens gives sequence " + std::to_string(b) + " " + std::to_string(given) +
                 " rows, expected " + std::to_string(expected) + " from its experts");
    }
  }
}

// kernels: [num_experts, 2], or null where the host cannot read them.
std::vector<const void*> conv_pointers(const Checker& check, const Tensor& x, const Tensor& out,
                                       const std::vector<Tensor>& weights, const std::int32_t* kernels,
                                       Dim& num_experts, Dim& hidden_size) {
  check.condition(static_cast<std::int64_t>(weights.size()) == num_experts,
                  "conv_weights has " + std::to_string(weights.size()) + " entries, expected one for each of " +
                      std::to_string(num_experts) + " kernels");
  std::vector<const void*> pointers;
  for (std::size_t e = 0; e < weights.size(); ++e) {
    const std::string argument = at("conv_weights", static_cast<std::int64_t>(e));
    Dim area("kernel height * width");
    if (kernels) area.value = std::int64_t{kernels[2 * e]} * kernels[2 * e + 1];
    check.contiguous(argument.c_str(), weights[e], {&area, &hidden_size}, {x.dtype})
        .no_overlap("out", out, argument.c_str(), weights[e]);
    pointers.push_back(weights[e].data);
  }
  return pointers;
}

}  // namespace

void pool(const Tensor& out, const Tensor& x, const Tensor& cu_seqlens, const Tensor& cu_images,
          const Tensor& image_starts, const Tensor& grids, const Tensor& experts, const Tensor& kernels,
          const Tensor& out_cu_seqlens, const OptionalTensor& scales, const std::string& function_name,
          const std::optional<std::vector<Tensor>>& conv_weights, Stream stream) {
  const Checker check("pool", x);
  const PoolFunction function = function_of(check, function_name);
  check.condition((function == PoolFunction::conv) == conv_weights.has_value(),
                  "conv_weights must be given for function 'conv' and for no other");
  Dim num_tokens("num_tokens"), hidden_size("hidden_size"), num_seqs("num_seqs"), num_offsets("num_seqs + 1");
  Dim num_images("num_images"), num_experts("num_experts"), num_out_tokens("num_out_tokens"), two("2", 2);
  check.tensor("x", x, {&num_tokens, &hidden_size}, check.floats())
      .contiguous("experts", experts, {&num_images}, {DType::i32})
      .contiguous("image_starts", image_starts, {&num_images}, {DType::i32})
      .contiguous("grids", grids, {&num_images, &two}, {DType::i32})
      .contiguous("kernels", kernels, {&num_experts, &two}, {DType::i32})
      .contiguous("out", out, {&num_out_tokens, &hidden_size}, {x.dtype});
  check.contiguous("cu_seqlens", cu_seqlens, {&num_offsets}, {DType::i32})
      .condition(num_offsets > 0, "cu_seqlens is empty, expected num_seqs + 1 entries");
  num_seqs.value = num_offsets - 1;
  check.contiguous("cu_images", cu_images, {&num_offsets}, {DType::i32})
      .contiguous("out_cu_seqlens", out_cu_seqlens, {&num_offsets}, {DType::i32});
  if (scales)
    check.contiguous("scales", *scales, {&num_images}, {DType::f32}).no_overlap("out", out, "scales", *scales);
  check.no_overlap({{"out", &out}}, {{"x", &x},
                                     {"cu_seqlens", &cu_seqlens},
                                     {"cu_images", &cu_images},
                                     {"image_starts", &image_starts},
                                     {"grids", &grids},
                                     {"experts", &experts},
                                     {"kernels", &kernels},
                                     {"out_cu_seqlens", &out_cu_seqlens}});
  std::vector<const void*> conv;
  if (conv_weights) {
    conv = conv_pointers(check, x, out, *conv_weights, check.can_read() ? kernels.as<std::int32_t>() : nullptr,
                         num_experts, hidden_size);
  }
  const PoolParams params{.out = out.data,
                          .x = x.data,
                          .cu_seqlens = cu_seqlens.as<std::int32_t>(),
                          .images = {.cu_images = cu_images.as<std::int32_t>(),
                                     .starts = image_starts.as<std::int32_t>(),
                                     .grids = grids.as<std::int32_t>(),
                                     .num_images = num_images},
                          .experts = experts.as<std::int32_t>(),
                          .kernels = kernels.as<std::int32_t>(),
                          .out_cu_seqlens = out_cu_seqlens.as<std::int32_t>(),
                          .scales = as_or_null<float>(scales),
                          .conv_weights = conv.empty() ? nullptr : conv.data(),
                          .num_tokens = num_tokens,
                          .num_out_tokens = num_out_tokens,
                          .num_seqs = num_seqs,
                          .num_experts = num_experts,
                          .hidden_size = hidden_size,
                          .x_stride = x.strides[0],
                          .function = function,
                          .dtype = x.dtype};
  if (check.can_read()) check_content(check, params);
  run(params, x, stream);
}

}  // namespace dpn
