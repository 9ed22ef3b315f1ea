"""Which format a checkpoint has, as config.json says; all others are refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from dpn_rt.builders.json_values import Json, Section, name_of, object_of, read_json, value_of
from dpn_rt.builders.quantized.awq import Awq
from dpn_rt.builders.quantized.compressed_tensors import CompressedTensors
from dpn_rt.builders.quantized.gptq import Gptq
from dpn_rt.builders.quantized.layer import Layer
from dpn_rt.builders.quantized.matrix import Matrix
from dpn_rt.errors import CheckpointError, ConfigError
from dpn_rt.schema.files import is_there

READ = "compressed-tensors (int-quantized, pack-quantized, 8-bit floats), AWQ (gemm), GPTQ (without act-order)"
"""Formats of quantised checkpoints, for messages."""
KEYS = ("quantization_config", "compression_config")
FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Files of older versions, beside a config.json that does not say it."""
MARKS = ("qweight", "weight_packed", "weight_scale", "weight_scale_inv", "quant_state")


class Format(Protocol):
    """A way of publishing quantised matrices."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def marks(self) -> tuple[str, ...]:
        """Suffixes of tensors that only a quantised layer has."""

    @property
    def unused(self) -> tuple[str, ...]:
        """Suffixes of tensors that do not belong to a weight."""

    @property
    def rounds_rows(self) -> bool:
        """Whether rows are rounded to 8 bits, too, wherever a weight is."""

    @property
    def left_out(self) -> tuple[str, ...]:
        """Keys of config.json that ask for something else than weights, and that the engine does not have."""

    def matrix(self, layer: Layer) -> Matrix:
        """The matrix of a quantised layer.

        Raises:
            CheckpointError: a tensor is missing or does not fit the others.
            ConfigError: config.json asks for act-order.
        """


METHODS: Mapping[str, Callable[[Section], Format]] = {
    "compressed-tensors": CompressedTensors,
    "awq": Awq,
    "gptq": Gptq,
}


def read_format(path: Path, config: Json) -> Format | None:
    """The format of a checkpoint directory; None: it is not quantised.

    Raises:
        ConfigError: it is another format than those that are read, or asks for something that is not read.
    """
    section = _section(path, config)
    if section is None:
        return None
    method = value_of(section, "quant_method", str)
    if method not in METHODS:
        raise ConfigError(f"{name_of(section, 'quant_method')}: {method!r} is not read, expected one of: {READ}")
    return METHODS[method](section)


def refuse_unnamed(path: Path, names: Mapping[str, object]) -> None:
    """Refuse quantised tensors where nothing says how they are quantised.

    Raises:
        CheckpointError: one of `names` is such a tensor.
    """
    found = next((name for name in names if name.endswith(tuple(f".{mark}" for mark in MARKS))), None)
    if found is not None:
        raise CheckpointError(
            f"{path}: {found} belongs to a quantised weight, but config.json has no quantization_config: expected one "
            f"for {READ}"
        )


def refuse_gguf(path: Path) -> None:
    """Refuse a GGUF file, or a directory of such files.

    Raises:
        CheckpointError: `path` holds no other weights.
    """
    files = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    others = [*path.glob("*.safetensors"), *path.glob("*.bin")] if path.is_dir() else []
    if files and files[0].suffix == ".gguf" and not others:
        raise CheckpointError(
            f"{files[0]}: GGUF is not read: expected a directory with safetensors or pytorch_model*.bin, not quantised "
            f"or in one of: {READ}"
        )


def _section(path: Path, config: Json) -> Section | None:
    for values in (config, object_of(config, "text_config") or {}):
        for key in KEYS:
            if (section := object_of(values, key)) is not None:
                return section
    for name, method in FILES.items():
        if is_there(path / name):
            section = read_json(path / name)
            return Section({"quant_method": method, **section}, section.place)
    return None
