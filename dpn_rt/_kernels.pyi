"""The compiled kernels. Shapes, dtypes and errors are documented in dpn_rt/ops, the only importer."""

from collections.abc import Sequence

from torch import Tensor

def available_cpu_isas() -> list[str]: ...
def cpu_isa() -> str: ...
def max_threads() -> int: ...
def activation(out: Tensor, x: Tensor, kind: str, /) -> None: ...
def silu_mul(out: Tensor, gate_up: Tensor, /) -> None: ...
def attention(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool, scale: float, /
) -> None: ...
def attention_extend(
    out: Tensor,
    q: Tensor,
    kv_cache: Tensor,
    layer_in_cell: int,
    block_table: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    scale: float,
    /,
) -> None: ...
def attention_decode(
    out: Tensor,
    q: Tensor,
    kv_cache: Tensor,
    layer_in_cell: int,
    block_table: Tensor,
    context_lens: Tensor,
    scale: float,
    /,
) -> None: ...
def linear(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, /) -> None: ...
def rms_norm(out: Tensor, x: Tensor, weight: Tensor, eps: float, /) -> None: ...
def add_rms_norm(out: Tensor, x: Tensor, residual: Tensor, weight: Tensor, eps: float, /) -> None: ...
def layer_norm(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, /) -> None: ...
def add_layer_norm(out: Tensor, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, /) -> None: ...
def rope_store(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    kv_cache: Tensor,
    layer_in_cell: int,
    block_table: Tensor,
    cu_seqlens: Tensor,
    num_heads: int,
    num_kv_heads: int,
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
    /,
) -> None: ...
def pool(
    out: Tensor,
    x: Tensor,
    cu_seqlens: Tensor,
    image_start: Tensor,
    grids: Tensor,
    experts: Tensor,
    kernels: Tensor,
    out_cu_seqlens: Tensor,
    scales: Tensor | None,
    function: str,
    conv_weights: Sequence[Tensor] | None,
    /,
) -> None: ...
def pool_num_out_tokens(out_cu_seqlens: Tensor, /) -> int: ...
