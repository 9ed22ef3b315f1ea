"""Published names of the canonical weights, in one table.

A row of the table names a canonical module and the published modules whose rows it concatenates, in order. The suffix
of a weight (`weight`, `bias`) is the same for both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dpn_rt.format.config import ModelConfig, VisionConfig
from dpn_rt.model import decoder_weights as decoder
from dpn_rt.model.reduction import pooling_config as pooling
from dpn_rt.model.vision.anyres.config import AnyresConfig
from dpn_rt.model.vision.clip import names as clip
from dpn_rt.model.vision.hr import names as hr
from dpn_rt.model.vision.hr.config import HrConfig
from dpn_rt.model.vision.projector import PROJECTOR_MODULES

Modules = dict[str, tuple[str, ...]]
"""Canonical module -> the published modules that it concatenates."""
NameMap = dict[str, tuple[str, ...]]
"""Canonical weight -> the published weights that it concatenates."""

LLAMA: Modules = {decoder.EMBED_TOKENS: ("embed_tokens",), decoder.FINAL_NORM: ("norm",)}
LLAMA_LAYERS = "layers"
LLAMA_ROOTS = (*(published for (published,) in LLAMA.values()), LLAMA_LAYERS)
"""Prefix of the names of its weights."""
LLAMA_LAYER: Modules = {
    decoder.INPUT_NORM: ("input_layernorm",),
    decoder.QKV: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    decoder.Q_NORM: ("self_attn.q_norm",),
    decoder.K_NORM: ("self_attn.k_norm",),
    decoder.O_PROJ: ("self_attn.o_proj",),
    decoder.POST_NORM: ("post_attention_layernorm",),
    decoder.GATE_UP: ("mlp.gate_proj", "mlp.up_proj"),
    decoder.DOWN: ("mlp.down_proj",),
}
ROUTER = "pooling_router"
"""Name of the router's module in the decoder layer whose output is pooled; experts are there too."""
ROUTER_PARTS: Modules = {
    pooling.ROUTER_NORM: ("mlp1.0",),
    pooling.ROUTER_HIDDEN: ("mlp1.1",),
    pooling.ROUTER_PREDICTOR: ("predictor",),
}
EXPERTS = "experts"
ORIGINAL_PROJECTORS = {"mlp2x_gelu": ("mm_projector.0", "mm_projector.2"), "linear": ("mm_projector",)}
HUGGINGFACE_PROJECTOR = ("linear_1", "linear_2")

CLIP: Modules = {
    clip.TOWER: ("embeddings",),  # the class embedding belongs to the module itself
    clip.PATCH_EMBEDDING: ("embeddings.patch_embedding",),
    clip.POSITION_EMBEDDING: ("embeddings.position_embedding",),
    clip.PRE_NORM: ("pre_layrnorm",),  # CLIP's own spelling
}
CLIP_LAYERS = "encoder.layers"
CLIP_LAYER: Modules = {
    clip.NORM1: ("layer_norm1",),
    clip.QKV: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    clip.OUT: ("self_attn.out_proj",),
    clip.NORM2: ("layer_norm2",),
    clip.FC1: ("mlp.fc1",),
    clip.FC2: ("mlp.fc2",),
}

HR_FAST, HR_SLOW = "fast_vision_tower.vision_tower.vision_model.", "slow_vision_tower.vision_tower."
"""Prefixes of LLaVA-HR's two paths, below that of its tower."""
HR_STEM: Modules = {hr.STEM: ("stem.0",), hr.STEM_NORM: ("stem.1",)}
HR_DOWNSAMPLE: Modules = {hr.DOWNSAMPLE_NORM: ("downsample.0",), hr.DOWNSAMPLE: ("downsample.1",)}
HR_BLOCK: Modules = {
    hr.DEPTHWISE: ("conv_dw",),
    hr.NORM: ("norm",),
    hr.FC1: ("mlp.fc1",),
    hr.FC2: ("mlp.fc2",),
}
HR_ADAPTERS, HR_MIX = "align_stages_latent", "align_stages.0"
HR_ADAPTER: Modules = {
    hr.SLOW_CONV: ("slow_conv",),
    hr.SLOW_PROJ: ("slow_proj",),
    hr.FAST_CONV: ("fast_conv",),
    hr.FAST_PROJ: ("fast_proj",),
    hr.GATE_HIDDEN: ("gate.0",),
    hr.GATE: ("gate.2",),
}
SUFFIXES = {hr.LAYER_SCALE: "weight"}
"""Published suffixes of weights that have another in an engine."""

