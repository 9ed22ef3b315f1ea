"""Inputs and outputs of a stage's plan, as the builder of plans and the runtime both use them.

Weights are inputs under their canonical names. So a plan holds no weights, and both plans of a stage share one copy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dpn_rt.format.config import ModelConfig
from dpn_rt.format.plans import PHASES, Phase, PlanLimits
from dpn_rt.format.weight_spec import weight_spec
from dpn_rt.model.decoder_weights import FINAL_NORM, head_module, layer_module
from dpn_rt.schema.weights import TORCH_DTYPES

DYNAMIC = -1
"""Stands for a dimension that may differ from call to call, up to the plan's limits."""

HIDDEN, POSITIONS, WRITE_ROWS, KV_LENGTHS = "hidden", "positions", "write_rows", "kv_lengths"
LAST_ROWS, COSINES, SINES = "last_rows", "rope.cos", "rope.sin"
HIDDEN_OUT, LOGITS = "hidden_out", "logits"


@dataclass(frozen=True)
class PlanTensor:
    """One input or output of a plan."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    """`DYNAMIC` for dimensions that differ from call to call."""
    largest: tuple[int, ...]
    """The largest shape within the plan's limits."""


Tensors = dict[str, PlanTensor]


@dataclass(frozen=True)
class StagePlan:
    """Identifies a plan: a stage of a model in one phase, within limits."""

    model: ModelConfig
    limits: PlanLimits
    stage: int
    phase: Phase

    @property
    def layers(self) -> range:
        """Decoder layers of the stage."""
        return self.model.stage_layers[self.stage]

    @property
    def is_last(self) -> bool:
        return self.stage == len(self.model.reduction.layers)

    @property
    def is_prefill(self) -> bool:
        return self.phase == "prefill"

    @property
    def dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.model.dtype]

    @property
    def max_batch(self) -> int:
        """Most sequences of one call."""
        return self.limits.max_prefill_batch if self.is_prefill else self.limits.max_batch

    @property
    def max_rows(self) -> int:
        """Most rows of one sequence in the stage's KV cache."""
        return self.limits.stage_rows[self.stage]

    @property
    def num_positions(self) -> int:
        """Rows of the rotary table, which all stages share."""
        return max(self.limits.stage_rows)

    def inputs(self) -> Tensors:
        """Every input by name, weights last."""
        return {**self._rows(), **self._caches(""), **self.weights()}

    def outputs(self) -> Tensors:
        """Every output by name. The caches are inputs too; the output of a cache has the address of the input."""
        decoder = self.model.decoder
        if self.is_last:
            rows = {LOGITS: self._per_batch(self.dtype, decoder.vocab_size)}
        else:
            rows = {HIDDEN_OUT: self._per_row(self.dtype, decoder.hidden_size)}
        return rows | self._caches("_out")

    def weights(self) -> Tensors:
        """The inputs that are weights."""
        prefixes = [layer_module(layer, "") for layer in self.layers]
        if self.is_last:
            prefixes += [f"{FINAL_NORM}.weight", self.head]
        specs = weight_spec(self.model)
        return {
            name: PlanTensor(spec.dtype, spec.shape, spec.shape)
            for name, spec in sorted(specs.items())
            if name.startswith(tuple(prefixes))
        }

    @property
    def head(self) -> str:
        """Canonical name of the output layer's weight."""
        return f"{head_module(self.model.decoder)}.weight"

    def _rows(self) -> Tensors:
        decoder = self.model.decoder
        angles = (self.num_positions, decoder.head_dim // 2)
        tensors = {
            HIDDEN: self._per_row(self.dtype, decoder.hidden_size),
            POSITIONS: self._per_row(torch.int32),
            WRITE_ROWS: self._per_batch(torch.int32),
            KV_LENGTHS: self._per_batch(torch.int32),
            COSINES: PlanTensor(torch.float32, angles, angles),
            SINES: PlanTensor(torch.float32, angles, angles),
        }
        if self.is_last and self.is_prefill:
            tensors[LAST_ROWS] = self._per_batch(torch.int32, 1)
        return tensors

    def _caches(self, suffix: str) -> Tensors:
        decoder = self.model.decoder
        cache = self._per_batch(self.dtype, decoder.num_kv_heads, self.max_rows, decoder.head_dim)
        return {name + suffix: cache for layer in self.layers for name in cache_names(layer)}

    def _per_batch(self, dtype: torch.dtype, *rest: int) -> PlanTensor:
        return PlanTensor(dtype, (DYNAMIC, *rest), (self.max_batch, *rest))

    def _per_row(self, dtype: torch.dtype, *rest: int) -> PlanTensor:
        if self.is_prefill:
            return PlanTensor(dtype, (DYNAMIC, DYNAMIC, *rest), (self.max_batch, self.max_rows, *rest))
        return PlanTensor(dtype, (DYNAMIC, 1, *rest), (self.max_batch, 1, *rest))


def cache_names(layer: int) -> tuple[str, str]:
    """Names of the inputs for the keys and the values of a layer. The outputs have the suffix `_out`."""
    return layer_module(layer, "key_cache"), layer_module(layer, "value_cache")


def stage_plans(model: ModelConfig, limits: PlanLimits) -> list[StagePlan]:
    """Every plan of an engine, ordered by stage; a stage's prefill comes before its decode."""
    stages = range(len(model.stage_layers))
    return [StagePlan(model, limits, stage, phase) for stage in stages for phase in PHASES]
