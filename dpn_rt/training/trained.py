"""Which weights are trained: parts that are frozen, and LoRA in the decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from dpn_rt.errors import TrainingError
from dpn_rt.reference.model import EagerDpn
from dpn_rt.training.optional import need
from dpn_rt.training.options import Part

PREFIXES: dict[Part, tuple[str, ...]] = {
    "tower": ("vision.",),
    "projector": ("projector.",),
    "decoder": ("language_model.", "lm_head."),
}
"""Of the names of parameters."""
LORA_TARGETS = r"language_model\.layers\.\d+\.(self_attn|mlp)\.[a-z]+_proj"


def freeze(model: EagerDpn, parts: Sequence[Part]) -> None:
    """Let the optimiser train routers, convolution experts and all parts that are not named."""
    frozen = tuple(prefix for part in parts for prefix in PREFIXES[part])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))


def add_lora(model: EagerDpn, rank: int, parts: Sequence[Part]) -> Callable[[], None]:
    """Train the decoder's linear layers by products of two small matrices, and none of its other weights.

    Args:
        model: changed in place.
        rank: of the products, which are scaled by 2.
        parts: that are frozen.

    Returns:
        What adds the products to the weights and takes the small matrices out of the model again.

    Raises:
        TrainingError: peft is not installed, or the decoder is frozen.
    """
    if "decoder" in parts:
        raise TrainingError(f"--lora {rank} trains the decoder: expected no --freeze decoder")
    peft = need("peft", f"--lora {rank}")
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=LORA_TARGETS)
    tuner = peft.LoraModel(model, config, "default")
    freeze(model, [*parts, "decoder"])
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.requires_grad_(True)

    def merge() -> None:
        tuner.merge_and_unload()

    return merge


def parameter_groups(model: EagerDpn, router_learning_rate: float, weight_decay: float) -> list[dict[str, object]]:
    """Groups of the weights that are trained, as torch's optimisers take them: routers, matrices, others.

    Args:
        model: whose weights have `requires_grad` set.
        router_learning_rate: of routers, which have no weight decay.
        weight_decay: of matrices; norms and biases have none.
    """
    routers: list[torch.Tensor] = []
    matrices: list[torch.Tensor] = []
    others: list[torch.Tensor] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (routers if ".router." in name else matrices if parameter.dim() > 1 else others).append(parameter)
    groups: list[dict[str, object]] = [
        {"params": routers, "lr": router_learning_rate, "weight_decay": 0.0},
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
