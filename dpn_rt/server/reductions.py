"""The training-free reductions of one server: what it was started with, and what its requests may ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dpn_rt.format.config import ModelConfig
from dpn_rt.model.reduction.chain import Chain
from dpn_rt.model.reduction.divprune import DivPrune
from dpn_rt.model.reduction.pool import Pool
from dpn_rt.model.reduction.pooling_config import PoolingConfig
from dpn_rt.model.reduction.random import RandomKeep
from dpn_rt.model.reduction.spec import Spec, parse_spec
from dpn_rt.model.reduction.step import Step

NONE = Chain.of().spec
OTHER = "other"


@dataclass(frozen=True)
class Reductions:
    """SPECs with all keys."""

    started: tuple[str, ...]
    """What the server was started with, the default first; empty for a model with a trained reduction."""
    choices: tuple[str, ...]
    """What is offered to try, the default first; empty where nothing can be chosen. Requests may ask for more: see
    `checked_reduction`."""

    @classmethod
    def of(cls, model: ModelConfig, reduce: Spec | Sequence[Spec] | None) -> Reductions:
        """
        Args:
            model: with the boundaries that are loaded.
            reduce: SPECs that it was loaded with; None: its own.
        """
        if isinstance(model.reduction, PoolingConfig):
            return cls((), ())
        if reduce is None:
            started = [model.reduction.spec if isinstance(model.reduction, Chain) else NONE]
        else:
            specs = [reduce] if isinstance(reduce, str | Mapping) else reduce
            started = [parse_spec(spec, model.decoder.num_layers).spec for spec in specs]
        anywhere: list[Step] = [
            Pool(),
            DivPrune(),
            RandomKeep(),
            *(RandomKeep(layer + 1) for layer in model.reduction.layers[:1]),
        ]
        offered = [*started, *(step.spec for step in anywhere), NONE] if model.vision is not None else []
        return cls(tuple(dict.fromkeys(started)), tuple(dict.fromkeys(offered)))

    def label(self, asked: Chain | None) -> str | None:
        """The name of a prompt's reduction among few: what the server was started with, "none", or "other".

        Args:
            asked: of the prompt.

        Returns:
            None for a model with a trained reduction.
        """
        if not self.started:
            return None
        spec = NONE if asked is None else asked.spec
        return spec if spec in (*self.started, NONE) else OTHER
