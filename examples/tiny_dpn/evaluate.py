"""Ask held-out questions through the runtime: accuracy, routes, FLOPs, agreement with eager; tables and pictures.

python -m examples.tiny_dpn.evaluate --model dense=DIR --model static=DIR --model dpn=DIR --output DIR
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

from tqdm import tqdm

from dpn_rt import LLM, SamplingParams
from dpn_rt.builders.native import build_engine
from dpn_rt.config import DType
from dpn_rt.eager import EagerDpn
from dpn_rt.errors import DpnError
from examples.tiny_dpn import plots
from examples.tiny_dpn.answers import MAX_TOKENS, Answer, Disagreement, ask_runtime, chat_messages, compare_with_eager
from examples.tiny_dpn.data import KINDS, QUESTIONS, Sample, sample
from examples.tiny_dpn.metrics import summarize
from examples.tiny_dpn.phase import TrainingError
from examples.tiny_dpn.report import markdown
from examples.tiny_dpn.train import check_writable

DTYPES: tuple[DType, ...] = ("float32", "bfloat16")
DRAWN_SCENES = 3
DRAWN_KINDS = ("background", "number")


@dataclass(frozen=True, slots=True)
class Settings:
    """What is asked, of which checkpoints."""

    models: Mapping[str, Path]
    output: Path
    scenes: int
    dtypes: Sequence[DType]
    eager: bool
    seed: int
    command: str


@dataclass(frozen=True, slots=True)
class Cost:
    """Decoder prefill of some questions: means over them, text rows included."""

    right: int
    """Number of right answers."""
    prefill_flops: float
    dense_prefill_flops: float
    flops_ratio: float
    """Mean over the questions of FLOPs over those of the same question without pooling."""


@dataclass(frozen=True, slots=True)
class Margins:
    """How close to a tie runtime and eager were where their answers part."""

    question: str
    expected: str
    position: int
    """Of the first token that differs."""
    eager_margin: float
    """Difference between the two largest logits at `position`."""
    runtime_margin: float | None
    """The same of the runtime when it is asked this question alone; None if that parts from eager earlier."""
    runtime_alone: str
    """Answer of the runtime when it is asked this question alone, not in a batch."""
    runtime_router_margins: tuple[float | None, ...]
    eager_router_margins: tuple[float | None, ...]
    """Difference between the two largest probabilities, per boundary; None where no router ran."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; gives its exit status."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = _parser()
    options = parser.parse_args(given)
    models = dict(options.model)
    if len(models) < len(options.model):
        parser.error("--model: every NAME must be another one")
    settings = Settings(
        models=models,
        output=options.output,
        scenes=options.scenes,
        dtypes=list(dict.fromkeys(options.dtype or DTYPES)),
        eager=options.eager,
        seed=options.seed,
        command=shlex.join(["python", "-m", "examples.tiny_dpn.evaluate", *given]),
    )
    try:
        check_writable(settings.output)
        evaluate(settings)
    except (DpnError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m examples.tiny_dpn.evaluate", description="Evaluate checkpoints.")
    parser.add_argument(
        "--model", action="append", required=True, type=_named, metavar="NAME=DIR", help="checkpoint (repeat)"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="for tables and pictures")
    parser.add_argument("--scenes", type=_count, default=200, metavar="N", help="ten questions each (default 200)")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="repeat; default both")
    parser.add_argument("--eager", action=argparse.BooleanOptionalAction, default=True, help="compare with eager")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes (default 0)")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of scenes, at least 1")
    return int(text)


def _named(text: str) -> tuple[str, Path]:
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=DIR, such as dpn=runs/tiny_dpn/dpn/checkpoint")
    return name, Path(path)


def evaluate(settings: Settings) -> dict[str, Any]:
    """Evaluate checkpoints and write evaluation.json, evaluation.md and the pictures into the output directory.

    Raises:
        DpnError: a checkpoint is incomplete or damaged; all are built before any question is asked.
    """
    started, output, first_dtype = time.perf_counter(), settings.output, settings.dtypes[0]
    with tempfile.TemporaryDirectory() as directory:
        engines = {
            (name, dtype): build_engine(path, Path(directory) / f"{name}-{dtype}", dtype=dtype).path
            for name, path in settings.models.items()
            for dtype in settings.dtypes
        }
        samples = [sample("test", index, settings.seed) for index in range(settings.scenes)]
        runs = [_run(name, dtype, path, samples, settings.eager) for (name, dtype), path in engines.items()]
        drawn = LLM(engines[list(settings.models)[-1], first_dtype])
        plots.pyramids(drawn, samples[:DRAWN_SCENES], DRAWN_KINDS, output / "pyramids.png")
    evaluation = {
        "command": settings.command,
        "seed": settings.seed,
        "scenes": settings.scenes,
        "questions": sum(len(item.questions) for item in samples),
        "versions": {name: version(name) for name in ("dpn_rt", "torch", "transformers")},
        "python": platform.python_version(),
        "seconds": time.perf_counter() - started,
        "runs": runs,
    }
    (output / "evaluation.json").write_text(json.dumps(evaluation, indent=1) + "\n", encoding="utf-8")
    (output / "evaluation.md").write_text(markdown(evaluation), encoding="utf-8")
    first = [run for run in runs if run["dtype"] == first_dtype]
    plots.accuracy_against_flops(first, output / "accuracy_flops.png")
    plots.routes_per_kind(first[-1], output / "routes.png")
    print(markdown(evaluation))
    return evaluation


