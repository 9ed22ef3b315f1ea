"""Build an engine directory from a checkpoint in any published layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import get_args

from dpn_rt.builders.checkpoint import Checkpoint, refuse_adapter
from dpn_rt.builders.huggingface_layout import read_huggingface
from dpn_rt.builders.image_processor import image_processor_file
from dpn_rt.builders.json_values import Json, read_json
from dpn_rt.builders.layout import Layout, Note
from dpn_rt.builders.names import LLAMA
from dpn_rt.builders.original_layout import read_original
from dpn_rt.builders.prompt_config import prompt_config
from dpn_rt.builders.published_check import check_published
from dpn_rt.builders.quantize import choose_quantize, note_rounded_again, stored_tensors
from dpn_rt.builders.quantized.checkpoint import open_checkpoint
from dpn_rt.builders.quantized.formats import refuse_gguf
from dpn_rt.builders.tokenizer_files import read_tokenizer
from dpn_rt.builders.trial import try_processor
from dpn_rt.builders.weight_sources import weight_sources
from dpn_rt.builders.weight_stream import WeightStream
from dpn_rt.errors import CheckpointError, ConfigError
from dpn_rt.format.config import ModelConfig, ReductionConfig
from dpn_rt.format.engine_dir import EngineDir, EngineSource, check_model, weight_spec, write_engine
from dpn_rt.format.plans import BuiltPlans
from dpn_rt.format.weight_spec import canonical_specs
from dpn_rt.model.decoder_weights import EMBED_TOKENS
from dpn_rt.model.reduction.spec import Spec, parse_spec
from dpn_rt.model.vision.anyres.config import AnyresConfig
from dpn_rt.model.vision.clip.config import ClipConfig
from dpn_rt.schema.dtypes import DType, Quantize
from dpn_rt.schema.files import SETTINGS_BYTES, is_there, read_file
from dpn_rt.schema.text import is_text, shown

Progress = Callable[[int, int], None]
"""Takes the number of weight bytes written since the last call, and the total."""


def build_engine(
    checkpoint_path: str | Path,
    output: str | Path,
    *,
    dtype: DType | None = None,
    vision_tower: str | Path | None = None,
    force: bool = False,
    progress: Progress = lambda written, total: None,
    note: Note = lambda line: None,
    make_plans: Callable[[ModelConfig], BuiltPlans] | None = None,
    reduce: Spec | None = None,
    quantize: Quantize | None = None,
    check: Callable[[ModelConfig], None] = lambda _: None,
) -> EngineDir:
    """Build an engine directory from a checkpoint directory.

    Args:
        dtype: of the engine's weights; by default float32 for a float32 checkpoint and bfloat16 for any other.
        vision_tower: directory of a CLIP vision tower, for a checkpoint that lacks its weights or its configuration.
        force: replace an engine that exists at `output`.
        note: takes a line about each assumption, and about each thing that the engine lacks.
        reduce: SPEC of the training-free reduction that requests get by default; None: none, or the trained one.
        make_plans: builds TensorRT plans, which then run the engine; None: the product's own kernels run it.
        quantize: stores the matrices of linear layers in integers or floats of 8 bits, or those of the decoder in 4
            bits and the others in 8; None: int8 for a checkpoint that is published as W8A8, and none for any other.
        check: may refuse the engine by an error, before a weight is read.

    Raises:
        CheckpointError: files are missing or damaged, or weights do not match the configuration (all are named).
        ConfigError: the configuration asks for something unknown or contradicts itself.
        EngineError: the output exists or cannot be written.
        PlanError: the plans cannot be built.
    """
    path = Path(checkpoint_path)
    for name, value, known in (("dtype", dtype, DType), ("quantize", quantize, Quantize)):
        if value is not None and value not in get_args(known):
            raise ConfigError(f"{name}={shown(value)}: expected one of {', '.join(get_args(known))}")
    config = read_config(path)
    checkpoint = open_checkpoint(path, config)
    layout = read_layout(checkpoint, config, None if vision_tower is None else Path(vision_tower), note)
    tokenizer, for_images = read_tokenizer(path, note), _image_processor_files(path, layout)
    dtype = dtype or _default_dtype(checkpoint, layout)
    quantize = choose_quantize(quantize, checkpoint, dtype, make_plans is not None, note)
    model = ModelConfig(
        dtype=dtype,
        decoder=layout.decoder,
        reduction=_reduction(layout, reduce),
        prompt=prompt_config(path, layout, tokenizer, bool(for_images), note),
        vision=layout.tower.config if layout.tower else None,
        projector=layout.projector,
        quantize=quantize,
    )
    check_model(model)
    check(model)
    if make_plans is not None and quantize != "none":
        raise ConfigError(f"quantize={shown(quantize)}: TensorRT plans have no quantised weights, expected 'none'")
    files = {**(tokenizer.files if tokenizer else {}), **for_images}
    try_processor(path, files, model)
    sources = weight_sources(model, checkpoint, layout.names, layout.tower)
    check_published(checkpoint, layout, sources, note)
    if make_plans is not None and reduce is not None and model.reduction.layers:
        raise ConfigError(f"reduce={shown(reduce)}: TensorRT plans have no boundaries for it, expected none")
    plans = None if make_plans is None else make_plans(model)
    specs, canonical = weight_spec(model), canonical_specs(model)
    stream = WeightStream(read_file(path / "config.json", CheckpointError, SETTINGS_BYTES), sources, canonical)
    total = sum(spec.num_bytes for spec in specs.values())
    engine = write_engine(
        output,
        model,
        lambda: EngineSource(stream.fingerprint(), layout.kind),
        stored_tensors(specs, canonical, quantize, stream),
        files,
        force=force,
        progress=lambda written: progress(written, total),
        plans=plans,
    )
    note_rounded_again(stream, quantize, note)
    return engine


def _reduction(layout: Layout, reduce: Spec | None) -> ReductionConfig:
    """The trained reduction of a checkpoint, or the training-free one that was asked for.

    Raises:
        ConfigError: the SPEC is wrong, or the checkpoint has a reduction of its own.
    """
    if reduce is None:
        return layout.reduction
    chain = parse_spec(reduce, layout.decoder.num_layers)
    if layout.reduction.layers:
        raise ConfigError(f"reduce={shown(reduce)}: the checkpoint has a trained reduction of its own, expected none")
    return chain if chain.steps else layout.reduction


def read_config(path: Path) -> Json:
    """The checkpoint's config.json.

    Raises:
        CheckpointError: there is no such directory, or the file is missing or damaged.
    """
    refuse_gguf(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: not a directory")
    check_name(path)
    refuse_adapter(path)
    if is_there(path / "engine.json") and not is_there(path / "config.json"):
        raise CheckpointError(f"{path}: is an engine, expected the checkpoint that it was built from")
    return read_json(path / "config.json")


def check_name(path: Path) -> None:
    """Refuse a directory that libraries cannot open.

    Raises:
        CheckpointError: its name is not UTF-8.
    """
    if not is_text(path):
        raise CheckpointError(f"{str(path)!r}: its name is not UTF-8, as safetensors needs it: rename it")


def read_layout(checkpoint: Checkpoint, config: Json, tower_directory: Path | None, note: Note) -> Layout:
    """The model of a checkpoint in either layout.

    Raises:
        CheckpointError, ConfigError: see `read_huggingface` and `read_original`.
    """
    if tower_directory is not None and not tower_directory.is_dir():
        raise CheckpointError(f"{tower_directory}: not a directory")
    if tower_directory is not None:
        check_name(tower_directory)
    read = read_huggingface if "text_config" in config else read_original
    return read(checkpoint, config, tower_directory, note)


def _image_processor_files(path: Path, layout: Layout) -> dict[str, bytes]:
    """The image processor's file, for a tower that needs one."""
    tower = layout.tower
    if tower is None or not isinstance(tower.config, ClipConfig | AnyresConfig):
        return {}
    return image_processor_file(path, tower.directory, tower.config)


def _default_dtype(checkpoint: Checkpoint, layout: Layout) -> DType:
    info = checkpoint.tensors.get(f"{layout.names.decoder}{LLAMA[EMBED_TOKENS][0]}.weight")
    return "float32" if info is not None and info.dtype in ("float32", "float64") else "bfloat16"
