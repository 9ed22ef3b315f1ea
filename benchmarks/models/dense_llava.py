"""transformers' LlavaForConditionalGeneration (sdpa) on an engine's weights, without copying them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

from dpn_rt.builders.names import HUGGINGFACE_PROJECTOR, NameMap, clip_modules, llama_modules, weight_names
from dpn_rt.format.config import ModelConfig
from dpn_rt.model.vision.projector import PROJECTOR_MODULES
from dpn_rt.reference import hf_modules
from dpn_rt.reference.weights import load_canonical
from dpn_rt.schema.weights import TORCH_DTYPES

IMAGE_TOKEN = 6


def dense_llava(config: ModelConfig, weights: Mapping[str, torch.Tensor]) -> LlavaForConditionalGeneration:
    """The dense model as a user of transformers runs it, with the tower's layer after the selected one."""
    assert config.vision is not None
    llava_config = LlavaConfig(
        vision_config=hf_modules.clip_config(config.vision, num_layers=config.vision.num_layers + 1),
        text_config=hf_modules.llama_config(config.decoder),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    llava_config._attn_implementation = hf_modules.ATTENTION
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(llava_config)
    model = model.to(TORCH_DTYPES[config.dtype]).eval()
    hf_modules.restore_llama_buffers(model.model.language_model)
    hf_modules.restore_clip_buffers(model.model.vision_tower)
    names = _names(weights, config, model)
    load_canonical(model, names, ((name, weights[name]) for name in names), copy=False)
    _repeat_last_layer(model)
    implementations = {module.config._attn_implementation for module in model.modules() if hasattr(module, "is_causal")}
    assert implementations == {hf_modules.ATTENTION}, f"the baseline must run sdpa, got {implementations}"
    return model.requires_grad_(False)


def _names(weights: Iterable[str], config: ModelConfig, model: LlavaForConditionalGeneration) -> NameMap:
    """Names of those weights that a dense model has."""
    assert config.vision is not None
    tower = f"model.vision_tower.{hf_modules.clip_prefix(model.model.vision_tower)}"
    modules = llama_modules(config.decoder.num_layers, "model.language_model.", "lm_head")
    modules |= clip_modules(config.vision.num_layers, tower)
    for canonical, published in zip(PROJECTOR_MODULES, HUGGINGFACE_PROJECTOR, strict=True):
        modules[canonical] = (f"model.multi_modal_projector.{published}",)
    return weight_names((name for name in weights if name.rpartition(".")[0] in modules), modules)


def _repeat_last_layer(model: LlavaForConditionalGeneration) -> None:
    """Use the last layer but one as the tower's last: LLaVA drops its output, so an engine has no weights for it."""
    layers: nn.ModuleList = hf_modules.clip_core(model.model.vision_tower).encoder.layers
    layers[-1] = layers[-2]
