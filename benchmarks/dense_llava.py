"""transformers' LlavaForConditionalGeneration (sdpa) on an engine's weights, without copying them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

from dpn_rt.format.config import ModelConfig
from dpn_rt.reference import hf_modules
from dpn_rt.reference.weights import NameMap, decoder_map, load_canonical, vision_map
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
    names = _names(config, model)
    load_canonical(model, names, ((name, weights[name]) for name in names), copy=False)
    _repeat_last_layer(model)
    implementations = {module.config._attn_implementation for module in model.modules() if hasattr(module, "is_causal")}
    assert implementations == {hf_modules.ATTENTION}, f"the baseline must run sdpa, got {implementations}"
    return model.requires_grad_(False)


def _names(config: ModelConfig, model: LlavaForConditionalGeneration) -> NameMap:
    projector: NameMap = {}
    for index, linear in (("0", "linear_1"), ("2", "linear_2")):
        for kind in ("weight", "bias"):
            projector[f"projector.{index}.{kind}"] = (f"model.multi_modal_projector.{linear}.{kind}",)
    tower = f"model.vision_tower.{hf_modules.clip_prefix(model.model.vision_tower)}"
    return decoder_map(config, "model.language_model.") | vision_map(config, tower) | projector


def _repeat_last_layer(model: LlavaForConditionalGeneration) -> None:
    """Use the last layer but one as the tower's last: LLaVA drops its output, so an engine has no weights for it."""
    layers: nn.ModuleList = hf_modules.clip_core(model.model.vision_tower).encoder.layers
    layers[-1] = layers[-2]
