"""Engines with quantised weights, built from checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dpn_rt import LLM, SamplingParams
from dpn_rt import build as command
from dpn_rt.builders.native import build_engine
from dpn_rt.errors import ConfigError
from dpn_rt.format.engine_dir import EngineDir
from dpn_rt.format.weight_spec import canonical_specs, weight_spec
from dpn_rt.model.weights.forms import DENSE_SUFFIX, quantized_form
from dpn_rt.schema.dtypes import Quantize
from examples.tiny_dpn.answers import ask_runtime
from examples.tiny_dpn.data import sample
from tests.builders.huggingface_checkpoint import save_model
from tests.builders.test_quantized_samples import relative
from tests.model.llava_checkpoints import save_checkpoint

CHECKPOINT = Path("examples/tiny_dpn/checkpoint")
QUANTIZED: tuple[Quantize, ...] = ("int8", "int4", "fp8")


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[Quantize, EngineDir]:
    path = tmp_path_factory.mktemp("engines")
    return {quantize: build_engine(CHECKPOINT, path / quantize, quantize=quantize) for quantize in ("none", *QUANTIZED)}


@pytest.mark.parametrize("quantize", QUANTIZED)
def test_an_engine_has_the_quantised_weights_of_the_checkpoint(
    engines: dict[Quantize, EngineDir], quantize: Quantize
) -> None:
    """All else is as it is in the engine that is not quantised: routers, norms, patch embedding, biases."""
    engine, dense = engines[quantize], engines["none"].load_weights()
    assert engine.model.quantize == quantize and engine.model.dtype == "bfloat16"
    stored = engine.load_weights()
    assert list(stored) == list(weight_spec(engine.model))
    forms = set()
    for name, spec in canonical_specs(engine.model).items():
        form = quantized_form(spec, quantize)
        if form is None:
            assert torch.equal(stored.pop(name), dense[name])
            continue
        forms.add((name.split(".")[0], form.suffix))
        module = name.removesuffix(DENSE_SUFFIX)
        for suffix, expected in form.quantize(dense[name]).items():
            assert torch.equal(bits(stored.pop(f"{module}.{suffix}")), bits(expected))
    assert not stored
    eight = ["vision", "projector", "lm_head", *(["embed_tokens"] if quantize == "int4" else [])]
    assert forms == {("layers", quantize), *((part, "fp8" if quantize == "fp8" else "int8") for part in eight)}


def test_how_large_the_file_is(engines: dict[Quantize, EngineDir]) -> None:
    """As large as its bits say."""
    specs = {quantize: weight_spec(engine.model) for quantize, engine in engines.items()}
    sizes = {quantize: sum(spec.num_bytes for spec in each.values()) for quantize, each in specs.items()}
    assert sizes["int8"] < 0.55 * sizes["none"] and sizes["int4"] < 0.75 * sizes["int8"]
    assert sizes["fp8"] == pytest.approx(sizes["int8"], rel=0.01)


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)


@pytest.mark.parametrize("quantize", QUANTIZED)
def test_it_answers_as_the_model_does(engines: dict[Quantize, EngineDir], quantize: Quantize) -> None:
    samples = [sample("test", index) for index in range(3)]
    expected, actual = (ask_runtime(LLM(engines[each].path), samples, each) for each in ("none", quantize))
    same = sum(a.token_ids == b.token_ids for a, b in zip(expected, actual, strict=True))
    assert same >= 28, "of 30"
    assert sum(a.route == b.route for a, b in zip(expected, actual, strict=True)) >= 27


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_a_batch_equals_each_alone(engines: dict[Quantize, EngineDir], quantize: Quantize) -> None:
    """Rows are rounded one by one, so what is beside them changes nothing."""
    llm, asked = LLM(engines[quantize].path), sample("test", 5)
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=3, ignore_eos=True)
    conversations = [
        [{"role": "user", "content": [{"type": "image", "image": asked.image}, {"type": "text", "text": each.text}]}]
        for each in asked.questions
    ]
    together = llm.chat(conversations, params)
    for conversation, output in zip(conversations, together, strict=True):
        alone = llm.chat(conversation, params)[0]
        assert alone.outputs[0].token_ids == output.outputs[0].token_ids
        assert alone.pyramid == output.pyramid


@pytest.mark.parametrize("quantize", QUANTIZED)
def test_an_output_layer_that_is_tied_to_the_embedding(tmp_path: Path, quantize: Quantize) -> None:
    """One table in 8 bits serves both."""
    save_model(tmp_path / "checkpoint", tied=True)
    params = SamplingParams(max_tokens=1, temperature=0, logprobs=-1, ignore_eos=True)
    prompts = [{"prompt_token_ids": torch.randint(3, 90, (length,)).tolist()} for length in (1, 2, 9)]
    logits, form = {}, "fp8" if quantize == "fp8" else "int8"
    for each in ("none", quantize):
        engine = build_engine(tmp_path / "checkpoint", tmp_path / each, dtype="float32", quantize=each)
        names = [name for name in engine.load_weights() if name.startswith(("embed_tokens", "lm_head"))]
        assert sorted(names) == (
            ["embed_tokens.weight"] if each == "none" else [f"embed_tokens.{form}", "embed_tokens.scale"]
        )
        outputs = LLM(engine.path).generate(prompts, params, use_tqdm=False)
        tops = [output.outputs[0].logprobs[0] for output in outputs]
        logits[each] = torch.tensor([[top[token].logprob for token in range(100)] for top in tops])
    assert 0 < relative(logits[quantize], logits["none"]) < {"int8": 0.02, "fp8": 0.06, "int4": 0.15}[quantize]


def test_what_is_refused(tmp_path: Path, engines: dict[Quantize, EngineDir]) -> None:
    with pytest.raises(ConfigError, match="quantize int8: .* dtype is float16"):
        build_engine(CHECKPOINT, tmp_path / "half", dtype="float16", quantize="int8")
    with pytest.raises(ConfigError, match="quantize='int4': TensorRT plans have no quantised weights"):
        build_engine(CHECKPOINT, tmp_path / "plans", quantize="int4", make_plans=lambda model: pytest.fail("built"))
    with pytest.raises(
        ConfigError, match="device='cuda': the engine's weights are int4, .* expected one of none, int8"
    ):
        LLM(engines["int4"].path, device="cuda")
    assert not list(tmp_path.iterdir())


def test_the_command_says_what_it_built(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--checkpoint", str(CHECKPOINT), "--output", str(tmp_path / "engine"), "--quantize", "int8"]
    assert command.main(arguments) == 0
    assert "int8 and bfloat16, 8 layers" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main([*arguments, "--quantize", "int3"])


@pytest.mark.parametrize(("quantize", "bound"), [("int8", 0.2), ("int4", 0.6), ("fp8", 0.3)])
@pytest.mark.parametrize("reduce", [None, "fastv:k=1,ratio=0.5"])
def test_normed_heads_and_windows(tmp_path: Path, quantize: Quantize, bound: float, reduce: str | None) -> None:
    """Norms of heads stay as they are; queries and keys of a layer after a boundary come from parts of its weight."""
    text = {"head_dim": 32, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
    save_checkpoint(tmp_path / "c", tied=False, kv_heads=2, old_names=False, family="qwen3", **text)
    ids = [*range(3, 20), -200, *range(40, 60)]
    media = {"image_embeds": torch.randn(16, 64), "image_grid": (4, 4)}
    prompt, found = {"prompt_token_ids": ids, "multi_modal_data": media}, {}
    for form in ("none", quantize):
        engine = build_engine(tmp_path / "c", tmp_path / form, dtype="float32", quantize=form, reduce=reduce)
        output = LLM(engine.path).generate(prompt, SamplingParams(max_tokens=1, logprobs=-1), use_tqdm=False)[0]
        assert output.outputs[0].logprobs is not None
        entry = output.outputs[0].logprobs[0]
        found[form] = torch.tensor([[entry[token].logprob for token in range(len(entry))]])
        assert engine.load_weights()["layers.0.q_norm.weight"].dtype == torch.float32
    assert relative(found[quantize], found["none"]) < bound
