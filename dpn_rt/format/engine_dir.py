"""The engine directory, which builders write and the runtime reads.

    engine.json            format version, model configuration, and size and sha256 of every other file
    weights.safetensors    the weights of `weight_spec`
    processor/             tokenizer and image processor files, copied from the checkpoint
    plans/                 TensorRT plans, where the engine was built with them (docs/tensorrt.md)

It is written to a temporary directory next to the target and then renamed, so a directory with the target's name is
always complete. A directory that exists already stays, and its files are replaced, the manifest last. The bytes depend
only on the contents: the same checkpoint always gives the same engine.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from torch import Tensor

from dpn_rt.errors import ConfigError, EngineError
from dpn_rt.format.atomic_dir import replaced_directory, settle, sync_directory, write_file
from dpn_rt.format.checks import check_model
from dpn_rt.format.config import ModelConfig
from dpn_rt.format.plans import BuiltPlans, PlanConfig, check_limits, plan_files
from dpn_rt.format.swapped_files import own_files, unfinished_swap
from dpn_rt.format.weight_file import CHUNK_BYTES, check_weights, map_weights, tensor_bytes, write_weights
from dpn_rt.format.weight_spec import weight_spec
from dpn_rt.schema.bounds import FileBytes
from dpn_rt.schema.files import SETTINGS_BYTES, VOCABULARY_BYTES, is_there, open_file, read_file
from dpn_rt.schema.json_text import read_json
from dpn_rt.schema.json_values import from_json, to_json
from dpn_rt.schema.text import is_text, shown
from dpn_rt.schema.weights import TORCH_DTYPES, WeightSpec

__all__ = [
    "FORMAT_VERSION",
    "TORCH_DTYPES",
    "EngineDir",
    "EngineSource",
    "FileRecord",
    "WeightSpec",
    "check_model",
    "is_engine",
    "tensor_bytes",
    "weight_spec",
    "write_engine",
]

FORMAT_VERSION = 6
READABLE_VERSIONS = (5, FORMAT_VERSION)
"""Version 6 has fields with defaults that version 5 lacks."""
MANIFEST = "engine.json"
WEIGHTS = "weights.safetensors"
PROCESSOR = "processor"
MAX_FILES = 2048
"""Of one engine; those with plans have two files per stage."""


@dataclass(frozen=True)
class EngineSource:
    """Where an engine's weights come from."""

    fingerprint: str
    """sha256 of the checkpoint's configuration and of the weights that were used."""
    layout: Literal["original", "huggingface", "synthetic"]


@dataclass(frozen=True)
class FileRecord:
    """Size and sha256 of one file of an engine directory."""

    sha256: str
    bytes: FileBytes


FileId = tuple[int, int, int, int]
"""Device, inode, size and time of change: those of a file that replaced another are different."""


@dataclass(frozen=True)
class EngineDir:
    """An engine directory whose manifest has been read and checked."""

    path: Path
    model: ModelConfig
    source: EngineSource
    builder_version: str
    files: Mapping[str, FileRecord] = field(repr=False)
    weights_id: FileId | None = field(repr=False)
    """Of the weights when the manifest was read; None: there were none."""
    plans: PlanConfig | None = None
    """None: the engine runs on the product's own kernels."""

    @classmethod
    def open(cls, path: str | Path, verify: bool = True) -> EngineDir:
        """Read the manifest, and check every file's size and the weights' names, shapes and dtypes.

        Args:
            path: of the directory.
            verify: also compare the sha256 of every file, which reads them all once (about 1.5 GB/s).

        Raises:
            EngineError: the directory is no engine, has a format that this version does not read, or is incomplete or
                damaged.
        """
        if not isinstance(path, str | Path):
            raise EngineError(f"engine directory {shown(path)}: expected a path, got {type(path).__name__}")
        _check_name(Path(path))
        engine = _read_manifest(Path(path))
        _check_files(engine, verify)
        check_weights(engine.path / WEIGHTS, weight_spec(engine.model))
        return engine

    @property
    def processor_path(self) -> Path:
        """Directory of the tokenizer and image processor files; absent when there are none."""
        return self.path / PROCESSOR

    def load_weights(self) -> dict[str, Tensor]:
        """Every weight by canonical name, as views of the mapped file on the CPU.

        A page is read when it is first used. The mapping is private: writing to a tensor does not change the file.

        Raises:
            EngineError: the file holds other weights than the manifest describes, or was replaced after `open`.
        """
        weights = map_weights(self.path / WEIGHTS, weight_spec(self.model))  # before its id is compared
        if _file_id(self.path / WEIGHTS) != self.weights_id:
            raise EngineError(
                f"{self.path}: {WEIGHTS} is another file than when the engine was opened: expected the same one, was "
                "it built again meanwhile?"
            )
        return weights