TENSORRT_LLM_LAYERS = "transformer.layers"
TENSORRT_LLM_LAYER: Modules = {
    decoder.INPUT_NORM: ("input_layernorm",),
    decoder.QKV: ("attention.qkv",),
    decoder.O_PROJ: ("attention.dense",),
    decoder.POST_NORM: ("post_layernorm",),
    decoder.GATE_UP: ("mlp.fc", "mlp.gate"),  # its `fc` goes through the activation, its `gate` is multiplied
    decoder.DOWN: ("mlp.proj",),
}
TENSORRT_LLM_NORM, TENSORRT_LLM_HEAD = "transformer.ln_f", "lm_head"


@dataclass(frozen=True)
class LayoutNames:
    """Names of the parts of a model in a layout."""

    decoder: str
    """Prefix of LLaMA's modules."""
    lm_head: str
    projector: tuple[str, ...]
    """Names of the projector's linear layers."""
    projector_prefix: str
    """Prefix of all names of the projector."""
    projector_bias: bool = True
    newline: str = "model.image_newline"
    """Of the row that ends the lines of images in tiles."""


def original_names(projector_type: str) -> LayoutNames:
    """The layout of the original LLaVA code and of DPN."""
    prefix = "model."
    projector = tuple(prefix + module for module in ORIGINAL_PROJECTORS[projector_type])
    return LayoutNames(prefix, "lm_head", projector, f"{prefix}{ORIGINAL_PROJECTORS['linear'][0]}.")


def published_modules(model: ModelConfig, names: LayoutNames, tower: Modules) -> Modules:
    """Canonical module -> published modules, for every module of a checkpoint.

    Args:
        names: of the checkpoint's layout.
        tower: the vision tower's modules; none without a tower.
    """
    modules = llama_modules(model.decoder.num_layers, names.decoder, names.lm_head)
    if isinstance(model.reduction, pooling.PoolingConfig):
        modules |= pooling_modules(model.reduction, names.decoder)
    modules |= {module: (published,) for module, published in zip(PROJECTOR_MODULES, names.projector, strict=False)}
    return modules | tower


def llama_modules(num_layers: int, prefix: str, lm_head: str) -> Modules:
    """The modules of a LLaMA decoder under `prefix`, and its output layer."""
    modules = _at(prefix, LLAMA) | {decoder.LM_HEAD: (lm_head,)}
    for layer in range(num_layers):
        published = _at(f"{prefix}{LLAMA_LAYERS}.{layer}.", LLAMA_LAYER)
        modules |= {decoder.layer_module(layer, part): published[part] for part in LLAMA_LAYER}
    return modules


def pooling_modules(config: pooling.PoolingConfig, prefix: str) -> Modules:
    """Routers and convolutions, which are in the layers of the LLaMA decoder under `prefix`."""
    modules: Modules = {}
    for index, boundary in enumerate(config.boundaries):
        layer = f"{prefix}{LLAMA_LAYERS}.{boundary.layer}."
        router = _at(f"{layer}{ROUTER}.", ROUTER_PARTS)
        modules |= {pooling.router_module(index, part): router[part] for part in ROUTER_PARTS}
        for expert in range(boundary.num_experts):
            modules[pooling.expert_module(index, expert)] = (f"{layer}{EXPERTS}.{expert}",)
    return modules


