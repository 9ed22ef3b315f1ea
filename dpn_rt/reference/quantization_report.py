"""How far the layers of a quantised engine are from the checkpoint that it was built from.

The checkpoint's model answers a few prompts in plain PyTorch, which gives every linear layer real rows. Each layer's
product with the engine's weight is compared with the exact one on the same rows, so that errors do not add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dpn_rt.errors import PromptTooLongError
from dpn_rt.format.config import IMAGE_PLACEHOLDER_ID
from dpn_rt.format.engine_dir import EngineDir
from dpn_rt.format.weight_spec import canonical_specs
from dpn_rt.model.weights.forms import DENSE_SUFFIX, load_weight, quantized_form
from dpn_rt.prompts.processor import ProcessedPrompt, Processor
from dpn_rt.reference.model import EagerDpn

QUESTIONS = (
    "What is in the picture? Answer with one word.",
    "Describe the colours and where things are.",
    "How many objects are there, and which of them is the largest?",
    "Write two sentences about what may happen next.",
)
MOST_ROWS = 128
"""Rows of a layer that one prompt adds to its sample."""
IMAGE_SIDE = 448
NUM_IDS = (48, 24, 12, 6)
"""Of the prompts for an engine without a tokenizer."""


@dataclass(frozen=True)
class LayerError:
    """One linear layer."""

    module: str
    """Canonical name, such as `layers.3.qkv`."""
    bits: int
    rows: int
    """Rows of the sample."""
    error: float
    """Norm of the difference of the products over the norm of the exact ones."""


@torch.inference_mode()
def quantization_report(model: EagerDpn, engine: EngineDir) -> dict[str, Any]:
    """The errors of all quantised layers, the largest first, as JSON.

    Args:
        model: of the checkpoint, not quantised. Without its vision tower, it is asked without pictures.
        engine: built from the same checkpoint, quantised.

    Raises:
        PromptTooLongError: see `_prompts`.
    """
    prompts = _prompts(engine, with_images=model.vision is not None)
    samples = _samples(model, prompts)
    layers = sorted(_errors(model, engine, samples), key=lambda layer: -layer.error)
    return {
        "quantize": engine.model.quantize,
        "dtype": engine.model.dtype,
        "prompts": len(prompts),
        "images": sum(len(prompt.images) for prompt in prompts),
        "layers": [asdict(layer) for layer in layers],
        "unmeasured": _unmeasured(engine, {layer.module for layer in layers}),
    }


def _unmeasured(engine: EngineDir, measured: set[str]) -> list[str]:
    """Modules of quantised weights that no linear layer of the checkpoint's model multiplies: tables, convolutions."""
    quantize = engine.model.quantize
    forms = {name: quantized_form(spec, quantize) for name, spec in canonical_specs(engine.model).items()}
    return [
        module for name, form in forms.items() if form and (module := name.removesuffix(DENSE_SUFFIX)) not in measured
    ]


def _prompts(engine: EngineDir, *, with_images: bool) -> list[ProcessedPrompt]:
    """A few questions, with a picture where the engine takes some.

    Raises:
        PromptTooLongError: none fits into the model's positions.
    """
    config = engine.model.prompt
    processor = Processor(engine.processor_path, engine.model)
    prompts: list[dict[str, Any]] = []
    for index, question in enumerate(QUESTIONS):
        picture = _picture(index) if with_images and processor.takes_images else None
        if config.has_tokenizer:
            image = [{"type": "image", "image": picture}] if picture is not None else []
            content = [*image, {"type": "text", "text": question}]
            prompts.append(processor.chat([{"role": "user", "content": content}]))
        else:
            router = [] if config.router_token_id is None else [config.router_token_id]
            words = set(range(engine.model.decoder.vocab_size)) - {config.image_token_id, config.router_token_id}
            ids = np.random.default_rng(index).choice(sorted(words), NUM_IDS[index])
            prompt = {
                "prompt_token_ids": [*([IMAGE_PLACEHOLDER_ID] if picture is not None else []), *ids.tolist(), *router]
            }
            prompts.append(prompt | ({"multi_modal_data": {"image": picture}} if picture is not None else {}))
    fitting: list[ProcessedPrompt] = []
    for prompt in prompts:
        try:
            fitting.append(processor.process(prompt))
        except PromptTooLongError:
            if not fitting and prompt is prompts[-1]:
                raise
    return fitting


def _picture(seed: int) -> Image.Image:
    """Shades and edges at several scales: noise of few pixels, enlarged, and finer noise on it."""
    generator = np.random.default_rng(seed)
    shades = np.zeros((IMAGE_SIDE, IMAGE_SIDE, 3))
    for side in (4, 14, 56, IMAGE_SIDE):
        noise = generator.random((side, side, 3))
        shades += np.kron(noise, np.ones((IMAGE_SIDE // side, IMAGE_SIDE // side, 1)))
    return Image.fromarray((shades / 4 * 255).astype(np.uint8))


def _samples(model: EagerDpn, prompts: Sequence[ProcessedPrompt]) -> dict[str, Tensor]:
    """Rows `[rows, in_features]` that entered each linear layer, by the name of its weight in `model`."""
    rows: dict[str, list[Tensor]] = {}

    def taking(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def take(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].flatten(0, -2)
            chosen = torch.linspace(0, len(x) - 1, min(len(x), MOST_ROWS)).long()
            rows.setdefault(name, []).append(x[chosen])

        return take

    hooks = [
        module.register_forward_pre_hook(taking(f"{name}.weight"))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    for prompt in prompts:
        pixels = prompt.images[0].views[0] if prompt.images else None
        model(list(prompt.prompt_token_ids), pixels)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in rows.items()}


def _errors(model: EagerDpn, engine: EngineDir, samples: dict[str, Tensor]) -> Iterator[LayerError]:
    names, stored = model.name_map(), engine.load_weights()
    for canonical, spec in canonical_specs(engine.model).items():
        form = quantized_form(spec, engine.model.quantize)
        if form is None or names.get(canonical, ("",))[0] not in samples:
            continue
        module, x = canonical.removesuffix(DENSE_SUFFIX), samples[names[canonical][0]]
        exact = torch.cat([x.float() @ model.get_parameter(name).float().T for name in names[canonical]], dim=1)
        actual = load_weight(stored, module, prepack=False).products(None).few_rows(x).float()
        yield LayerError(module, form.bits, len(x), float((actual - exact).norm() / exact.norm().clamp_min(1e-30)))
