"""`python -m dpn_rt.train_routers` from a dense checkpoint to an engine."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dpn_rt import LLM, SamplingParams
from dpn_rt.build import main as build
from dpn_rt.model.reduction.pooling_config import PoolingConfig
from dpn_rt.reference import EagerDpn
from dpn_rt.train_routers import main
from dpn_rt.training.checkpoints import last_checkpoint
from dpn_rt.training.trainer import RouterTrainer
from examples.tiny_dpn.data import sample
from tests.model.llava_checkpoints import save_checkpoint
from tests.skips import NO_PEFT

STEPS, SAVED = 16, 8
SETTINGS = {
    "--max-steps": STEPS,
    "--save-steps": SAVED,
    "--keep": 2,
    "--log-steps": 4,
    "--batch-size": 4,
    "--accumulate": 2,
    "--learning-rate": 1e-2,
    "--max-length": 400,
    "--least-visual-tokens": 1,
    "--workers": 0,
    "--dtype": "float32",
}


def command(dense: Path, folder: Path, output: Path, **changed: Any) -> list[str]:
    options = {
        "--checkpoint": dense,
        "--data": folder / "conversations.json",
        "--image-folder": folder / "images",
        "--output": output,
        **SETTINGS,
        **{f"--{name.replace('_', '-')}": value for name, value in changed.items()},
    }
    words = [str(word) for name, value in options.items() if value is not None for word in (name, value)]
    return [*words, "--cpu", "--quiet"]


def logged(output: Path, step: int) -> list[dict[str, float]]:
    state = json.loads((output / "training" / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return dict(EagerDpn.from_checkpoint(path, dtype=torch.float32).state_dict())


@pytest.fixture(scope="module")
def trained(dense: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "trained"
    assert main(command(dense, data, output)) == 0
    return output


def test_losses_fall_and_are_logged(trained: Path) -> None:
    log = logged(trained, STEPS)
    assert [entry["step"] for entry in log] == [4, 8, 12, 16]
    assert log[-1]["language_loss"] < 0.7 * log[0]["language_loss"]
    for entry in log:
        assert entry["loss"] == pytest.approx(entry["language_loss"] + 0.001 * entry["routing_loss"], rel=0.05)
        assert 0.3 < entry["visual_tokens_left"] < 1 and 0 < entry["routing_loss"] <= 1.5


def test_everything_is_trained(trained: Path, dense: Path) -> None:
    before, after = weights(dense), weights(trained)
    assert {name.split(".")[0] for name in after.keys() - before.keys()} == {"boundaries"}
    unused = {"vision.post_layernorm.weight", "vision.post_layernorm.bias"}
    same = [name for name in before if torch.equal(before[name], after[name])]
    assert {name.replace("vision_model.", "") for name in same} <= unused


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    trained: Path, dense: Path, data: Path, tmp_path: Path
) -> None:
    output = tmp_path / "resumed"
    shutil.copytree(trained / "training" / f"checkpoint-{SAVED}", output / "training" / f"checkpoint-{SAVED}")
    assert main([*command(dense, data, output), "--resume"]) == 0
    expected = weights(trained)
    for name, value in weights(output).items():
        assert torch.equal(value, expected[name]), name
    assert logged(output, STEPS) == logged(trained, STEPS)


def test_the_engine_of_the_checkpoint_answers_as_the_reference(trained: Path, tmp_path: Path) -> None:
    assert build(["--checkpoint", str(trained), "--output", str(tmp_path / "engine"), "--quiet"]) == 0
    llm, eager = LLM(tmp_path / "engine"), EagerDpn.from_checkpoint(trained)
    pooling = eager.config.reduction
    assert isinstance(pooling, PoolingConfig)
    assert pooling.layers == (0, 1, 2) and pooling.use_router_token
    assert [each.kernels for each in pooling.boundaries] == [((1, 1), (1, 2), (2, 2))] * 3
    item = sample("test", 0)
    for question in item.questions[::2]:
        content = [{"type": "image", "image": item.image}, {"type": "text", "text": question.text}]
        (output,) = llm.chat([{"role": "user", "content": content}], SamplingParams(temperature=0, max_tokens=6))
        prompt = llm.processor.process(llm.processor.chat([{"role": "user", "content": content}]))
        expected = eager.generate(prompt.prompt_token_ids, prompt.images[0].views[0], max_new_tokens=6)
        assert list(output.outputs[0].token_ids) == expected.token_ids
        assert list(output.pyramid.experts) == list(expected.trace.experts)


def test_a_dpn_is_trained_further(trained: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    refused = command(trained, data, tmp_path / "refused", kernels="1x1,2x2")
    assert main(refused) == 1
    assert "has routers, which are trained further: expected no --kernels" in capsys.readouterr().err
    output = tmp_path / "more"
    assert main(command(trained, data, output, max_steps=1, learning_rate=1e-6)) == 0
    expected = weights(trained)
    for name, value in weights(output).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("old_names", [True, False], ids=["transformers4", "transformers5"])
def test_a_checkpoint_in_hugging_faces_layout(old_names: bool, data: Path, tmp_path: Path) -> None:
    positions = {"max_position_embeddings": 1024}
    save_checkpoint(tmp_path / "llava", tied=False, kv_heads=2, old_names=old_names, **positions)
    output = tmp_path / "out"
    changed = {"max_steps": 1, "learning_rate": 0, "pooling_layers": "0,1", "max_length": None}
    assert main(command(tmp_path / "llava", data, output, **changed)) == 0
    before, after = weights(tmp_path / "llava"), weights(output)
    for name, value in before.items():
        is_table = name in ("language_model.embed_tokens.weight", "lm_head.weight")  # these got a router token
        rows = slice(None, -7) if is_table else slice(None)  # ids of the tokenizer
        assert torch.equal(value[rows], after[name][rows]), name
    assert build(["--checkpoint", str(output), "--output", str(tmp_path / "engine"), "--quiet"]) == 0
    image = {"type": "image", "image": data / "images" / "0.png"}
    llm, eager = LLM(tmp_path / "engine"), EagerDpn.from_checkpoint(output)
    messages = [{"role": "user", "content": [image, {"type": "text", "text": "What is it?"}]}]
    (answer,) = llm.chat(messages, SamplingParams(temperature=0, max_tokens=5))
    prompt = llm.processor.process(llm.processor.chat(messages))
    expected = eager.generate(prompt.prompt_token_ids, prompt.images[0].views[0], max_new_tokens=5)
    assert list(answer.outputs[0].token_ids) == expected.token_ids
    assert list(answer.pyramid.experts) == list(expected.trace.experts) != [None, None]


def test_frozen_parts_stay_and_bf16_trains_the_rest(dense: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "frozen"
    given = command(dense, data, output, max_steps=2, save_steps=1, freeze="tower,decoder", pooling_layers="1")
    assert main([*given, "--bf16", "--recompute"]) == 0
    before, after = weights(dense), weights(output)
    for name, value in before.items():
        is_same = torch.equal(value.bfloat16().float(), after[name])
        assert is_same != name.startswith("projector."), name
    (file,) = (output / "training" / "checkpoint-2").glob("*.safetensors")
    assert file.stat().st_size < 0.2 * (output / "model.safetensors").stat().st_size  # what is frozen is not in it


def test_lora_is_merged_into_the_checkpoint(dense: Path, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason=NO_PEFT)
    output, again = tmp_path / "lora", tmp_path / "again"
    changed = {"max_steps": 2, "save_steps": 1, "lora": 4, "freeze": "tower,projector"}
    assert main(command(dense, data, output, **changed)) == 0
    stored = load_file(output / "training" / "checkpoint-1" / "model.safetensors")
    assert {name.split(".")[0] for name in stored if ".lora_" not in name} == {"boundaries"}
    before, after = weights(dense), weights(output)
    changed_weights = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed_weights == {name for name in before if name.endswith("_proj.weight") and ".layers." in name} - {
        name for name in before if name.startswith("vision.")
    }
    shutil.copytree(output / "training" / "checkpoint-1", again / "training" / "checkpoint-1")
    assert main([*command(dense, data, again, **changed), "--resume"]) == 0
    for name, value in weights(again).items():
        assert torch.equal(value, after[name]), name
    assert build(["--checkpoint", str(output), "--output", str(tmp_path / "engine"), "--quiet"]) == 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data": "missing.json"}, "missing.json: cannot be read: No such file"),
        ({"checkpoint": "nowhere"}, "nowhere: not a directory"),
        ({"image_folder": None}, "none of its 200 items is a conversation: item 1 .*expected --image-folder"),
        ({"pooling_layers": "3,9"}, "pooling layer.* 9"),
        ({"kernels": "1x1,64x64"}, r"kernel \[64, 64\] does not fit"),
        ({"max_length": 5000}, "--max-length 5000: the model has 1024 positions"),
        ({"lora": 4, "freeze": "decoder"}, "--lora 4 trains the decoder: expected no --freeze decoder"),
    ],
)
def test_wrong_options_are_refused(
    changed: dict[str, Any], message: str, dense: Path, data: Path, tmp_path: Path, capsys: Any
) -> None:
    if "lora" in changed:
        pytest.importorskip("peft", reason=NO_PEFT)
    assert main(command(dense, data, tmp_path / "out", **changed)) == 1
    printed = capsys.readouterr().err
    assert re.search(f"^error: .*{message}", printed, re.M), printed
    assert not (tmp_path / "out").exists()  # so that the mended command may be given


def test_a_training_that_ends_before_its_first_checkpoint_leaves_nothing(
    dense: Path, data: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "given").mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(RouterTrainer, "compute_loss", lambda *_, **__: signal.raise_signal(signal.SIGINT))
        for output in (tmp_path / "given", tmp_path / "a" / "b"):
            assert main(command(dense, data, output)) == 130
            assert capsys.readouterr().err.endswith("interrupted; nothing was saved yet\n")
    assert [path.name for path in tmp_path.iterdir()] == ["given"] and not any((tmp_path / "given").iterdir())
    (tmp_path / "given" / "training").mkdir()  # as a kill leaves it
    assert main(command(dense, data, tmp_path / "given", max_steps=1)) == 0


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--freeze", "head", "'head': expected some of tower, projector, decoder"),
        ("--kernels", "2", "'2': expected height x width"),
        ("--lora", "0", "'0': expected at least 1"),
        ("--learning-rate", "fast", "'fast': expected a number"),
        ("--epochs", "0", "'0': expected a number above 0"),
        ("--warmup-ratio", "1.5", "'1.5': expected a share from 0 to 1"),
        ("--unknown", "1", "unrecognized arguments"),
    ],
)
def test_options_that_mean_nothing(option: str, value: str, message: str, dense: Path, data: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as raised:
        main([*command(dense, data, Path("out")), option, value])
    assert raised.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(("rate", "dtype"), [("1e4", "float32"), ("1e30", "float32"), ("1e6", "float16")])
def test_a_training_that_diverges_is_told(
    rate: str, dtype: str, dense: Path, data: Path, tmp_path: Path, capsys: Any
) -> None:
    """In a step, or in what would be written after the last one."""
    steps = {"max_steps": 1, "warmup_ratio": 0} if dtype == "float16" else {"max_steps": 8}
    changed = {"learning_rate": rate, "dtype": dtype, "save_steps": 100, **steps}
    assert main(command(dense, data, tmp_path / "out", **changed)) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.match("error: the train(ing has diverged in step [2-8],|ed weights are not finite in float16,)", line), (
        line
    )
    assert "--learning-rate" in line and not (tmp_path / "out" / "config.json").exists()
    assert dtype == "float16" or not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
)
@pytest.mark.parametrize("kind", ["missing", "cut"])
def test_a_checkpoint_that_is_not_whole_is_left_out(name: str, kind: str, trained: Path, tmp_path: Path) -> None:
    work, notes = tmp_path / "training", []
    shutil.copytree(trained / "training", work)
    assert last_checkpoint(work) == work / f"checkpoint-{STEPS}"
    damaged = work / f"checkpoint-{STEPS}" / name
    damaged.unlink() if kind == "missing" else os.truncate(damaged, 9)
    assert last_checkpoint(work, notes.append) == work / f"checkpoint-{SAVED}"
    (note,) = notes
    assert note.startswith(f"{work / f'checkpoint-{STEPS}'} is left out: {name} is missing or damaged")


def test_an_output_that_exists_is_kept(trained: Path, dense: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    before = (trained / "model.safetensors").stat().st_mtime_ns
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "file").write_text("mine")
    unfinished = tmp_path / "unfinished"
    shutil.copytree(trained / "training" / f"checkpoint-{SAVED}", unfinished / "training" / f"checkpoint-{SAVED}")
    for output, more, message in (
        (trained, [], "holds a checkpoint, expected a directory that does not exist or is empty"),
        (trained, ["--resume"], "holds a checkpoint"),
        (tmp_path / "notes", [], "is not empty"),
        (unfinished, [], "--resume to go on from its last checkpoint"),
        (tmp_path / "new", ["--resume"], "has no checkpoint of a training to go on from"),
    ):
        assert main([*command(dense, data, output), *more]) == 1
        assert message in capsys.readouterr().err
    assert (trained / "model.safetensors").stat().st_mtime_ns == before


def test_rows_are_skipped_when_asked(dense: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    rows = json.loads((data / "conversations.json").read_text())[:8]
    rows[3]["image"] = "gone.png"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    changed = {"data": tmp_path / "rows.json", "max_steps": 1}
    assert main(command(dense, data, tmp_path / "a", **changed)) == 1
    assert "1 rows cannot be used: item 4 (id '0-3'): image" in capsys.readouterr().err
    assert main([*command(dense, data, tmp_path / "b", **changed), "--skip-bad-rows"]) == 0
    assert "note: " in capsys.readouterr().err and (tmp_path / "b" / "config.json").is_file()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_ends_the_training(workers: int, dense: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    rows = json.loads((data / "conversations.json").read_text())[:8]
    rows[3]["image"] = str(tmp_path / "broken.png")
    (tmp_path / "broken.png").write_bytes((data / "images" / "0.png").read_bytes()[:900])
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    changed = {"data": tmp_path / "rows.json", "max_steps": 1, "workers": workers}
    assert main(command(dense, data, tmp_path / "a", **changed)) == 1
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error: ")]
    assert line.startswith("error: item 4 (id '0-3'): image ") and "broken.png" in line
    assert main([*command(dense, data, tmp_path / "b", **changed), "--skip-bad-rows"]) == 0
    assert "note: item 4 (id '0-3'): image " in capsys.readouterr().err or workers


def test_a_checkpoint_of_another_training_is_refused(
    trained: Path, dense: Path, data: Path, tmp_path: Path, capsys: Any
) -> None:
    output = tmp_path / "other"
    shutil.copytree(trained / "training" / f"checkpoint-{SAVED}", output / "training" / f"checkpoint-{SAVED}")
    assert main([*command(dense, data, output, pooling_layers="1"), "--resume"]) == 1
    assert "the checkpoint of another training" in capsys.readouterr().err
    assert main([*command(dense, data, output, kernels="1x1,2x2"), "--resume"]) == 1
    assert "another training, whose weights have other sizes" in capsys.readouterr().err


def test_a_training_does_not_go_on_with_other_settings(
    trained: Path, dense: Path, data: Path, tmp_path: Path, capsys: Any
) -> None:
    """Trainer takes learning rates and the size of a batch from its checkpoint, whatever it is told."""
    output = tmp_path / "other"
    shutil.copytree(trained / "training" / f"checkpoint-{SAVED}", output / "training" / f"checkpoint-{SAVED}")
    fewer = tmp_path / "fewer.json"
    fewer.write_text(json.dumps(json.loads((data / "conversations.json").read_text())[:-1]))
    for changed, told in (
        ({"learning_rate": 0.5, "router_learning_rate": 0.5}, "this one has learning_rate=0.5, router_learning_rate"),
        ({"batch_size": 3}, "this one has batch_size=3: "),
        ({"freeze": "tower"}, "begun with freeze=[], and this one has freeze=['tower']: "),
        ({"pooling_function": "avg"}, "begun with pooling_function='max', and this one has pooling_function='avg': "),
        ({"seed": 77}, "this one has seed=77: "),
        ({"data": fewer, "image_folder": data / "images"}, "this one has conversations="),
    ):
        assert main([*command(dense, data, output, **changed), "--resume"]) == 1
        assert told in capsys.readouterr().err
    assert not (output / "model.safetensors").exists()
