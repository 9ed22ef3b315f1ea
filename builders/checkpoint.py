"""A checkpoint directory: finds its shards of weights, lists their tensors, and reads them one at a time."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from dpn_rt.builders.json_values import read_json
from dpn_rt.builders.shards import Shard, TensorInfo, open_shard
from dpn_rt.errors import CheckpointError
from dpn_rt.schema.files import is_there
from dpn_rt.schema.text import few, shown

# An index, a single file, and shards without an index (named by `save_pretrained`); the first kind found is read.
_KINDS = (
    ("model.safetensors.index.json", "model.safetensors", "*.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin", "pytorch_model*.bin"),
)
MAX_SHARDS = 10_000
"""Files of one checkpoint; the largest published ones have about 200."""
_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<total>\d+)(?P<suffix>\.\w+)")


class Checkpoint(Protocol):
    """The tensors of a checkpoint by their published names."""

    @property
    def path(self) -> Path:
        """The directory."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Shape and dtype by published name."""

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU."""


class CheckpointFiles:
    """A `Checkpoint` whose tensors are those of its files. At most one shard is mapped at a time."""

    def __init__(self, path: Path) -> None:
        """Open a directory and list its tensors; nothing is read yet.

        Raises:
            CheckpointError: no weights, a shard is missing, damaged or unsafe, or two shards hold the same tensor.
        """
        self.path = path
        self._shard_of: dict[str, Shard] = {}
        self._tensors: dict[str, TensorInfo] = {}
        self._mapped: Shard | None = None
        files, indexed = _find_shards(path)
        for file in files:
            self._add(open_shard(file))
        absent = [f"{name} ({file})" for name, file in sorted(indexed.items()) if name not in self._tensors]
        if absent:
            raise CheckpointError(f"{path}: the index names weights that are not in its shards: {few(absent)}")

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Shape and dtype by published name."""
        return self._tensors

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU; it stays valid when another shard is mapped."""
        shard = self._shard_of[name]
        if self._mapped is not None and self._mapped is not shard:
            self._mapped.close()
        self._mapped = shard
        return shard.read(name)

    def _add(self, shard: Shard) -> None:
        for name, info in shard.list_tensors().items():
            if name in self._shard_of:
                raise CheckpointError(
                    f"{self.path}: {name} is in two shards: {self._shard_of[name].path.name}, {shard.path.name}"
                )
            self._shard_of[name], self._tensors[name] = shard, info
        shard.close()


def refuse_adapter(path: Path) -> None:
    """Refuse a directory with an adapter: without it, the base weights beside it would answer as another model.

    Raises:
        CheckpointError: naming the file that tells of it.
    """
    files = sorted(file.name for pattern in ("adapter_config.json", "adapter_model*.*") for file in path.glob(pattern))
    if files:
        raise CheckpointError(
            f"{path}: holds a LoRA adapter ({files[0]}), expected it to be merged into its base model "
            "(merge_and_unload), or not to be there"
        )


def _find_shards(path: Path) -> tuple[list[Path], dict[str, str]]:
    """The shards of a directory, and the index's map from tensors to shards (empty without an index)."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: not a directory")
    refuse_adapter(path)
    for index_name, single_name, pattern in _KINDS:
        if is_there(path / index_name):
            return _indexed_shards(path, path / index_name)
        if is_there(path / single_name):
            return [path / single_name], {}
        files = sorted(path.glob(pattern))
        if files:
            _check_complete(path, files)
            return files, {}
    if is_there(path / "mm_projector.bin"):
        raise CheckpointError(
            f"{path}: holds a projector only (mm_projector.bin, the result of stage-1 pretraining), neither a decoder "
            "nor vision towers: expected the checkpoint of the whole model"
        )
    raise CheckpointError(f"{path}: no weights: expected *.safetensors or pytorch_model*.bin")


def _indexed_shards(path: Path, index: Path) -> tuple[list[Path], dict[str, str]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map must map names of weights to files")
    names = sorted(set(weight_map.values()))
    outside = [shown(name) for name in names if Path(name).name != name or name in ("", "..")]
    if outside:
        raise CheckpointError(f"{index}: shards must lie in the checkpoint directory, got {few(outside)}")
    missing = [name for name in names if not is_there(path / name)]
    if missing:
        raise CheckpointError(f"{path}: {len(missing)} of {len(names)} shards are missing: {few(missing)}")
    return [path / name for name in names], weight_map


def _check_complete(path: Path, files: list[Path]) -> None:
    """Refuse missing shards. Without an index, only the numbers in their names say how many there are."""
    matches = [match for file in files if (match := _NUMBERED.fullmatch(file.name))]
    if not matches:
        return
    sets = sorted({(match["stem"], match["total"], match["suffix"]) for match in matches})
    if len(sets) > 1 or len(matches) != len(files):
        raise CheckpointError(f"{path}: which shards belong together? {', '.join(file.name for file in files)}")
    stem, total, suffix = sets[0]
    present = {int(match["number"]) for match in matches}
    if int(total) > MAX_SHARDS:
        raise CheckpointError(f"{path}: {files[0].name}: one of {int(total)} shards, expected at most {MAX_SHARDS}")
    missing = [number for number in range(1, int(total) + 1) if number not in present]
    if missing:
        names = few([f"{stem}-{number:0{len(total)}d}-of-{total}{suffix}" for number in missing])
        raise CheckpointError(f"{path}: {len(missing)} of {int(total)} shards are missing: {names}")
