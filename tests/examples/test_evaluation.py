"""Evaluation of the small DPN: its numbers, and the command from start to end."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dpn_rt import LLM
from dpn_rt.builders.native import build_engine
from dpn_rt.format.flops import prefill_flops
from dpn_rt.reference import EagerDpn
from examples.tiny_dpn import evaluate, plots, quantized, reducers, train
from examples.tiny_dpn.agreement import compare_with_eager, first_difference
from examples.tiny_dpn.answers import Answer, ask_runtime, chat_messages
from examples.tiny_dpn.data import KINDS, LEVELS, sample
from examples.tiny_dpn.metrics import fine_to_coarse, group, summarize
from examples.tiny_dpn.model import model_config
from examples.tiny_dpn.report import markdown, table
from examples.tiny_dpn.tokenizer import train_tokenizer

ANSWER = Answer(0, "background", "coarse", "red", " red", (5, 2), ("2x2",), (256, 64), 40, 100)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DPN with random weights in the published layout."""
    model = EagerDpn(model_config("dpn", train_tokenizer().get_vocab_size())).eval()
    path = tmp_path_factory.mktemp("evaluation") / "checkpoint"
    train.save_checkpoint(model, path)
    return path


def test_an_answer_is_right_when_it_is_the_same_but_for_spaces() -> None:
    assert ANSWER.is_right
    assert not dataclasses.replace(ANSWER, text="red.").is_right
    assert not dataclasses.replace(ANSWER, text="Red").is_right


def test_group_by_hand() -> None:
    wrong = dataclasses.replace(ANSWER, text="blue", visual_tokens=(256, 128), flops=110, dense_flops=200)
    result = group([ANSWER, ANSWER, ANSWER, wrong])
    assert result.questions == 4 and result.accuracy == 0.75
    assert result.visual_tokens == (256, 80)
    assert result.right == 3 and result.flops == pytest.approx((3 * 40 + 110) / 4)
    # The mean of ratios gives every question the same weight, of any length.
    assert result.flops_ratio == pytest.approx((3 * 40 / 100 + 110 / 200) / 4)


def test_fine_to_coarse_compares_within_a_picture() -> None:
    def answer(scene: int, level: str, tokens: int) -> Answer:
        return dataclasses.replace(ANSWER, scene=scene, level=level, visual_tokens=(256, tokens))

    # Picture 0: (30 + 50) / 2 over 10; picture 1: 60 over (20 + 40) / 2; the middle question does not count.
    answers = [answer(0, "coarse", 10), answer(0, "fine", 30), answer(0, "fine", 50), answer(0, "middle", 999)]
    answers += [answer(1, "coarse", 20), answer(1, "coarse", 40), answer(1, "fine", 60)]
    assert fine_to_coarse(answers) == pytest.approx((4 + 2) / 2)


def test_fine_to_coarse_of_means_weighs_pictures_by_their_tokens() -> None:
    levels = [("coarse", 10), ("fine", 40), ("coarse", 30), ("fine", 30), ("middle", 999)]
    answers = [dataclasses.replace(ANSWER, level=level, visual_tokens=(256, n)) for level, n in levels]
    answers += [dataclasses.replace(ANSWER, kind=kind, level="middle") for kind in KINDS]
    assert summarize(answers).fine_to_coarse_of_means == pytest.approx(35 / 20)


def test_prefill_flops_counted_row_by_row() -> None:
    vocab_size, text, visual = 512, 20, (256, 128, 32, 8)
    layers_of_stage = (1, 1, 2, 4)  # pooled after layers 0, 1 and 3 of 8
    multiply_adds = 192 * vocab_size
    for layers, tokens in zip(layers_of_stage, visual, strict=True):
        for row in range(text + tokens):
            projections = 4 * 192 * 192 + 3 * 192 * 512
            scores_and_values = 2 * 192 * (row + 1)
            multiply_adds += layers * (projections + scores_and_values)
    rows = [text + tokens for tokens in visual]
    assert prefill_flops(model_config("dpn", vocab_size), rows) == 2 * multiply_adds


def test_first_difference() -> None:
    assert first_difference([5, 6, 2], [5, 7, 8, 2]) == 1
    assert first_difference([2], [5, 2]) == 0


