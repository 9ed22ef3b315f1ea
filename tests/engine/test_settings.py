"""The options that users may give, and the limits that follow from model, plans and options."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest

from dpn_rt import LLM
from dpn_rt.errors import ConfigError, EngineError
from dpn_rt.format.plans import PlanLimits
from dpn_rt.prompts.image import MAX_PIXELS
from dpn_rt.settings import EngineOptions, EngineSettings, resolve
from tests.engine.models import MODEL, with_decoder, write_random_engine

PLANS = PlanLimits(max_batch=3, max_prefill_batch=2, stage_rows=(96, 90, 80, 70))


def test_defaults() -> None:
    assert resolve(MODEL, EngineOptions()) == EngineSettings(
        max_num_seqs=64,
        max_num_batched_tokens=8192,
        max_chunk_tokens=None,
        max_model_len=512,
        kv_cache_bytes=None,
        reuse_bytes=0,
        block_size=16,
        gpu_memory_utilization=0.9,
        max_graph_rows=2048,
        max_image_pixels=MAX_PIXELS,
        max_images=16,
        prepack_weights=None,
        copy_weights=None,
        tensor_parallel_size=1,
    )


def test_what_was_asked_for_is_taken() -> None:
    asked: dict[str, Any] = {
        "max_num_seqs": 5,
        "max_num_batched_tokens": 7,
        "max_chunk_tokens": 11,
        "max_model_len": 512,
        "kv_cache_bytes": 13,
        "reuse_bytes": 17,
        "block_size": 19,
        "gpu_memory_utilization": 1,
        "max_graph_rows": 21,
        "max_image_pixels": 23,
        "limit_mm_per_prompt": {"image": 29},
        "prepack_weights": False,
        "copy_weights": True,
        "tensor_parallel_size": 2,
    }
    settings = resolve(MODEL, EngineOptions(**asked))
    options = {field.name for field in dataclasses.fields(EngineOptions)}
    assert asked.keys() == options - {"reduce"}, "every option is here, but what becomes part of the model"
    assert asked.pop("limit_mm_per_prompt") == {"image": settings.max_images}
    assert dataclasses.asdict(settings) == {**asked, "max_images": 29}


@pytest.mark.parametrize("value", [{"video": 1}, {"image": -1}, {"image": True}, {"image": "2"}, 3, ["image"]])
def test_limits_of_images(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"limit_mm_per_prompt=.*: expected {\"image\": N} with a whole number N"):
        EngineOptions(limit_mm_per_prompt=value)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("prepack_weights", "yes", "expected True, False or None"),
        ("copy_weights", 1, "expected True, False or None"),
        ("max_model_len", 1, "expected a whole number of at least 2"),
    ],
)
def test_values_of_the_wrong_kind(name: str, value: Any, expected: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}={value!r}: {expected}$"):
        EngineOptions(**{name: value})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"verify": "no"}, ConfigError, "^verify='no': expected True or False$"),
        ({"reduce": 5}, ConfigError, "^reduce=5: expected a SPEC such as 'fastv:k=2,ratio=0.5', or a list of them$"),
        ({"engine_dir": "x" * 5000}, EngineError, "not an engine directory"),
    ],
)
def test_arguments_of_the_wrong_kind(tmp_path: Path, options: dict[str, Any], error: type, message: str) -> None:
    engine = write_random_engine(tmp_path / "engine")
    with pytest.raises(error, match=message):
        LLM(**{"engine_dir": engine, **options})


def test_no_images_at_all() -> None:
    assert EngineOptions(limit_mm_per_prompt={"image": 0}).max_images == 0
    assert EngineOptions(limit_mm_per_prompt={}).max_images == 16


def test_the_python_interface_has_the_same_defaults() -> None:
    parameters = inspect.signature(LLM).parameters
    for option in dataclasses.fields(EngineOptions):
        if option.name != "max_image_pixels":  # the caller has the image already
            assert parameters[option.name].default == option.default, option.name


@pytest.mark.parametrize(
    ("model_length", "asked", "batched"), [(512, None, 8192), (20_000, None, 20_000), (20_000, 9_000, 9_000)]
)
def test_a_prefill_step_holds_the_longest_prompt(model_length: int, asked: int | None, batched: int) -> None:
    model = with_decoder(max_position_embeddings=model_length)
    settings = resolve(model, EngineOptions(max_model_len=asked))
    assert settings.max_num_batched_tokens == settings.max_prefill_tokens == batched


def test_a_longer_prompt_is_prefilled_alone() -> None:
    settings = resolve(MODEL, EngineOptions(max_num_batched_tokens=100))
    assert (settings.max_num_batched_tokens, settings.max_prefill_tokens) == (100, 512)
    assert resolve(MODEL, EngineOptions(max_num_batched_tokens=600, max_model_len=9)).max_prefill_tokens == 600


def test_longer_than_the_model() -> None:
    with pytest.raises(ConfigError, match="max_model_len=513: expected at most 512, the model's length"):
        resolve(MODEL, EngineOptions(max_model_len=513))


@pytest.mark.parametrize(
    ("model_length", "asked", "length"),
    [
        (2**20 - 1, None, 2**20 - 1),
        (2**20 + 1, None, 2**20),
        (2**24, None, 2**20),
        (2**24, 2**20 + 1, 2**20 + 1),
        (2**24, 2**24, 2**24),
    ],
)
def test_a_length_beyond_any_use_must_be_asked_for(model_length: int, asked: int | None, length: int) -> None:
    """Its tables take memory and time before the first request."""
    model = with_decoder(max_position_embeddings=model_length)
    assert resolve(model, EngineOptions(max_model_len=asked)).max_model_len == length


def test_plans_limit_what_can_be_asked_for() -> None:
    settings = resolve(MODEL, EngineOptions(max_chunk_tokens=8), PLANS)
    assert (settings.max_num_seqs, settings.max_model_len, settings.max_chunk_tokens) == (3, 96, None)
    less = resolve(MODEL, EngineOptions(max_num_seqs=2, max_model_len=40), PLANS)
    assert (less.max_num_seqs, less.max_model_len) == (2, 40)
    with pytest.raises(ConfigError, match=r"kv_cache_bytes=5: expected none.* are 3 slots of \[96, 90, 80, 70\] rows"):
        resolve(MODEL, EngineOptions(kv_cache_bytes=5), PLANS)


@pytest.mark.parametrize("value", [0, -1, True, 1.0, "8"])
@pytest.mark.parametrize(
    "name",
    [
        *("max_num_seqs", "max_num_batched_tokens", "max_chunk_tokens", "max_model_len", "kv_cache_bytes"),
        *("block_size", "max_image_pixels"),
    ],
)
def test_counts_are_whole_and_positive(name: str, value: Any) -> None:
    least = 2 if name == "max_model_len" else 1
    with pytest.raises(ConfigError, match=f"{name}={value!r}: expected a whole number of at least {least}"):
        EngineOptions(**{name: value})


@pytest.mark.parametrize("name", ["max_num_seqs", "block_size", "max_image_pixels"])
def test_options_without_a_default_of_the_model(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}=None: expected a whole number of at least 1"):
        EngineOptions(**{name: None})


@pytest.mark.parametrize("value", [-1, True, None, 0.5])
@pytest.mark.parametrize("name", ["reuse_bytes", "max_graph_rows"])
def test_numbers_that_may_be_0(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name}={value!r}: expected a whole number of at least 0"):
        EngineOptions(**{name: value})
    assert getattr(EngineOptions(**{name: 0}), name) == 0


@pytest.mark.parametrize("value", [0, -0.1, 1.01, True, None, "0.9"])
def test_gpu_memory_utilization(value: Any) -> None:
    with pytest.raises(ConfigError, match=f"gpu_memory_utilization={value!r}: expected a number above 0 and at most 1"):
        EngineOptions(gpu_memory_utilization=value)
