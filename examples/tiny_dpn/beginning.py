"""Sets initial weights where the modules' own are a bad start."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from dpn_rt.reference import Boundary, EagerDpn
from dpn_rt.reference.boundary import ROUTER_TEMPERATURE
from examples.tiny_dpn.scenes import GRID

POSITION_SCALE = 0.3
EMBEDDING_SCALE = 0.5
BEGINNING_ODDS = ((0.7, 0.15, 0.15), (0.34, 0.33, 0.33), (0.1, 0.3, 0.6))
"""Probabilities of the experts before training, per boundary."""
MEAN_GELU = 0.28
"""Mean of GELU over a normal distribution. The router has no bias; the mean of its hidden units serves as one."""


def start_pooling_late(model: EagerDpn) -> None:
    """Set routers that, for every question, keep most tokens at the first boundary and few after the last.

    Training continues from a dense model. That model loses least, and recovers soonest, when tokens are pooled late. If
    early pooling cost it much, the decoder would adapt to that loss before the routers had learned to avoid it.
    """
    for boundary, odds in zip(model.boundaries, BEGINNING_ODDS, strict=False):
        router = cast(Boundary, boundary).router
        if router is None or router.hidden is None:
            continue
        hidden_size, width = router.hidden.in_features, router.hidden.out_features
        nn.init.normal_(router.hidden.weight, std=hidden_size**-0.5)
        logits = ROUTER_TEMPERATURE * torch.tensor(odds).log()
        with torch.no_grad():
            router.predictor.weight.copy_((logits / (width * MEAN_GELU))[:, None].expand(-1, width))


def start_awake(model: EagerDpn) -> None:
    """Set decoder and projector weights that keep the scale of activations.

    transformers draws all weights with a standard deviation of 0.02, which suits widths of thousands. At this width
    every attention would start as a plain average, and the model would find small things hundreds of steps later.
    """
    decoder = model.language_model
    residual = {id(layer.self_attn.o_proj) for layer in decoder.layers} | {
        id(layer.mlp.down_proj) for layer in decoder.layers
    }
    depth = 2 * len(decoder.layers)
    assert model.projector is not None
    for module in [*decoder.modules(), *model.projector.modules()]:
        if isinstance(module, nn.Linear):
            scale = depth**-0.5 if id(module) in residual else 1.0
            nn.init.normal_(module.weight, std=scale * module.in_features**-0.5)
    nn.init.normal_(decoder.embed_tokens.weight, std=EMBEDDING_SCALE)


def start_on_a_grid(model: EagerDpn) -> None:
    """Set the tower's position embeddings to sines and cosines of row and column.

    With random ones the tower would first have to learn, for each of the 256 patches, which patches are next to it.
    """
    assert model.vision is not None
    table = next(p for name, p in model.vision.named_parameters() if name.endswith("position_embedding.weight"))
    quarter = table.shape[1] // 4
    frequencies = torch.pi / 2 * 32.0 ** -torch.linspace(0, 1, quarter)
    angles = torch.arange(GRID)[:, None] * frequencies
    waves = torch.cat((angles.sin(), angles.cos()), dim=1)
    rows = waves[:, None].expand(GRID, GRID, -1)
    columns = waves[None].expand(GRID, GRID, -1)
    with torch.no_grad():
        table[1:] = POSITION_SCALE * torch.cat((rows, columns), dim=2).flatten(0, 1)
