"""Plans that TensorRT-RTX really builds, without a GPU; the inputs and outputs of every network."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from dpn_rt.backends.tensorrt.library import Log, load_library, torch_dtype
from dpn_rt.backends.tensorrt.plan import Signature
from dpn_rt.backends.tensorrt.tensors import StagePlan
from dpn_rt.build import main
from dpn_rt.builders.tensorrt.plans import build_plan, build_plans, normal_capability
from dpn_rt.errors import ConfigError, PlanError
from dpn_rt.format.config import ModelConfig
from dpn_rt.format.engine_dir import EngineDir
from dpn_rt.format.plans import PlanLimits, plan_files
from dpn_rt.model.config import DecoderConfig, RopeConfig
from dpn_rt.model.reduction.pooling_config import BoundaryConfig, PoolingConfig
from tests.backends.tensorrt.evaluator import stage_network
from tests.engine.models import MODEL, PROMPT, with_decoder
from tests.skips import NO_TENSORRT

pytest.importorskip("tensorrt_rtx_bindings", reason=NO_TENSORRT)

ROOT = Path(__file__).parents[3]
TARGETS = "80,86,89,120"
PLAN_BYTES = 16 << 20
BF16 = dataclasses.replace(MODEL, dtype="bfloat16")
LIMITS = PlanLimits(4, 2, (256, 192, 128, 64))
KERNELS = ((1, 1), (1, 2), (2, 2))
LLAVA_7B = ModelConfig(
    dtype="bfloat16",
    decoder=DecoderConfig(32000, 4096, 11008, 32, 32, 32, 128, 1e-5, RopeConfig(10000.0), 4096, False, False, False),
    reduction=PoolingConfig(tuple(BoundaryConfig(layer, KERNELS) for layer in (7, 15, 23)), use_router_token=True),
    prompt=PROMPT,
    vision=None,
    projector=None,
)


def signatures(plan: StagePlan) -> tuple[Signature, Signature]:
    """Inputs and outputs of a network as the library reports them."""
    stage = stage_network(load_library("rtx"), plan)
    network = stage.network
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    return tuple({t.name: (torch_dtype(t.dtype), tuple(t.shape)) for t in each} for each in (inputs, outputs))  # type: ignore[return-value]


def test_plans_of_the_tiny_checkpoint_build_for_every_target(tmp_path: Path) -> None:
    checkpoint = ROOT / "examples/tiny_dpn/checkpoint"
    arguments = ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "e"), "--quiet"]
    options = ["--backend", "tensorrt", "--sm", TARGETS, "--max-rows", "512,256,256,128", "--max-batch", "4"]
    assert main([*arguments, *options]) == 0
    engine = EngineDir.open(tmp_path / "e", verify=True)
    assert engine.plans is not None
    assert engine.plans.compute_capabilities == ("8.0", "8.6", "8.9", "12.0")
    assert engine.plans.limits == PlanLimits(4, 4, (512, 256, 256, 128))
    assert engine.plans.version == load_library("rtx").__version__
    assert set(plan_files(4)) < set(engine.files)
    manifest = json.loads((tmp_path / "e/engine.json").read_text())
    assert manifest["plans"]["flavor"] == "rtx"
    assert all(0 < engine.files[name].bytes < PLAN_BYTES for name in plan_files(4))


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("stage", [0, 3])
def test_float16_plans_with_grouped_queries_build(stage: int, phase: str) -> None:
    plan = StagePlan(dataclasses.replace(MODEL, dtype="float16"), LIMITS, stage, phase)  # type: ignore[arg-type]
    dtypes = {dtype for signature in signatures(plan) for dtype, _ in signature.values() if dtype.is_floating_point}
    assert dtypes == {torch.float16, torch.float32}  # rotary tables are in float32
    assert 0 < len(build_plan(load_library("rtx"), plan, ["7.5", "8.6"])) < PLAN_BYTES


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_stage_of_7b_shape_builds_without_its_weights(phase: str) -> None:
    plan = StagePlan(LLAVA_7B, PlanLimits(8, 4, (1024,) * 4), 1, phase)  # type: ignore[arg-type]
    data = build_plan(load_library("rtx"), plan, ["8.9"])
    weight_bytes = sum(tensor.dtype.itemsize * torch.Size(tensor.shape).numel() for tensor in plan.weights().values())
    assert weight_bytes > 3e9
    assert len(data) < PLAN_BYTES


def layer_weights(layer: int) -> Signature:
    """Shapes of `MODEL`: hidden 64, intermediate 96, 4 heads of 16, 2 heads of keys and values."""
    return {
        f"layers.{layer}.input_norm.weight": (torch.bfloat16, (64,)),
        f"layers.{layer}.qkv.weight": (torch.bfloat16, (128, 64)),
        f"layers.{layer}.o.weight": (torch.bfloat16, (64, 64)),
        f"layers.{layer}.post_norm.weight": (torch.bfloat16, (64,)),
        f"layers.{layer}.gate_up.weight": (torch.bfloat16, (192, 64)),
        f"layers.{layer}.down.weight": (torch.bfloat16, (64, 96)),
    }


@pytest.mark.parametrize(("stage", "layers"), list(enumerate([(0, 1), (2,), (3, 4), (5, 6)])))
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_inputs_and_outputs_of_every_network(stage: int, layers: tuple[int, ...], phase: str) -> None:
    rows = -1 if phase == "prefill" else 1
    cache = torch.bfloat16, (-1, 2, LIMITS.stage_rows[stage], 16)
    caches = [f"layers.{layer}.{part}_cache" for layer in layers for part in ("key", "value")]
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "hidden": (torch.bfloat16, (-1, rows, 64)),
        "positions": (torch.int32, (-1, rows)),
        "write_rows": (torch.int32, (-1,)),
        "kv_lengths": (torch.int32, (-1,)),
        "rope.cos": (torch.float32, (256, 8)),
        "rope.sin": (torch.float32, (256, 8)),
        **dict.fromkeys(caches, cache),
    }
    for layer in layers:
        expected |= layer_weights(layer)
    outputs: Signature = {"hidden_out": (torch.bfloat16, (-1, rows, 64))}
    if stage == 3:
        expected |= {"norm.weight": (torch.bfloat16, (64,)), "lm_head.weight": (torch.bfloat16, (100, 64))}
        if phase == "prefill":
            expected["last_rows"] = torch.int32, (-1, 1)
        outputs = {"logits": (torch.bfloat16, (-1, 100))}
    inputs, found = signatures(StagePlan(BF16, LIMITS, stage, phase))  # type: ignore[arg-type]
    assert inputs == expected
    assert found == outputs | {f"{name}_out": cache for name in caches}


def test_biases_and_tied_embeddings_are_inputs() -> None:
    model = with_decoder(BF16, qkv_bias=True, o_bias=True, tie_word_embeddings=True)
    inputs, _ = signatures(StagePlan(model, LIMITS, 3, "prefill"))
    assert inputs["layers.5.qkv.bias"] == (torch.bfloat16, (128,))
    assert inputs["layers.6.o.bias"] == (torch.bfloat16, (64,))
    assert inputs["embed_tokens.weight"] == (torch.bfloat16, (100, 64))
    assert "lm_head.weight" not in inputs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_batch": 0}, "max batch 0: expected at least 1"),
        ({"max_prefill_batch": 5}, "max prefill batch 5: expected 1 to the max batch 4"),
        ({"stage_rows": (256,)}, r"rows for 1 stages \[256\]: expected 4"),
        ({"stage_rows": (256, 0, 9999, 2)}, r"rows per stage \[0, 9999\]: expected 1 to the model's length 512"),
    ],
)
def test_limits_that_cannot_be(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_plans(BF16, "rtx", ["86"], dataclasses.replace(LIMITS, **change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["90"], "cannot build for SM90: expected some of .*SM120"),
        (["86", "75"], r"compute capability 7\.5: expected 8\.0 or newer"),
        (["blackwell"], "compute capability 'blackwell': expected one such as 86 or 8.6"),
        ([], "name at least one"),
    ],
)
def test_targets_that_cannot_be(targets: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_plans(BF16, "rtx", targets, LIMITS)


def test_a_target_without_the_dtype_is_refused_with_what_the_library_said() -> None:
    """SM75 has no bfloat16; this also shows that plans are built for the named targets."""
    with pytest.raises(PlanError, match=r"stage1\.decode\.plan cannot be built for 7\.5: error: .*sm75"):
        build_plan(load_library("rtx"), StagePlan(BF16, LIMITS, 1, "decode"), ["7.5"])


def test_float32_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected --dtype bfloat16 or float16"):
        build_plans(MODEL, "rtx", ["86"], LIMITS)


def test_what_the_library_says_is_in_the_error() -> None:
    log = Log(load_library("rtx"))
    library = load_library("rtx")
    log.logger.log(library.ILogger.WARNING, "another logger is in use")
    log.logger.log(library.ILogger.ERROR, "no kernel for this")
    log.logger.log(library.ILogger.INFO, "chatter")
    assert str(log.explain("stage0.prefill.plan cannot be built")) == (
        "stage0.prefill.plan cannot be built: error: no kernel for this | warning: another logger is in use"
    )


@pytest.mark.parametrize("text", ["86", "8.6", "sm_86", "SM86"])
def test_ways_to_write_a_capability(text: str) -> None:
    assert normal_capability(text) == "8.6"
    assert normal_capability("120") == "12.0"
