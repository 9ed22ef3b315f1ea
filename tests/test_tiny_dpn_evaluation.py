"""Evaluation of the small DPN: what its numbers mean, and the command end to end."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from dpn_rt.eager import EagerDpn
from examples.tiny_dpn import evaluate, train
from examples.tiny_dpn.answers import Answer
from examples.tiny_dpn.data import KINDS
from examples.tiny_dpn.metrics import fine_to_coarse, group, summarize
from examples.tiny_dpn.model import model_config
from examples.tiny_dpn.report import table
from examples.tiny_dpn.tokenizer import train_tokenizer

ANSWER = Answer(0, "background", "coarse", "red", " red", (5, 2), ("2x2",), (256, 64), 40, 100)


def test_an_answer_is_right_when_it_is_the_same_but_for_spaces() -> None:
    assert ANSWER.is_right
    assert not dataclasses.replace(ANSWER, text="red.").is_right
    assert not dataclasses.replace(ANSWER, text="Red").is_right


def test_group_by_hand() -> None:
    wrong = dataclasses.replace(ANSWER, text="blue", visual_tokens=(256, 128), flops=110, dense_flops=200)
    result = group([ANSWER, ANSWER, ANSWER, wrong])
    assert result.questions == 4 and result.accuracy == 0.75
    assert result.visual_tokens == (256, 80)
    assert result.flops_ratio == pytest.approx((3 * 40 + 110) / (3 * 100 + 200))


def test_fine_to_coarse_compares_within_a_picture() -> None:
    def answer(scene: int, level: str, tokens: int) -> Answer:
        return dataclasses.replace(ANSWER, scene=scene, level=level, visual_tokens=(256, tokens))

    # Picture 0: (30 + 50) / 2 over 10; picture 1: 60 over (20 + 40) / 2; the middle question does not count.
    answers = [answer(0, "coarse", 10), answer(0, "fine", 30), answer(0, "fine", 50), answer(0, "middle", 999)]
    answers += [answer(1, "coarse", 20), answer(1, "coarse", 40), answer(1, "fine", 60)]
    assert fine_to_coarse(answers) == pytest.approx((4 + 2) / 2)


def test_summary_counts_routes_of_each_kind() -> None:
    answers = [dataclasses.replace(ANSWER, kind=kind, level=level) for kind, level in KINDS.items()]
    answers.append(dataclasses.replace(ANSWER, route=("1x1",)))
    summary = summarize(answers)
    assert summary.routes["background"] == {"2x2": 1, "1x1": 1} and summary.routes["word"] == {"2x2": 1}
    assert summary.levels["coarse"].questions == 4 and summary.overall.questions == 11


def test_table_is_markdown() -> None:
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_command_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = EagerDpn(model_config("dpn", train_tokenizer().get_vocab_size())).eval()
    train.save_checkpoint(model, tmp_path / "checkpoint")
    output = tmp_path / "output"
    arguments = ["--model", f"dpn={tmp_path / 'checkpoint'}", "--output", str(output), "--scenes", "1"]
    assert evaluate.main([*arguments, "--dtype", "float32"]) == 0
    evaluation = json.loads((output / "evaluation.json").read_text())
    (run,) = evaluation["runs"]
    assert evaluation["questions"] == 10 and run["agreement"] == 1.0 and not run["disagreements"]
    assert set(run["summary"]["kinds"]) == set(KINDS)
    assert (output / "evaluation.md").read_text() in capsys.readouterr().out
    for name in ("accuracy_flops.png", "routes.png", "pyramids.png"):
        assert (output / name).stat().st_size > 1000


def test_damaged_checkpoint_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    arguments = ["--model", f"dpn={tmp_path / 'broken'}", "--output", str(tmp_path / "output"), "--scenes", "1"]
    assert evaluate.main(arguments) == 1
    assert "broken" in capsys.readouterr().err


def test_unwritable_output_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    assert evaluate.main(["--model", "dpn=x", "--output", str(tmp_path / "file" / "x")]) == 1
    assert "cannot write" in capsys.readouterr().err
