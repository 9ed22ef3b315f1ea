"""The compiled kernels. Shapes, dtypes and errors are documented in dpn_rt/ops, the only importer."""

from collections.abc import Sequence

from torch import Tensor

def available_cpu_isas() -> list[str]: ...

has_cuda: bool
cuda_head_dims: tuple[int, ...]

def cpu_isa() -> str: ...
def tuned_cpu_isa(op: str, /) -> str: ...
def tune_cpu_isa(op: str, isa: str, /) -> None: ...
def max_threads() -> int: ...

class Recording:
    def begin(self) -> None: ...
    def end(self) -> None: ...
    def replay(self) -> None: ...
    def __len__(self) -> int: ...

def embedding(out: Tensor, table: Tensor, scale: Tensor | None, token_ids: Tensor, /) -> None: ...
def activation(out: Tensor, x: Tensor, kind: str, stream: int, /) -> None: ...
def silu_mul(out: Tensor, gate_up: Tensor, stream: int, /) -> None: ...
def attention(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    first_keys: Tensor | None,
    causal: bool,
    scale: float,
    stream: int,
    /,
) -> None: ...
def attention_extend(
    out: Tensor,
    q: Tensor,
    kv_cache: Tensor,
    layer_in_block: int,
    block_table: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    first_keys: Tensor | None,
    scale: float,
    stream: int,
    /,
) -> None: ...
def attention_decode(
    out: Tensor,
    q: Tensor,
    kv_cache: Tensor,
    layer_in_block: int,
    block_table: Tensor,
    context_lens: Tensor,
    first_keys: Tensor | None,
    scale: float,
    workspace: Tensor | None,
    stream: int,
    /,
) -> None: ...
def depthwise_conv(out: Tensor, x: Tensor, taps: Tensor, bias: Tensor, /) -> None: ...
def linear(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, /) -> None: ...
def linear_int4(
    out: Tensor, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, activation: str | None, /
) -> None: ...
def linear_int8(
    out: Tensor, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, activation: str | None, /
) -> None: ...
def quantize(out: Tensor, scale: Tensor, x: Tensor, stream: int, /) -> None: ...
def dequantize(
    out: Tensor,
    sums: Tensor,
    row_scale: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    activation: str | None,
    stream: int,
    /,
) -> None: ...
def rms_norm(out: Tensor, x: Tensor, weight: Tensor, eps: float, stream: int, /) -> None: ...
def add_rms_norm(out: Tensor, x: Tensor, residual: Tensor, weight: Tensor, eps: float, stream: int, /) -> None: ...
def layer_norm(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, stream: int, /) -> None: ...
def add_layer_norm(
    out: Tensor, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, stream: int, /
) -> None: ...
def rope_store(
    qkv: Tensor,
    positions: Tensor,
    cache_rows: Tensor,
    cos_sin: Tensor,
    kv_cache: Tensor,
    layer_in_block: int,
    block_table: Tensor,
    cu_seqlens: Tensor,
    num_heads: int,
    num_kv_heads: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    stream: int,
    /,
) -> None: ...
def route(
    probs: Tensor,
    experts: Tensor,
    hidden: Tensor,
    router_rows: Tensor,
    cu_router_rows: Tensor,
    predictor: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    hidden_weight: Tensor | None,
    eps: float,
    biases: Tensor | None,
    levels: Tensor | None,
    workspace: Tensor | None,
    stream: int,
    /,
) -> None: ...
def pool(
    out: Tensor,
    x: Tensor,
    cu_seqlens: Tensor,
    cu_images: Tensor,
    image_starts: Tensor,
    grids: Tensor,
    experts: Tensor,
    kernels: Tensor,
    out_cu_seqlens: Tensor,
    scales: Tensor | None,
    function: str,
    conv_weights: Sequence[Tensor] | None,
    stream: int,
    /,
) -> None: ...
def packed_size(kernel: str, argument: str, offsets: Tensor, /) -> int: ...
def attention_decode_workspace_size(q: Tensor, kv_cache: Tensor, block_table: Tensor, /) -> int: ...
def route_workspace_size(hidden: Tensor, cu_router_rows: Tensor, predictor: Tensor, /) -> int: ...
def last_row_scores(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor,
    segment_queries: Tensor,
    segment_starts: Tensor,
    cu_scores: Tensor,
    first_keys: Tensor | None,
    scale: float,
    workspace: Tensor | None,
    stream: int,
    /,
) -> None: ...
def last_row_scores_paged(
    out: Tensor,
    q: Tensor,
    blocks: Tensor,
    layer_in_block: int,
    block_table: Tensor,
    kv_lengths: Tensor,
    segment_queries: Tensor,
    segment_starts: Tensor,
    cu_scores: Tensor,
    first_keys: Tensor | None,
    scale: float,
    workspace: Tensor | None,
    stream: int,
    /,
) -> None: ...
def last_row_scores_workspace_size(q: Tensor, num_kv_heads: int, most_keys: int, /) -> int: ...
def segmented_top_k(out: Tensor, scores: Tensor, cu_scores: Tensor, cu_kept: Tensor, stream: int, /) -> None: ...
def kept_rows(
    out: Tensor,
    cu_seqlens: Tensor,
    cu_images: Tensor,
    image_starts: Tensor,
    image_lengths: Tensor,
    kept: Tensor,
    cu_kept: Tensor,
    out_cu_seqlens: Tensor,
    num_tokens: int | None,
    stream: int,
    /,
) -> None: ...
def sample(
    tokens: Tensor,
    is_finite: Tensor,
    logits: Tensor,
    depths: Tensor,
    temperatures: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    keys: Tensor,
    positions: Tensor,
    stream: int,
    /,
) -> None: ...
def sample_greedy(tokens: Tensor, logits: Tensor, stream: int, /) -> None: ...
def advance_layout(
    chosen: Tensor,
    experts: Tensor,
    scales: Tensor,
    out_cu_seqlens: Tensor,
    out_image_starts: Tensor,
    out_grids: Tensor,
    out_router_rows: Tensor,
    positions: Tensor,
    cache_rows: Tensor,
    routed: Tensor | None,
    probs: Tensor | None,
    forced: Tensor | None,
    kernels: Tensor,
    min_visual_tokens: int,
    cu_seqlens: Tensor,
    first_positions: Tensor,
    first_cache_rows: Tensor,
    cu_images: Tensor,
    image_starts: Tensor,
    grids: Tensor,
    router_rows: Tensor,
    cu_router_rows: Tensor,
    stream: int,
    /,
) -> None: ...
