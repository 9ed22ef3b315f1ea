#include "core/parallel.h"
#include "core/simd.h"
#include "ops/embedding/embedding.h"

namespace dpn::DPN_ISA {

namespace {

template <class T>
void copy_row(const EmbeddingParams& p, std::int64_t id, T* out) {
  std::memcpy(out, static_cast<const T*>(p.table) + id * p.hidden_size,
              static_cast<std::size_t>(p.hidden_size) * sizeof(T));
}

// 4 columns of a row stand together, and those of the tile's other rows between them and the next.
template <class T>
void dequantize_row(const EmbeddingParams& p, std::int64_t id, T* out) {
  constexpr int kZero = 128;
  const std::int64_t quads = ceil_div(p.hidden_size, kTileColumns);
  const auto* bytes = static_cast<const std::uint8_t*>(p.table) +
                      (id / kPanelRows * quads * kPanelRows + id % kPanelRows) * kTileColumns;
  for (std::int64_t column = 0; column < p.hidden_size; ++column) {
    const std::int64_t quad = column / kTileColumns;
    const int value = bytes[quad * kPanelRows * kTileColumns + column % kTileColumns] - kZero;
    out[column] = from_float<T>(static_cast<float>(value) * p.scale[id]);
  }
}

template <class T>
void look_up(const EmbeddingParams& p) {
  parallel_rows(p.num_tokens, p.hidden_size * static_cast<std::int64_t>(2 * sizeof(T)),
                [&](std::int64_t begin, std::int64_t end) {
                  for (std::int64_t token = begin; token < end; ++token) {
                    const std::int64_t id = p.token_ids[token] < 0 ? 0 : p.token_ids[token];
                    T* const out = static_cast<T*>(p.out) + token * p.hidden_size;
                    p.scale ? dequantize_row(p, id, out) : copy_row(p, id, out);
                  }
                });
}

}  // namespace

void embedding_kernel(const EmbeddingParams& p) { p.dtype == DType::f32 ? look_up<float>(p) : look_up<bf16>(p); }

}  // namespace dpn::DPN_ISA