def write_engine(
    path: str | Path,
    model: ModelConfig,
    source: EngineSource | Callable[[], EngineSource],
    weights: Iterable[tuple[str, Tensor]],
    processor_files: Mapping[str, Path | bytes] | None = None,
    *,
    force: bool = False,
    progress: Callable[[int], None] | None = None,
    plans: BuiltPlans | None = None,
) -> EngineDir:
    """Write an engine directory at `path`. After any failure `path` is as before.

    Args:
        path: of the directory; its parents are made.
        model: the engine's configuration.
        source: where the weights come from, or a function that returns it. The function is called after the last
            weight, so that it can give a fingerprint of the weights that were read.
        weights: (canonical name, tensor) in the order of `weight_spec(model)`, with its shapes and dtypes. One tensor
            is in memory at a time.
        processor_files: file name under `processor/` -> the file to copy, or its content.
        force: replace an existing engine. A directory that holds anything else is never replaced.
        progress: is called with the number of weight bytes written since the last call.
        plans: TensorRT plans that run the engine; None: the product's own kernels run it.

    Returns:
        The engine that was written.

    Raises:
        ConfigError: `model` contradicts itself.
        EngineError: the target exists, the disk is full, or `weights` are not those of `weight_spec(model)`.
    """
    check_model(model)
    target = Path(path).absolute()
    _check_name(Path(path))
    settle(target, MANIFEST)
    spec = weight_spec(model)
    built = {} if plans is None else plans.files
    others = [*built.values(), *(each for each in (processor_files or {}).values() if isinstance(each, bytes))]
    num_bytes = sum(weight.num_bytes for weight in spec.values()) + sum(map(len, others))
    with replaced_directory(target, num_bytes, _check_target(target, force), MANIFEST) as partial:
        sha256 = write_weights(partial / WEIGHTS, spec, weights, progress or (lambda _: None))
        files = {WEIGHTS: FileRecord(sha256, (partial / WEIGHTS).stat().st_size)}
        for name, content in sorted((processor_files or {}).items()):
            data = content if isinstance(content, bytes) else read_file(content, EngineError, VOCABULARY_BYTES)
            write_file(partial / PROCESSOR / name, data)
            files[f"{PROCESSOR}/{name}"] = FileRecord(hashlib.sha256(data).hexdigest(), len(data))
        if processor_files:
            sync_directory(partial / PROCESSOR)
        for name, data in sorted(built.items()):
            write_file(partial / name, data)
            files[name] = FileRecord(hashlib.sha256(data).hexdigest(), len(data))
            sync_directory((partial / name).parent)
        manifest = {
            "format_version": FORMAT_VERSION,
            "builder_version": _builder_version(),
            "source": to_json(source() if callable(source) else source),
            "model": to_json(model),
            "files": {name: to_json(record) for name, record in files.items()},
        }
        if plans is not None:
            manifest["plans"] = to_json(plans.config)
        write_file(partial / MANIFEST, (json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode())
    return _read_manifest(target)


def is_engine(path: str | Path) -> bool:
    """Whether the directory is an engine, of any format version, and holds no other files."""
    try:
        manifest = read_json(Path(path) / MANIFEST, EngineError, SETTINGS_BYTES)
        known = {MANIFEST, *manifest["files"]} if "format_version" in manifest else set()
    except (EngineError, TypeError, KeyError):
        return False
    return set(own_files(Path(path))) <= known


def _check_name(path: Path) -> None:
    if not is_text(path):
        raise EngineError(f"engine directory {str(path)!r}: its name is not UTF-8, as tokenizers need it: rename it")
    if "\0" in str(path):
        raise EngineError(f"engine directory {str(path)!r}: its name has a NUL character")


def _check_target(target: Path, force: bool) -> bool:
    """Whether there is an engine at `target` to replace; False where nothing or an empty directory is there.

    Raises:
        EngineError: anything else is there, or an engine and `force` is False.
    """
    if not (target.exists() or target.is_symlink()):
        return False
    if not target.is_dir():
        raise EngineError(f"{target}: exists and is not a directory")
    if not any(own_files(target)):
        return False
    if is_there(target / MANIFEST) and not os.access(target / MANIFEST, os.R_OK):
        raise EngineError(f"{target / MANIFEST}: cannot be read, so it is not replaced: expected permission to read it")
    if not is_engine(target):
        raise EngineError(f"{target}: exists and holds files that are not an engine's; they are not replaced")
    if not force:
        raise EngineError(f"{target}: an engine exists there; replace it with --force (force=True)")
    return True


def _builder_version() -> str:
    try:
        return version("dpn-rt")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "unknown"


def _read_manifest(path: Path) -> EngineDir:
    file = path / MANIFEST
    weights_id = _file_id(path / WEIGHTS)  # before the manifest, which a build replaces last
    if not is_there(file):
        aside = unfinished_swap(path)
        hint = "" if aside is None else f"; a build was killed there: build again, or move the files of {aside} back"
        raise EngineError(f"{path}: not an engine directory: {MANIFEST}: No such file or directory{hint}")
    manifest: Any = read_json(file, EngineError, SETTINGS_BYTES)
    found = manifest.get("format_version") if isinstance(manifest, dict) else None
    if found not in READABLE_VERSIONS or isinstance(found, bool):
        readable = " or ".join(map(str, READABLE_VERSIONS))
        raise EngineError(
            f"{file}: engine format version {shown(found)}, expected {readable}: build the engine again, or use the "
            "version of dpn_rt that built it"
        )
    keys = {"format_version", "builder_version", "source", "model", "files"}
    if set(manifest) - {"plans"} != keys or not isinstance(manifest["files"], dict):
        raise EngineError(f"{file}: expected the keys {sorted(keys)}, got {shown(sorted(manifest))}")
    if len(manifest["files"]) > MAX_FILES:
        raise EngineError(f"{file}: files has {len(manifest['files']):,} entries, expected at most {MAX_FILES:,}")
    try:
        model = from_json(ModelConfig, manifest["model"], "model")
        check_model(model)
        builder_version = from_json(str, manifest["builder_version"], "builder_version")
        source = from_json(EngineSource, manifest["source"], "source")
        files = {name: from_json(FileRecord, value, f"files.{name}") for name, value in manifest["files"].items()}
    except ConfigError as error:
        raise EngineError(f"{file}: {error}") from error
    for name in files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise EngineError(f"{file}: file name {shown(name)} leaves the engine directory")
    if WEIGHTS not in files:
        raise EngineError(f"{file}: files: {WEIGHTS} is missing")
    plans = _read_plans(file, model, manifest["plans"], files) if "plans" in manifest else None
    return EngineDir(path, model, source, builder_version, files, weights_id, plans)


def _read_plans(file: Path, model: ModelConfig, value: Any, files: Mapping[str, FileRecord]) -> PlanConfig:
    num_stages = len(model.stage_layers)
    try:
        plans: PlanConfig = from_json(PlanConfig, value, "plans")
        check_limits(plans.limits, num_stages, model.decoder.max_position_embeddings)
    except ConfigError as error:
        raise EngineError(f"{file}: {error}") from error
    missing = [name for name in plan_files(num_stages) if name not in files]
    if missing:
        raise EngineError(f"{file}: files: {', '.join(missing)} missing: every stage needs a plan for each phase")
    return plans


def _check_files(engine: EngineDir, verify: bool) -> None:
    for name, record in engine.files.items():
        file = engine.path / name
        if not is_there(file):
            raise EngineError(f"{str(file)[:200]}: missing, but {MANIFEST} lists it")
        with open_file(file, EngineError) as opened:
            size = os.fstat(opened.fileno()).st_size
        if size != record.bytes:
            raise EngineError(f"{file}: expected {record.bytes} bytes, the file has {size}: truncated or changed")
    for name, record in engine.files.items() if verify else ():
        sha256 = _sha256(engine.path / name)
        if sha256 != record.sha256:
            wanted = shown(record.sha256)
            raise EngineError(f"{engine.path / name}: expected sha256 {wanted}, got {sha256}: damaged or changed")


def _file_id(file: Path) -> FileId | None:
    """None where there is no file, as `_check_files` will say."""
    try:
        status = file.stat()
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _sha256(file: Path) -> str:
    digest, buffer = hashlib.sha256(), bytearray(CHUNK_BYTES)
    with open_file(file, EngineError) as stream:
        while size := stream.readinto(buffer):
            digest.update(memoryview(buffer)[:size])
    return digest.hexdigest()
