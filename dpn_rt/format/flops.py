"""FLOPs and bytes of a model, computed from its shapes. Measured times are compared with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dpn_rt.format.config import ModelConfig
from dpn_rt.format.weight_spec import canonical_specs
from dpn_rt.model.config import DecoderConfig
from dpn_rt.model.decoder_weights import LAYERS, head_module
from dpn_rt.model.reduction.choice import Choice
from dpn_rt.model.weights.forms import stored_specs
from dpn_rt.schema.weights import TORCH_DTYPES

Route = Sequence[int]


@dataclass(frozen=True)
class StageRows:
    """Rows of one sample per stage."""

    rows: tuple[int, ...]
    """All rows."""
    visual: tuple[int, ...]
    """Visual rows."""


def stage_rows(model: ModelConfig, route: Route | None, num_text: int) -> StageRows:
    """Rows per stage of a prompt with one image.

    Args:
        model: with a vision encoder.
        route: expert per boundary; None: nothing is pooled.
        num_text: rows of text.
    """
    assert model.vision is not None
    grid = model.vision.grid
    assert grid is not None, "an image in tiles has no grid of its own"
    num_visual = grid[0] * grid[1]
    rows = [num_text + num_visual] * len(model.stage_layers)
    if route is not None:
        rows = list(model.reduction.most_rows(num_text + num_visual, [(grid,)], [Choice(expert) for expert in route]))
    return StageRows(tuple(rows), tuple(n - num_text for n in rows))


def layer_weights(config: DecoderConfig) -> int:
    """Elements of one decoder layer's matrices."""
    attention = config.num_heads * config.head_dim
    matrices = config.qkv_size * config.hidden_size + config.hidden_size * attention
    return matrices + 3 * config.intermediate_size * config.hidden_size


def causal_attention(config: DecoderConfig, rows: int, window: int | None = None) -> int:
    """FLOPs of one layer's causal attention over `rows` rows. A multiply-add counts as 2.

    Row i sees i + 1 rows, or `window` of them where that is less: as many as with positions that have no gaps.
    """
    window = rows if window is None else min(window, rows)
    seen = window * (window + 1) // 2 + (rows - window) * window
    return 4 * config.num_heads * config.head_dim * seen


def prefill_flops(model: ModelConfig, rows: Sequence[int]) -> int:
    """Decoder FLOPs of one sample with `rows` rows per stage. The output layer runs on the last row alone."""
    decoder = model.decoder
    total = 2 * decoder.vocab_size * decoder.hidden_size
    for layers, num_rows in zip(model.stage_layers, rows, strict=True):
        total += len(layers) * 2 * layer_weights(decoder) * num_rows
        total += sum(causal_attention(decoder, num_rows, decoder.window(layer)) for layer in layers)
    return total


def needed_prefill_flops(model: ModelConfig, rows: Sequence[int]) -> int:
    """FLOPs that dpn_rt computes in a prefill: rates are based on them, so they do not count work that it leaves out.

    As `prefill_flops`, but the last layer computes only keys and values of all rows but the last one.
    """
    decoder, others = model.decoder, rows[-1] - 1
    kept = 2 * decoder.qkv_size * decoder.hidden_size * others
    window = decoder.window(decoder.num_layers - 1)
    of_last_row = 4 * decoder.num_heads * decoder.head_dim * (rows[-1] if window is None else min(window, rows[-1]))
    attention = causal_attention(decoder, rows[-1], window) - of_last_row
    return prefill_flops(model, rows) - (2 * layer_weights(decoder) * others - kept) - attention


def vision_flops(model: ModelConfig) -> int:
    """FLOPs of encoder and projector for an image of one crop."""
    assert model.vision is not None and model.projector is not None
    projector = model.projector.flops(model.vision.max_visual_tokens, model.decoder.hidden_size)
    return model.vision.flops_per_crop + projector


def kv_rows(model: ModelConfig, lengths: Sequence[int]) -> int:
    """Cached rows of one sample with `lengths` rows per stage, summed over the layers."""
    stages = zip(model.stage_layers, lengths, strict=True)
    return sum(len(layers) * length for layers, length in stages)


def kv_row_bytes(model: ModelConfig) -> int:
    """Bytes of the key and value of one row in one layer."""
    return 2 * model.decoder.num_kv_heads * model.decoder.head_dim * TORCH_DTYPES[model.dtype].itemsize


def decode_weight_bytes(model: ModelConfig) -> int:
    """Bytes of the weights that one decode step reads; the same for any number of sequences."""
    head = head_module(model.decoder)
    return sum(
        stored.num_bytes
        for name, spec in canonical_specs(model).items()
        if name == f"{head}.weight" or (spec.least_bits is not None and name.startswith(f"{LAYERS}."))
        for stored in stored_specs(name, spec, model.quantize).values()
    )
