"""What the weights of a training depend on: kept in each of its checkpoints, so that two trainings are never mixed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpn_rt.errors import TrainingError
from dpn_rt.model.reduction.pooling_config import PoolingConfig
from dpn_rt.schema.json_text import read_json
from dpn_rt.schema.text import shown
from dpn_rt.training.options import TrainOptions

Settings = Mapping[str, Any]
"""Names of options, and `conversations`, to values of JSON."""

FILE = "train_routers.json"
_MOST_BYTES = 2**20
_FREE = ("epochs", "max_steps", "recompute", "save_steps", "keep", "log_steps", "workers", "cpu")
"""Of `RunOptions`: how long, how often and with what. A longer training may go on from a shorter one's checkpoint."""


def settings_of(
    options: TrainOptions, pooling: PoolingConfig, max_length: int, router_learning_rate: float, conversations: int
) -> Settings:
    """Of a training, with the values that its defaults have.

    Args:
        options: of the command.
        pooling: of the model with its routers.
        max_length: in place of the option.
        router_learning_rate: in place of the option.
        conversations: how many the data have.
    """
    run = replace(options.run, max_length=max_length, router_learning_rate=router_learning_rate)
    values = {
        "conversations": conversations,
        "freeze": sorted(set(options.freeze)),
        "lora": options.lora,
        "pooling_layers": pooling.layers,
        "kernels": [each.kernels for each in pooling.boundaries],
        "router_version": pooling.router_version,
        "pooling_function": pooling.pooling_function,
        **vars(options.loss),
        **{name: value for name, value in vars(run).items() if name not in _FREE},
    }
    settings: Settings = json.loads(json.dumps(values))  # tuples are lists in a file
    return settings


def write_settings(checkpoint: Path, settings: Settings) -> None:
    """Into a checkpoint's directory."""
    (checkpoint / FILE).write_text(json.dumps(settings, indent=2) + "\n")


def check_settings(checkpoint: Path, settings: Settings) -> None:
    """Refuse to go on with other settings. Trainer would take some of them from its checkpoint without a word.

    Args:
        checkpoint: its directory; one of an earlier version has no settings, and is taken.
        settings: of the training that is to go on.

    Raises:
        TrainingError: naming those that differ.
    """
    if not (checkpoint / FILE).is_file():
        return
    found = read_json(checkpoint / FILE, TrainingError, _MOST_BYTES)
    if not isinstance(found, dict):
        raise TrainingError(f"{checkpoint / FILE}: got {type(found).__name__}, expected an object")
    names = [name for name in settings if found.get(name) != settings[name]]
    if not names:
        return
    before, now = (", ".join(f"{name}={shown(values.get(name))}" for name in names) for values in (found, settings))
    raise TrainingError(
        f"{checkpoint}: the checkpoint of another training, begun with {before}, and this one has {now}: "
        "expected the options that it was begun with, or another --output"
    )
