"""Builds stage checkpoints to engines with TensorRT-LLM on this machine's GPU. Not yet run with the real package."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from dpn_rt.backends.tensorrt_llm.contract import Engine, Surface, load_surface
from dpn_rt.builders.tensorrt_llm.stage_model import make_stage_model
from dpn_rt.errors import EngineError
from dpn_rt.format.plans import PlanLimits
from dpn_rt.format.safetensors_header import read_header
from dpn_rt.schema.files import SETTINGS_BYTES
from dpn_rt.schema.json_text import read_json


def build_stages(
    checkpoints: list[Path], output: Path, limits: PlanLimits, surface: Surface | None = None
) -> list[Path]:
    """One engine per stage.

    Args:
        checkpoints: as `export_checkpoints` returns them, one per stage.
        output: gets `stage{i}/rank0.engine` and `stage{i}/config.json`.
        limits: of batch and rows per stage.
        surface: the package's API; None: it is imported.

    Raises:
        PlanError: the package cannot be loaded.
        EngineError: a checkpoint is missing.
    """
    package = surface or load_surface()
    directories = []
    for stage, (checkpoint, max_rows) in enumerate(zip(checkpoints, limits.stage_rows, strict=True)):
        config = read_json(checkpoint / "config.json", EngineError, SETTINGS_BYTES)
        read_header(checkpoint / "rank0.safetensors", EngineError)
        weights = load_file(checkpoint / "rank0.safetensors")
        model = make_stage_model(package, package.LLaMAConfig(**config), stage == len(checkpoints) - 1)
        model.load(weights)
        engine: Engine = package.build(model=model, build_config=build_config(package, limits.max_batch, max_rows))
        directory = output / f"stage{stage}"
        directory.mkdir(parents=True)
        engine.save(str(directory))
        directories.append(directory)
    return directories


def build_config(surface: Surface, max_batch: int, max_rows: int) -> object:
    """`BuildConfig` of one stage: both phases in one engine, packed rows, contiguous caches."""
    plugins = surface.PluginConfig()
    plugins.gpt_attention_plugin = "auto"
    plugins.gemm_plugin = "auto"
    plugins.remove_input_padding = True
    return surface.BuildConfig(
        max_input_len=max_rows,
        max_seq_len=max_rows,
        max_batch_size=max_batch,
        max_beam_width=1,
        max_num_tokens=max_batch * max_rows,
        kv_cache_type=surface.KVCacheType.CONTINUOUS,
        strongly_typed=True,
        plugin_config=plugins,
    )
