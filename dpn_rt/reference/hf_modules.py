"""transformers' modules as the eager model uses them; works with transformers 4.57 to 5.x."""

from __future__ import annotations

import inspect
import json
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaModel,
    Qwen3Config,
    Qwen3Model,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from dpn_rt.builders.clip_config import ACTIVATIONS
from dpn_rt.model.config import DecoderConfig
from dpn_rt.model.vision.clip.config import ClipConfig
from dpn_rt.model.vision.siglip.config import SiglipConfig

Tower = CLIPVisionModel | SiglipVisionModel
TextModel = LlamaModel | Qwen3Model

ATTENTION = "sdpa"
_PUBLISHED_ACTIVATIONS = {own: published for published, own in ACTIVATIONS.items()}


def llama_config(decoder: DecoderConfig) -> LlamaConfig | Qwen3Config:
    """transformers' configuration of the decoder, with sdpa attention. Windows are given to its layers as masks."""
    scaling: dict[str, Any] = json.loads(decoder.rope.scaling_json) if decoder.rope.scaling_json else {}
    if "type" in scaling:
        scaling.setdefault("rope_type", scaling.pop("type"))
    rope: dict[str, Any] = {"rope_theta": decoder.rope.theta, "rope_scaling": scaling or None}
    if "rope_parameters" in inspect.signature(LlamaConfig.__init__).parameters:  # transformers 5
        rope = {"rope_parameters": {"rope_type": "default", **scaling, "rope_theta": decoder.rope.theta}}
    config = (Qwen3Config if decoder.qk_norm else LlamaConfig)(
        vocab_size=decoder.vocab_size,
        hidden_size=decoder.hidden_size,
        intermediate_size=decoder.intermediate_size,
        num_hidden_layers=decoder.num_layers,
        num_attention_heads=decoder.num_heads,
        num_key_value_heads=decoder.num_kv_heads,
        head_dim=decoder.head_dim,
        rms_norm_eps=decoder.rms_norm_eps,
        max_position_embeddings=decoder.max_position_embeddings,
        attention_bias=decoder.qkv_bias or decoder.o_bias,
        tie_word_embeddings=decoder.tie_word_embeddings,
        pad_token_id=None,
        **rope,
    )
    config._attn_implementation = ATTENTION
    return config


def text_model(decoder: DecoderConfig) -> TextModel:
    """transformers' model of the decoder, with random weights."""
    config = llama_config(decoder)
    model = Qwen3Model(config) if isinstance(config, Qwen3Config) else LlamaModel(config)
    _drop_biases(model, decoder)
    return model


def window_mask(positions: torch.Tensor, key_positions: torch.Tensor, window: int | None) -> torch.Tensor | None:
    """What rows see of keys in a layer with a sliding window, by transformers' rule.

    Args:
        positions: `[num_rows]`.
        key_positions: `[num_keys]` of all keys; those of the rows are the last.
        window: None: the layer has none.

    Returns:
        `[1, 1, num_rows, num_keys]` bool; None where no row needs a mask: sdpa has a causal mode for a prefill, and a
        single row sees all cached rows.
    """
    if window is None or int(positions[-1] - key_positions[0]) < window:
        return None
    q_idx, kv_idx = positions[:, None], key_positions[None]
    return ((kv_idx > q_idx - window) & (kv_idx <= q_idx))[None, None]


def _drop_biases(model: TextModel, decoder: DecoderConfig) -> None:
    """Remove the attention biases that the decoder does not have: transformers' LLaMA has all of them or none."""
    for layer in model.layers:
        attention: Any = layer.self_attn
        absent = () if decoder.qkv_bias else (attention.q_proj, attention.k_proj, attention.v_proj)
        for linear in absent if decoder.o_bias else (*absent, attention.o_proj):
            linear.bias = None


def clip_config(vision: ClipConfig, *, num_layers: int | None = None) -> Any:
    """transformers' CLIPVisionConfig or SiglipVisionConfig of a vision tower; `num_layers` overrides its own."""
    is_siglip = isinstance(vision, SiglipConfig)
    kind: Any = SiglipVisionConfig if is_siglip else CLIPVisionConfig
    config = kind(
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        num_hidden_layers=vision.num_layers if num_layers is None else num_layers,
        num_attention_heads=vision.num_heads,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        layer_norm_eps=vision.layer_norm_eps,
        hidden_act=_PUBLISHED_ACTIVATIONS[vision.activation],
        **({"vision_use_head": False} if is_siglip else {}),
    )
    config._attn_implementation = ATTENTION
    return config


def clip_tower(vision: ClipConfig) -> Tower:
    """transformers' vision tower, with random weights."""
    config = clip_config(vision)
    return SiglipVisionModel(config) if isinstance(vision, SiglipConfig) else CLIPVisionModel(config)


def last_hidden(tower: Tower, pixels: torch.Tensor) -> torch.Tensor:
    """Hidden states after the last layer, without the norm that follows it in SigLIP."""
    output: Any = tower(pixels, output_hidden_states=True)
    if output.hidden_states:
        return cast(torch.Tensor, output.hidden_states[-1])
    inner: Any = getattr(tower, "vision_model", tower)  # transformers 5 tells of none where there are no layers
    embeddings = inner.embeddings(pixels)
    return cast(torch.Tensor, inner.pre_layrnorm(embeddings) if hasattr(inner, "pre_layrnorm") else embeddings)


def clip_prefix(tower: Tower) -> str:
    """Prefix of the tower's weight names: transformers 4 nests them one level deeper than transformers 5."""
    return "vision_model." if hasattr(tower, "vision_model") else ""


def clip_core(tower: Tower) -> Any:
    """The module that holds `embeddings`, `pre_layrnorm`, `encoder` and `post_layernorm`."""
    return getattr(tower, "vision_model", tower)


def run_clip_layer(layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """One layer of a tower on [num_images, num_rows, hidden_size]; transformers 4 has more arguments and a tuple."""
    masks = [name for name in inspect.signature(layer.forward).parameters if name.endswith("attention_mask")]
    output: Any = layer(hidden, **dict.fromkeys(masks))
    return cast(torch.Tensor, output[0] if isinstance(output, tuple) else output)


def checkpoint_activations(model: Any, options: dict[str, Any]) -> None:
    """Make the model's layers compute their activations again in the backward pass.

    Args:
        model: a PreTrainedModel.
        options: of `activation_checkpointing_enable`.
    """
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(**options)
    else:  # older transformers have other names for the method and its argument
        renamed = {key.replace("activation_", "gradient_"): value for key, value in options.items()}
        model.gradient_checkpointing_enable(**renamed)


def restore_llama_buffers(model: Any) -> None:
    """Recompute the buffers of a `TextModel` that was made on the meta device; checkpoints do not hold them."""
    with torch.device("cpu"):
        model.rotary_emb = type(model.rotary_emb)(config=model.config)


def restore_clip_buffers(tower: Tower) -> None:
    """As `restore_llama_buffers`. Also resets the last layer norm, which no engine has: LLaVA does not use it."""
    core = clip_core(tower)
    positions = torch.arange(core.embeddings.num_positions).expand((1, -1))
    core.embeddings.register_buffer("position_ids", positions, persistent=False)
    norm = core.post_layernorm
    norm.weight = nn.Parameter(torch.ones(norm.weight.shape, dtype=norm.weight.dtype))
    norm.bias = nn.Parameter(torch.zeros(norm.bias.shape, dtype=norm.bias.dtype))