def _run(name: str, dtype: str, engine: Path, samples: Sequence[Sample], eager: bool) -> dict[str, Any]:
    llm = LLM(engine)
    started = time.perf_counter()
    answers = ask_runtime(llm, samples, f"{name}, {dtype}")
    seconds = time.perf_counter() - started
    differ = compare_with_eager(llm, engine, samples, answers, f"{name}, {dtype}, eager") if eager else []
    return {
        "model": name,
        "dtype": dtype,
        "seconds": seconds,
        "summary": dataclasses.asdict(summarize(answers)),
        "cost": dataclasses.asdict(cost(answers)),
        "cost_of_kinds": {
            kind: dataclasses.asdict(cost([answer for answer in answers if answer.kind == kind])) for kind in KINDS
        },
        "fine_to_coarse_of_means": fine_to_coarse_of_means(answers),
        "agreement": 1 - len(differ) / len(answers) if eager else None,
        "disagreements": _with_margins(llm, engine, samples, answers, differ),
    }


def cost(answers: Sequence[Answer]) -> Cost:
    """Means over answers, at least one."""
    return Cost(
        right=sum(answer.is_right for answer in answers),
        prefill_flops=mean(answer.flops for answer in answers),
        dense_prefill_flops=mean(answer.dense_flops for answer in answers),
        flops_ratio=mean(answer.flops / answer.dense_flops for answer in answers),
    )


def fine_to_coarse_of_means(answers: Sequence[Answer]) -> float:
    """Mean visual tokens of the last stage over all fine questions, over that over all coarse ones."""
    fine, coarse = (mean(a.visual_tokens[-1] for a in answers if a.level == level) for level in ("fine", "coarse"))
    return fine / coarse


def _with_margins(
    llm: LLM, engine: Path, samples: Sequence[Sample], answers: Sequence[Answer], differ: Sequence[Disagreement]
) -> list[dict[str, Any]]:
    if not differ:
        return []
    eager = EagerDpn.from_engine(engine, verify=False)
    by_question = {(answer.scene, answer.kind): answer for answer in answers}
    return [
        dataclasses.asdict(item)
        | dataclasses.asdict(margins(llm, eager, samples[item.scene], by_question[item.scene, item.kind]))
        for item in tqdm(differ, desc="margins of disagreements")
    ]


def margins(llm: LLM, eager: EagerDpn, asked: Sample, answer: Answer) -> Margins:
    """Asks both once more, the runtime with log-probabilities: their differences are those of the logits."""
    conversation = chat_messages(asked.image, QUESTIONS[answer.kind])
    output = llm.chat(conversation, SamplingParams(temperature=0, max_tokens=MAX_TOKENS, logprobs=2))[0]
    prompt = llm.processor.process(llm.processor.chat(conversation))
    assert prompt.visual is not None
    own = eager.generate(prompt.token_ids.tolist(), prompt.visual.pixels, max_new_tokens=MAX_TOKENS)
    alone = output.outputs[0]
    position = first_difference(own.token_ids, answer.token_ids)
    assert alone.logprobs is not None
    is_same_before = list(alone.token_ids[:position]) == own.token_ids[:position]
    return Margins(
        question=QUESTIONS[answer.kind],
        expected=answer.expected,
        position=position,
        eager_margin=_margin(own.logits[position].float().tolist()),
        runtime_margin=_margin([*alone.logprobs[position].values()]) if is_same_before else None,
        runtime_alone=alone.text,
        runtime_router_margins=tuple(None if p is None else _margin(p) for p in output.pyramid.probs),
        eager_router_margins=tuple(None if p is None else _margin(p) for p in own.trace.probs),
    )


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Index of the first token that differs between two answers that are not the same.

    Neither can be the beginning of the other: an answer ends with its end token or at its greatest length.
    """
    return next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)


def _margin(values: Sequence[float]) -> float:
    """Between the two largest of at least two."""
    largest = sorted((float(value) for value in values), reverse=True)
    return largest[0] - largest[1]


if __name__ == "__main__":
    sys.exit(main())
