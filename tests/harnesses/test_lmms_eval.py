"""lmms-eval itself, from its command line, on ten pictures: its answers and its score are those of `LLM.chat`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dpn_rt import LLM, SamplingParams
from dpn_rt.builders.native import build_engine
from dpn_rt.reference import EagerDpn
from examples.tiny_dpn import train
from examples.tiny_dpn.data import Question, sample
from examples.tiny_dpn.model import model_config
from examples.tiny_dpn.tokenizer import train_tokenizer
from tests.skips import need_harness

need_harness("lmms_eval")

CHECKPOINT = Path(__file__).parents[2] / "examples/tiny_dpn/checkpoint"
KINDS = ("background", "photo", "circle", "count", "color", "where", "side", "number", "word", "handwritten")
YAML = """
dataset_path: parquet
dataset_kwargs:
  data_files: {{test: {data}}}
task: drawn_scenes
test_split: test
output_type: {output_type}
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 8, temperature: 0, do_sample: false, until: ["zzz"]}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
metadata:
  - version: 0.0
"""
UTILS = """
def visual(doc):
    return [doc["image"].convert("RGB")]

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]
"""


@dataclass(frozen=True)
class Scenes:
    """A task of ten pictures with a question each."""

    folder: Path

    def write(self, output_type: str) -> None:
        import datasets

        rows = [
            {"image": sample("test", scene).image, "question": question.text, "answer": question.answer}
            for scene, question in enumerate(self.questions)
        ]
        data = self.folder / "scenes.parquet"
        datasets.Dataset.from_list(rows).to_parquet(str(data))
        (self.folder / "task.yaml").write_text(YAML.format(data=data, output_type=output_type))
        (self.folder / "utils.py").write_text(UTILS)

    @property
    def questions(self) -> list[Question]:
        return [next(q for q in sample("test", i).questions if q.kind == kind) for i, kind in enumerate(KINDS)]

    def evaluate(self, *options: str) -> str:
        """Runs lmms-eval; standard output and error."""
        command = [sys.executable, "-m", "lmms_eval", "--model", "dpn_rt", "--tasks", "drawn_scenes"]
        command += ["--include_path", str(self.folder), "--output_path", str(self.folder / "out"), "--log_samples"]
        settings = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(self.folder / "hf"), "OMP_NUM_THREADS": "1"}
        run: dict[str, Any] = {"cwd": self.folder, "env": os.environ | settings, "timeout": 600, "text": True}
        done = subprocess.run([*command, *options], **run, capture_output=True, check=False)
        return done.stdout + done.stderr

    def lines(self, pattern: str, log: str) -> list[dict[str, Any]]:
        """JSON lines of the only file in the output that matches a pattern."""
        paths = list((self.folder / "out").rglob(pattern))
        assert len(paths) == 1, log
        text = paths[0].read_text()
        return [json.loads(line) for line in (text.splitlines() if paths[0].suffix == ".jsonl" else [text])]


@pytest.fixture
def scenes(tmp_path: Path) -> Scenes:
    return Scenes(tmp_path)


def dense_engine(folder: Path) -> Path:
    """An untrained model without a trained reduction."""
    model = EagerDpn(model_config("dense", train_tokenizer().get_vocab_size())).eval()
    train.save_checkpoint(model, folder / "checkpoint")
    return build_engine(folder / "checkpoint", folder / "dense", dtype="float32").path


@pytest.mark.parametrize("reduce", [None, "fastv:k=1,ratio=0.5"])
def test_answers_and_score(scenes: Scenes, tmp_path: Path, reduce: str | None) -> None:
    engine = dense_engine(tmp_path) if reduce else build_engine(CHECKPOINT, tmp_path / "engine", dtype="float32").path
    scenes.write("generate_until")
    model_args = f"engine={engine},batch_size=4" + (f',reduce="{reduce}"' if reduce else "")
    log = scenes.evaluate("--model_args", model_args)
    samples = sorted(scenes.lines("*samples_drawn_scenes.jsonl", log), key=lambda line: line["doc_id"])
    llm = LLM(engine, reduce=reduce)
    conversations = [
        [{"role": "user", "content": [{"type": "image", "image": sample("test", scene).image},
                                      {"type": "text", "text": question.text}]}]
        for scene, question in enumerate(scenes.questions)
    ]  # fmt: skip
    outputs = llm.chat(conversations, SamplingParams(temperature=0, max_tokens=8))
    answers = [output.outputs[0].text.strip() for output in outputs]  # as lmms-eval scores them
    assert [line["filtered_resps"] for line in samples] == answers, log
    [results] = scenes.lines("*results.json", log)
    right = sum(answer == question.answer for answer, question in zip(answers, scenes.questions, strict=True))
    assert results["results"]["drawn_scenes"]["exact_match,none"] == pytest.approx(right / len(KINDS))
    assert reduce or right >= 7, "the trained model knows most answers"


@pytest.mark.parametrize("kind", ["generate_until_multi_round"])
def test_other_tasks_are_refused_by_name(scenes: Scenes, tmp_path: Path, kind: str) -> None:
    engine = build_engine(CHECKPOINT, tmp_path / "engine", dtype="float32").path
    scenes.write(kind)
    log = scenes.evaluate("--model_args", f"engine={engine}")
    assert f"EvaluationError: {kind} is not supported: expected generate_until tasks" in log
