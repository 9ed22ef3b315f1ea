#include "ops/reduction/kept_rows.h"

#include "core/check.h"

namespace dpn {

namespace {

void run(const KeptRowsParams& params, const Tensor& cu_seqlens, Stream stream) {
  DPN_CALL_KERNEL(kept_rows_kernel, params, cu_seqlens, stream)
}

// Checks that the kept rows of image i are ascending rows of it.
void check_kept(const Checker& check, const KeptRowsParams& p, std::int64_t i) {
  std::int64_t least = 0;
  for (std::int64_t k = p.cu_kept[i]; k < p.cu_kept[i + 1]; ++k) {
    if (p.kept[k] < least || p.kept[k] >= p.image_lengths[i]) {
      check.fail(at("kept", k) + " is " + std::to_string(p.kept[k]) + ", expected " + std::to_string(least) + " to " +
                 std::to_string(p.image_lengths[i] - 1) + ": ascending rows of image " + std::to_string(i));
    }
    least = p.kept[k] + std::int64_t{1};
  }
}

// Checks that the images of sequence b follow each other within it. Returns its number of rows in the next stage.
std::int64_t kept_length(const Checker& check, const KeptRowsParams& p, std::int64_t b) {
  const std::int64_t length = p.cu_seqlens[b + 1] - p.cu_seqlens[b];
  std::int64_t end = 0, dropped = 0;  // end: where the image before ends
  for (std::int64_t i = p.cu_images[b]; i < p.cu_images[b + 1]; ++i) {
    const std::int64_t start = p.image_starts[i], rows = p.image_lengths[i];
    if (rows < 0) check.fail(at("image_lengths", i) + " is " + std::to_string(rows) + ", expected at least 0");
    if (start < 0 || start + rows > length) {
      check.fail(at("image_lengths", i) + " is " + std::to_string(rows) + " from row " + std::to_string(start) +
                 " on, but the sequence has " + std::to_string(length) + " rows");
    }
    if (start < end) {
      check.fail(at("image_starts", i) + " is " + std::to_string(start) + ", expected at least " + std::to_string(end) +
                 ", where the image before it ends");
    }
    check_kept(check, p, i);
    end = start + rows;
    dropped += rows - (p.cu_kept[i + 1] - p.cu_kept[i]);
  }
  return length - dropped;
}

void check_content(const Checker& check, const KeptRowsParams& p, std::int64_t num_tokens, std::int64_t num_kept) {
  check_offsets(check, "cu_seqlens", p.cu_seqlens, p.num_seqs, num_tokens);
  check_offsets(check, "out_cu_seqlens", p.out_cu_seqlens, p.num_seqs, p.num_out_tokens, "num_out_tokens");
  check_offsets(check, "cu_images", p.cu_images, p.num_seqs, p.num_images, "num_images");
  check_offsets(check, "cu_kept", p.cu_kept, p.num_images, num_kept, "num_kept");
  for (std::int64_t b = 0; b < p.num_seqs; ++b) {
    const std::int64_t expected = kept_length(check, p, b), given = p.out_cu_seqlens[b + 1] - p.out_cu_seqlens[b];
    if (given != expected) {
      check.fail("out_cu_seqlens gives sequence " + std::to_string(b) + " " + std::to_string(given) +
                 " rows, expected " + std::to_string(expected) + " from what its images keep");
    }
  }
}

}  // namespace

void kept_rows(const Tensor& out, const Tensor& cu_seqlens, const Tensor& cu_images, const Tensor& image_starts,
               const Tensor& image_lengths, const Tensor& kept, const Tensor& cu_kept, const Tensor& out_cu_seqlens,
               std::optional<std::int64_t> num_tokens, Stream stream) {
  const Checker check("kept_rows", cu_seqlens);
  Dim num_offsets("num_seqs + 1"), num_images("num_images"), num_kept("num_kept"), num_out_tokens("num_out_tokens");
  check.contiguous("cu_seqlens", cu_seqlens, {&num_offsets}, {DType::i32})
      .condition(num_offsets > 0, "cu_seqlens is empty, expected num_seqs + 1 entries")
      .contiguous("cu_images", cu_images, {&num_offsets}, {DType::i32})
      .contiguous("image_starts", image_starts, {&num_images}, {DType::i32})
      .contiguous("image_lengths", image_lengths, {&num_images}, {DType::i32})
      .contiguous("kept", kept, {&num_kept}, {DType::i32});
  Dim num_kept_offsets("num_images + 1", num_images + 1);
  check.contiguous("cu_kept", cu_kept, {&num_kept_offsets}, {DType::i32})
      .contiguous("out_cu_seqlens", out_cu_seqlens, {&num_offsets}, {DType::i32})
      .contiguous("out", out, {&num_out_tokens}, {DType::i64})
      .no_overlap({{"out", &out}}, {{"cu_seqlens", &cu_seqlens},
                                    {"cu_images", &cu_images},
                                    {"image_starts", &image_starts},
                                    {"image_lengths", &image_lengths},
                                    {"kept", &kept},
                                    {"cu_kept", &cu_kept},
                                    {"out_cu_seqlens", &out_cu_seqlens}});
  const KeptRowsParams params{.out = out.as<std::int64_t>(),
                              .cu_seqlens = cu_seqlens.as<std::int32_t>(),
                              .cu_images = cu_images.as<std::int32_t>(),
                              .image_starts = image_starts.as<std::int32_t>(),
                              .image_lengths = image_lengths.as<std::int32_t>(),
                              .kept = kept.as<std::int32_t>(),
                              .cu_kept = cu_kept.as<std::int32_t>(),
                              .out_cu_seqlens = out_cu_seqlens.as<std::int32_t>(),
                              .num_images = num_images,
                              .num_out_tokens = num_out_tokens,
                              .num_seqs = num_offsets - 1};
  if (check.can_read()) {
    check_content(check, params, num_tokens.value_or(params.cu_seqlens[params.num_seqs]), num_kept);
  }
  run(params, cu_seqlens, stream);
}

}  // namespace dpn