def test_summary_counts_routes_of_each_kind() -> None:
    answers = [dataclasses.replace(ANSWER, kind=kind, level=level) for kind, level in KINDS.items()]
    answers.append(dataclasses.replace(ANSWER, route=("1x1",)))
    summary = summarize(answers)
    assert summary.routes["background"] == {"2x2": 1, "1x1": 1} and summary.routes["word"] == {"2x2": 1}
    assert summary.levels["coarse"].questions == 4 and summary.overall.questions == 11


def test_table_is_markdown() -> None:
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_command_end_to_end(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", f"dpn={checkpoint}", "--output", str(tmp_path), "--scenes", "1", "--seed", "3"]
    assert evaluate.main([*arguments, "--dtype", "float32"]) == 0
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    (run,) = evaluation["runs"]
    assert evaluation["questions"] == 10 and run["agreement"] == 1.0 and not run["disagreements"]
    assert evaluation["seed"] == 3 and evaluation["command"].endswith("--seed 3 --dtype float32")
    assert set(run["summary"]["kinds"]) == set(KINDS)
    assert (tmp_path / "evaluation.md").read_text() in capsys.readouterr().out
    for name in ("accuracy_flops.png", "routes.png", "pyramids.png"):
        assert (tmp_path / name).stat().st_size > 1000


def test_answers_cost_what_their_rows_cost(checkpoint: Path, tmp_path: Path) -> None:
    llm, asked = LLM(build_engine(checkpoint, tmp_path / "engine", dtype="float32").path), sample("test", 0)
    for answer, question in zip(ask_runtime(llm, [asked], "test"), asked.questions, strict=True):
        text = llm.processor.process(llm.processor.chat(chat_messages(asked.image, question.text))).num_text_rows
        assert answer.flops == prefill_flops(llm.model, [text + n for n in answer.visual_tokens])
        assert answer.dense_flops == prefill_flops(llm.model, [text - 1 + 256] * 4), "the dense model has no <ROUTER>"


def test_margins_of_a_disagreement(checkpoint: Path, tmp_path: Path) -> None:
    engine = build_engine(checkpoint, tmp_path / "engine", dtype="float32").path
    llm, asked = LLM(engine), sample("test", 0)
    first, *others = ask_runtime(llm, [asked], "test")
    # As if the runtime had given another third token than it does, or another last one where its answer is short.
    position = min(2, len(first.token_ids) - 1)
    changed = (*first.token_ids[:position], first.token_ids[position] + 1, *first.token_ids[position + 1 :])
    wrong = dataclasses.replace(first, token_ids=changed)
    (found,) = compare_with_eager(llm, engine, [asked], [wrong, *others], "test")
    assert (found.scene, found.kind) == (0, first.kind)
    assert found.position == position and found.question == asked.questions[0].text
    assert found.expected == asked.questions[0].answer and found.runtime_alone == found.eager == first.text
    assert found.runtime_margin == pytest.approx(found.eager_margin, abs=1e-4)
    assert len(found.runtime_router_margins) == 3
    assert found.runtime_router_margins == pytest.approx(found.eager_router_margins, abs=1e-5)


def test_report_shows_a_disagreement_with_its_margins() -> None:
    answers = [dataclasses.replace(ANSWER, kind=kind, level=level) for kind, level in KINDS.items()]
    text = markdown({"scenes": 1, "questions": 10, "seed": 0, "seconds": 1.0, "versions": {}, "runs": [_run(answers)]})
    assert "| 4 | number | `'12'` | `'13'` | `'13'` | 1 | -; 0.004 | 0.5, -; 0.25, - |" in text
    assert "| background | coarse | 1 of 1 | 100.0 % | 256, 64 | 0.400 | 2x2 (100.0 %) |" in text


def test_pictures_from_the_record_alone(tmp_path: Path) -> None:
    kernels = ["1x1", "1x2", "2x2"]
    routes = [(a, b, c) for a in kernels for b in kernels for c in kernels]
    answers = [
        dataclasses.replace(ANSWER, scene=scene, kind=kind, level=level, route=routes[(scene * 7 + position) % 27])
        for scene in range(12)
        for position, (kind, level) in enumerate(KINDS.items())
    ]
    run = json.loads(json.dumps(_run(answers)))
    plots.accuracy_against_flops([run, run | {"model": "mine"}], tmp_path / "accuracy_flops.png")
    plots.routes_per_kind(run, tmp_path / "routes.png")
    assert {file.name for file in tmp_path.iterdir()} == {"accuracy_flops.png", "routes.png"}
    assert set(run["summary"]["levels"]) == set(LEVELS)


def _run(answers: list[Answer]) -> dict[str, object]:
    disagreement = {
        "scene": 4,
        "kind": "number",
        "runtime": "12",
        "runtime_alone": "13",
        "eager": "13",
        "position": 1,
        "runtime_margin": None,
        "eager_margin": 0.004,
        "runtime_router_margins": [0.5, None],
        "eager_router_margins": [0.25, None],
    }
    return {
        "model": "dpn",
        "dtype": "float32",
        "summary": dataclasses.asdict(summarize(answers)),
        "agreement": 0.9,
        "disagreements": [disagreement],
    }


def _truncated_weights(path: Path) -> None:
    (weights,) = path.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1000])


