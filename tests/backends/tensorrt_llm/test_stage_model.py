"""A stage as TensorRT-LLM's model, with fakes of the package's classes: its inputs, its outputs, the build."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dpn_rt.builders.tensorrt_llm.engines import build_stages
from dpn_rt.builders.tensorrt_llm.stage_model import make_stage_model
from dpn_rt.errors import EngineError
from dpn_rt.format.plans import PlanLimits

LIMITS = {"max_batch_size": 4, "max_input_len": 64, "max_seq_len": 64, "max_num_tokens": 256, "opt_batch_size": 1}
CONFIG = SimpleNamespace(
    hidden_size=8,
    norm_epsilon=1e-5,
    dtype="bfloat16",
    kv_dtype="bfloat16",
    logits_dtype="float32",
    vocab_size=11,
    num_key_value_heads=2,
    head_size=4,
    num_hidden_layers=2,
    mapping="one GPU",
)


class Value:
    """A fake tensor of the network: how it was made, and its name as an output."""

    def __init__(self, made: str) -> None:
        self.made, self.marked = made, ""

    def mark_output(self, name: str, dtype: str) -> None:
        self.marked = f"{name} {dtype}"


class Module:
    def __init__(self) -> None:
        pass


class DecoderLayerList:
    def __init__(self, cls: Any, config: Any) -> None:
        self.made = f"{cls} x {config.num_hidden_layers}"

    def forward(self, hidden_states: Value, **options: Any) -> tuple[Value, list[Value]]:
        assert options == {
            "use_cache": True,
            "attention_mask": None,
            "kv_cache_params": "caches",
            "attention_params": "filled attention",
        }
        return Value(f"layers({hidden_states.made})"), [Value("present 0"), Value("present 1")]


class DecoderModelForCausalLM:
    def __init__(self, config: Any, transformer: Any, lm_head: Any) -> None:
        self.transformer, self.lm_head = transformer, lm_head
        self.loaded: dict[str, torch.Tensor] = {}
        self.asked: dict[str, Any] = {}

    def load(self, weights: dict[str, torch.Tensor]) -> None:
        self.loaded = weights

    def prepare_attention_inputs(self, **limits: Any) -> dict[str, str]:
        self.asked = limits
        names = (
            "past_key_value",
            "host_past_key_value_lengths",
            "host_max_attention_window_sizes",
            "host_sink_token_length",
            "cache_indirection",
            "sequence_length",
            "context_lengths",
            "host_context_lengths",
            "host_request_types",
            "host_runtime_perf_knobs",
            "host_context_progress",
        )
        return {name: name for name in names}


def applied(kind: str) -> Any:
    return lambda **options: lambda x: Value(f"{kind}({x.made})")


def played_surface(**more: Any) -> Any:
    ranges = {"num_tokens_range": [[1, 4, 256]], "bbd_range": [[1, 1, 4]]}
    return SimpleNamespace(
        Module=Module,
        DecoderLayerList=DecoderLayerList,
        LLaMADecoderLayer="layer",
        DecoderModelForCausalLM=DecoderModelForCausalLM,
        RmsNorm=applied("norm"),
        ColumnLinear=applied("head"),
        Attention=SimpleNamespace(fill_attention_params=lambda model, params: f"filled {params}"),
        gather_last_token_logits=lambda x, last, packed: Value(f"last({x.made}, {last}, {packed})"),
        GenerationMixin=SimpleNamespace(get_profiles_ranges=lambda **limits: (1, ranges)),
        KVCacheType=SimpleNamespace(CONTINUOUS="continuous"),
        str_dtype_to_trt=lambda name: f"trt {name}",
        Tensor=lambda **options: options,
        KeyValueCacheParams=lambda **options: options,
        AttentionParams=lambda **options: options,
        **more,
    )


def test_a_stage_in_the_middle_gives_hidden_states() -> None:
    model = make_stage_model(played_surface(), CONFIG, is_last=False)
    result, presents = model.forward(Value("in"), "caches", "attention")
    assert (result.made, result.marked) == ("layers(in)", "hidden_states_output bfloat16")
    assert [present.marked for present in presents] == ["present_key_value_0 bfloat16", "present_key_value_1 bfloat16"]
    assert model.lm_head is None
    assert not hasattr(model.transformer, "ln_f")
    assert "last_token_ids" not in model.prepare_inputs(**LIMITS)


def test_the_last_stage_gives_logits() -> None:
    model = make_stage_model(played_surface(), CONFIG, is_last=True)
    result, _ = model.forward(Value("in"), "caches", "attention", "ends")
    assert (result.made, result.marked) == ("head(last(norm(layers(in)), ends, True))", "logits float32")
    inputs = model.prepare_inputs(**LIMITS)
    assert inputs["last_token_ids"]["shape"] == [-1]
    assert inputs["last_token_ids"]["dtype"] == "trt int32"


def test_inputs_are_packed_rows_and_contiguous_caches() -> None:
    model = make_stage_model(played_surface(), CONFIG, is_last=False)
    inputs = model.prepare_inputs(**LIMITS)
    assert set(inputs) == {"hidden_states", "kv_cache_params", "attention_params"}
    hidden = inputs["hidden_states"]
    assert (hidden["name"], hidden["dtype"], hidden["shape"]) == ("hidden_states_input", "trt bfloat16", [-1, 8])
    assert dict(hidden["dim_range"]) == {"num_tokens": [[1, 4, 256]], "hidden_size": [8]}
    for each in (inputs["kv_cache_params"], inputs["attention_params"]):
        assert all(value == name for name, value in each.items() if name != "max_context_length")
    assert inputs["attention_params"]["max_context_length"] == 64
    asked = model.asked
    assert (asked["num_layers"], asked["num_kv_heads"], asked["head_size"], asked["max_seq_len"]) == (2, 2, 4, 64)
    assert (asked["kv_cache_type"], asked["remove_input_padding"]) == ("continuous", True)
    assert asked["mapping"] == "one GPU"


def test_each_stage_is_built_with_its_own_length(tmp_path: Path) -> None:
    built: list[tuple[Any, Any]] = []

    def build(model: Any, build_config: Any) -> Any:
        built.append((model, build_config))
        return SimpleNamespace(save=lambda directory: (Path(directory) / "rank0.engine").write_bytes(b"engine"))

    surface = played_surface(
        build=build,
        BuildConfig=lambda **options: options,
        PluginConfig=SimpleNamespace,
        LLaMAConfig=lambda **options: SimpleNamespace(**{**vars(CONFIG), **options}),
    )
    checkpoints = []
    for stage in range(2):
        checkpoint = tmp_path / f"c{stage}"
        checkpoint.mkdir()
        (checkpoint / "config.json").write_text(json.dumps({"num_hidden_layers": 2 + stage}))
        save_file({"x": torch.full((1,), float(stage))}, checkpoint / "rank0.safetensors")
        checkpoints.append(checkpoint)
    directories = build_stages(checkpoints, tmp_path / "out", PlanLimits(4, 4, (64, 32)), surface)
    assert [(directory / "rank0.engine").read_bytes() for directory in directories] == [b"engine"] * 2
    assert [config["max_seq_len"] for _, config in built] == [64, 32]
    assert [config["max_num_tokens"] for _, config in built] == [256, 128]
    assert [float(model.loaded["x"]) for model, _ in built] == [0.0, 1.0]
    assert [model.transformer.layers.made for model, _ in built] == ["layer x 2", "layer x 3"]
    assert [model.lm_head is None for model, _ in built] == [True, False]
    assert vars(built[0][1]["plugin_config"])["remove_input_padding"] is True


def test_a_checkpoint_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="config.json: cannot be read"):
        build_stages([tmp_path], tmp_path / "out", PlanLimits(4, 4, (64,)), played_surface())
