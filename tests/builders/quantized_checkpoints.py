"""Quantised checkpoints, packed bit by bit: the formats are spelt out here once more, so that readers are checked."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.builders.checkpoints import CONFIG, OriginalCheckpoint

SAMPLES = Path("tests/quant_samples")
"""Checkpoints that the packages themselves have written."""
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Row, of eight, of each nibble of a word, the lowest first."""


@dataclass
class Grid:
    """`(q - zero) * scale`, numbers as they are before they are packed."""

    q: np.ndarray
    """[rows, columns], from 0."""
    zero: np.ndarray
    """[rows, groups], from 0."""
    scale: Tensor
    """[rows, groups]"""
    bits: int
    group: int

    @property
    def values(self) -> Tensor:
        """float32 [rows, columns]"""
        columns = np.arange(self.q.shape[1]) // self.group
        shifted = torch.from_numpy(self.q.astype(np.int64) - self.zero[:, columns]).float()
        return shifted * self.scale.float()[:, columns]


def random_grid(
    rows: int, columns: int, bits: int, group: int, *, symmetric: bool, dtype: torch.dtype = torch.float16
) -> Grid:
    group = columns if group == -1 else group
    groups = -(-columns // group)
    q = torch.randint(0, 1 << bits, (rows, columns)).numpy()
    zero = torch.randint(0, 1 << bits, (rows, groups)).numpy()
    if symmetric:
        zero[:] = 1 << (bits - 1)
    scale = ((torch.rand(rows, groups) + 0.5) / (8 << bits)).to(dtype)
    return Grid(q, zero, scale, bits, group)


def pack(values: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """`[n, count]` -> int32 `[n, words]`; `order` says whose value stands at each place of a word."""
    per_word = 32 // bits
    places = np.arange(per_word) if order is None else np.argsort(order)
    rows, count = values.shape
    padded = np.zeros((rows, -(-count // per_word) * per_word), np.uint32)
    padded[:, :count] = values.astype(np.uint32) & np.uint32((1 << bits) - 1)
    shifted = padded.reshape(rows, padded.shape[1] // per_word, per_word) << (places * bits).astype(np.uint32)
    words = np.bitwise_or.reduce(shifted, axis=2)
    return words.view(np.int32)


def as_tensor(words: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(words))


def awq(grid: Grid) -> dict[str, Tensor]:
    return {
        "qweight": as_tensor(pack(grid.q.T, 4, AWQ_ORDER)),
        "qzeros": as_tensor(pack(grid.zero.T, 4, AWQ_ORDER)),
        "scales": grid.scale.t().contiguous(),
    }


def gptq(grid: Grid, *, version: int = 1) -> dict[str, Tensor]:
    stored = (grid.zero - 1) % (1 << grid.bits) if version == 1 else grid.zero
    return {
        "qweight": as_tensor(pack(grid.q, grid.bits).T),
        "qzeros": as_tensor(pack(stored.T, grid.bits)),
        "scales": grid.scale.t().contiguous(),
        "g_idx": torch.arange(grid.q.shape[1], dtype=torch.int32) // grid.group,
    }


def packed(grid: Grid) -> dict[str, Tensor]:
    """compressed-tensors, pack-quantized."""
    tensors = {
        "weight_packed": as_tensor(pack(grid.q, grid.bits)),
        "weight_scale": grid.scale,
        "weight_shape": torch.tensor(grid.q.shape),
    }
    if (grid.zero != 1 << (grid.bits - 1)).any():
        tensors["weight_zero_point"] = as_tensor(pack(grid.zero.T, grid.bits).T)
    return tensors


def int8(grid: Grid) -> dict[str, Tensor]:
    """compressed-tensors, int-quantized."""
    return {"weight": torch.from_numpy((grid.q - 128).astype(np.int8)), "weight_scale": grid.scale}


def awq_config(group: int) -> dict[str, Any]:
    return {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}


def gptq_config(bits: int, group: int, version: int = 1) -> dict[str, Any]:
    spelt = "gptq" if version == 1 else "gptq_v2"
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False}
    return config | {"checkpoint_format": spelt}


def compressed_config(
    form: str, bits: int, group: int | None, *, symmetric: bool = True, rows: bool = False, kind: str = "int"
) -> dict[str, Any]:
    weights = {
        "num_bits": bits,
        "type": kind,
        "symmetric": symmetric,
        "strategy": "channel" if group is None else "group",
        "group_size": group,
    }
    activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": activations if rows else None}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": scheme}, "ignore": []}


def wide_checkpoint() -> OriginalCheckpoint:
    """Two layers that are wide enough for groups of 128 columns; no pooling."""
    config = copy.deepcopy(CONFIG)
    del config["pooling"]
    config |= {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "router_token_id": None}
    return OriginalCheckpoint(config).fill()


def layers_of(checkpoint: OriginalCheckpoint) -> list[str]:
    """Modules of the decoder's linear layers."""
    names = (name for name in checkpoint.weights if name.startswith("model.layers."))
    return [name.removesuffix(".weight") for name in names if name.endswith("_proj.weight")]


def put(checkpoint: OriginalCheckpoint, module: str, tensors: dict[str, Tensor]) -> None:
    """Replace the weight of a layer by quantised tensors."""
    del checkpoint.weights[f"{module}.weight"]
    checkpoint.weights |= {f"{module}.{suffix}": tensor for suffix, tensor in tensors.items()}


def quantize_layers(
    checkpoint: OriginalCheckpoint, modules: list[str], make: Callable[[int, int], Grid], pack: Callable[..., Any]
) -> tuple[OriginalCheckpoint, dict[str, Grid]]:
    """Quantises some layers; returns also the checkpoint that the result stands for."""
    dense = replace(checkpoint, weights=dict(checkpoint.weights))
    grids = {}
    for module in modules:
        grids[module] = make(*checkpoint.weights[f"{module}.weight"].shape)
        dense.weights[f"{module}.weight"] = grids[module].values
        put(checkpoint, module, pack(grids[module]))
    return dense, grids