def _no_weights(path: Path) -> None:
    (weights,) = path.glob("*.safetensors")
    weights.unlink()


def _no_json(path: Path) -> None:
    (path / "config.json").write_text("{")


@pytest.mark.parametrize("damage", [_truncated_weights, _no_weights, _no_json])
def test_damaged_checkpoint_is_refused_by_name(
    damage: Callable[[Path], None], checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    damage(broken)
    output = tmp_path / "output"
    assert evaluate.main(["--model", f"dpn={broken}", "--output", str(output), "--scenes", "1"]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "broken" in message
    assert not list(output.iterdir())


def test_unwritable_output_is_refused_before_the_checkpoint_is_looked_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert evaluate.main(["--model", "dpn=x", "--output", str(tmp_path / "file" / "x")]) == 1
    assert "cannot write" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "dpn=a", "--model", "dpn=b"], "another one"),
        (["--model", "dpn"], "expected NAME=DIR"),
        (["--model", "dpn=a", "--scenes", "0"], "at least 1"),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        evaluate.main([*arguments, "--output", str(tmp_path / "output")])
    assert message in capsys.readouterr().err and not (tmp_path / "output").exists()


def test_sweep_of_reductions(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every method on the same questions, beside a DPN; FLOPs are those of the dense model's rows."""
    monkeypatch.setattr(reducers, "SWEEPS", {"kept": ["fastv:k=1,ratio=0.5"], "before": ["pool:kernel=4x4,layer=0"]})
    monkeypatch.setattr(reducers, "ROUTER_BIASES", (0.0,))
    dense = Path("examples/tiny_dpn/dense_checkpoint")
    models = ["--dense", str(dense), "--dpn", str(checkpoint), "--static", str(checkpoint)]
    assert reducers.main([*models, "--output", str(tmp_path), "--scenes", "1"]) == 0
    result = json.loads((tmp_path / "sweep.json").read_text())
    assert [point["method"] for point in result["points"]] == ["dense", "kept", "before", "DPN", "static, trained"]
    ratios = [point["overall"]["flops_ratio"] for point in result["points"]]
    assert ratios[0] == 1 and all(0.1 < ratio < 1 for ratio in ratios[1:3]), ratios
    assert all(0.1 < ratio < 1.05 for ratio in ratios[3:]), "random routers may pool nothing, and cost a row"
    last_stage = [point["overall"]["visual_tokens"][-1] for point in result["points"][:3]]
    assert last_stage == [256, 128, 16]
    assert "`fastv:k=1,ratio=0.5`" in (tmp_path / "sweep.md").read_text()
    assert (tmp_path / "sweep.png").stat().st_size > 1000


def test_sweep_names_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reducers.main(["--dense", str(tmp_path / "none"), "--output", str(tmp_path / "out"), "--scenes", "1"]) == 1
    assert str(tmp_path / "none") in capsys.readouterr().err


def test_quantised_engines_beside_bfloat16(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--checkpoint", "examples/tiny_dpn/checkpoint", "--output", str(tmp_path), "--scenes", "1"]
    assert quantized.main(arguments) == 0
    dense, eight, four, floats = json.loads((tmp_path / "quantized.json").read_text())["rows"]
    assert dense["same_answers"] == dense["same_routes"] == 1 and dense["lost"] == dense["won"] == 0
    assert dense["num_bytes"] > eight["num_bytes"] > four["num_bytes"]
    assert eight["same_answers"] >= 0.9 and floats["same_answers"] >= 0.8
    assert dense["num_bytes"] > floats["num_bytes"] > four["num_bytes"]
    assert (tmp_path / "quantized.md").read_text() in capsys.readouterr().out
    assert quantized.main(["--checkpoint", str(tmp_path / "none"), "--output", str(tmp_path), "--scenes", "1"]) == 1
