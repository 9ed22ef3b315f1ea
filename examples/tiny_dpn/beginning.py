"""Weights to begin with where the modules' own are a bad start."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from dpn_rt.eager import Boundary, EagerDpn
from examples.tiny_dpn.scenes import GRID

POSITION_SCALE = 0.3
EMBEDDING_SCALE = 0.5


def start_undecided(model: EagerDpn) -> None:
    """Every expert equally likely: otherwise chance decides which one the routing loss finds most probable."""
    for boundary in model.boundaries:
        router = cast(Boundary, boundary).router
        if router is not None:
            nn.init.zeros_(router.predictor.weight)


def start_awake(model: EagerDpn) -> None:
    """Decoder and projector weights that keep the size of what passes.

    transformers draws all weights with a deviation of 0.02, which suits a width of thousands. Here every attention
    would begin as a plain average, and small things are found hundreds of steps later.
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
    """Sines and cosines of row and column as the tower's position embeddings.

    From random ones the tower would have to learn for each of the 256 patches which ones are its neighbours.
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