def tower_modules(vision: VisionConfig, prefix: str) -> Modules:
    """The modules of a vision tower under `prefix`."""
    if isinstance(vision, HrConfig):
        return hr_modules(vision, prefix)
    tower = vision.tower if isinstance(vision, AnyresConfig) else vision
    return clip_modules(tower.num_layers, prefix)


def hr_modules(config: HrConfig, prefix: str, trunk: str = "") -> Modules:
    """The modules of a LLaVA-HR tower under `prefix`.

    Args:
        trunk: further prefix of the slow path's names.
    """
    slow = f"{prefix}{HR_SLOW}{trunk}"
    modules = clip_modules(config.fast.num_layers, f"{prefix}{HR_FAST}") | _at(slow, HR_STEM)
    for stage, depth in enumerate(config.slow.depths):
        of_stage = f"{slow}stages.{stage}."
        if stage > 0:
            published = _at(of_stage, HR_DOWNSAMPLE)
            modules |= {hr.stage_module(stage, part): published[part] for part in HR_DOWNSAMPLE}
        for block in range(depth):
            module = f"{of_stage}blocks.{block}"
            published = _at(f"{module}.", HR_BLOCK)
            modules |= {hr.block_module(stage, block, part): published[part] for part in HR_BLOCK}
            modules[hr.block_module(stage, block)] = (module,)
    for adapter in range(config.num_adapters):
        published = _at(f"{prefix}{HR_ADAPTERS}.{adapter}.", HR_ADAPTER)
        modules |= {hr.adapter_module(adapter, part): published[part] for part in HR_ADAPTER}
    for part in (hr.FAST_PROJ, hr.SLOW_PROJ):
        modules[hr.mix_module(part)] = (f"{prefix}{HR_MIX}.{part}",)
    return modules


def clip_modules(num_layers: int, prefix: str) -> Modules:
    """The modules of a CLIP vision tower under `prefix`."""
    modules = _at(prefix, CLIP)
    for layer in range(num_layers):
        published = _at(f"{prefix}{CLIP_LAYERS}.{layer}.", CLIP_LAYER)
        modules |= {clip.layer_module(layer, part): published[part] for part in CLIP_LAYER}
    return modules


def clip_weight(weight: str) -> str:
    """Published name of a weight of a CLIP tower, without prefix; of the layers only layer 0 is known."""
    (name,) = weight_names((weight,), clip_modules(1, ""))[weight]
    return name


def tensorrt_llm_modules(layers: range, head: str | None) -> Modules:
    """The modules of a stage as a model of TensorRT-LLM, whose layers are numbered from 0.

    Args:
        layers: the stage's decoder layers.
        head: canonical module of the output layer, for the last stage, which also has the final norm.
    """
    modules: Modules = {}
    for local, layer in enumerate(layers):
        published = _at(f"{TENSORRT_LLM_LAYERS}.{local}.", TENSORRT_LLM_LAYER)
        modules |= {decoder.layer_module(layer, part): published[part] for part in TENSORRT_LLM_LAYER}
    if head is not None:
        modules |= {decoder.FINAL_NORM: (TENSORRT_LLM_NORM,), head: (TENSORRT_LLM_HEAD,)}
    return modules


def weight_names(
    weights: Iterable[str], modules: Mapping[str, tuple[str, ...]], suffixes: Mapping[str, str] = SUFFIXES
) -> NameMap:
    """Published names of canonical weights. A module that is not in `modules` has the same name in both.

    Args:
        suffixes: published suffixes of weights that have another in an engine.
    """
    names: NameMap = {}
    for weight in weights:
        module, _, suffix = weight.rpartition(".")
        suffix = suffixes.get(suffix, suffix)
        names[weight] = tuple(f"{published}.{suffix}" for published in modules.get(module, (module,)))
    return names


def _at(prefix: str, modules: Modules) -> Modules:
    return {module: tuple(prefix + name for name in published) for module, published in modules.items()}
