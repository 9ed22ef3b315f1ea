"""Runs and scores from Python, in a line each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpn_rt.evaluate.engine_choice import EngineChoice
from dpn_rt.evaluate.question import PromptStyle
from dpn_rt.evaluate.runs import RunResult, run_all
from dpn_rt.evaluate.scorers.benchmark import Score
from dpn_rt.evaluate.scorers.table import benchmark
from dpn_rt.evaluate.scorers.truth import Inputs, read_answers
from dpn_rt.evaluate.settings import RunSettings, Sweep
from dpn_rt.evaluate.source import QuestionSource


def run(
    engine: str | Path,
    question_file: str | Path,
    image_folder: str | Path,
    answers_file: str | Path,
    *,
    sweep: str | Sequence[str] = (),
    single_pred_prompt: bool = False,
    all_rounds: bool = False,
    post_prompt: str = "",
    device: str = "auto",
    max_num_seqs: int = 64,
    use_tqdm: bool = True,
    **settings: Any,
) -> list[RunResult]:
    """Answers the questions of a file, and goes on where an earlier call has stopped.

    Args:
        engine: directory.
        question_file: `.jsonl`, `.json`, `.csv`, `.tsv` or `.parquet`.
        image_folder: of the images that its rows name.
        answers_file: LLaVA's JSON lines.
        sweep: as `--sweep`, such as "router_bias=-4,0,4".
        single_pred_prompt: ask for the letter of an option.
        all_rounds: ask once for each rotation of the options.
        post_prompt: added to each question on a line of its own.
        device: "cpu", "cuda" or "auto".
        max_num_seqs: questions that run at one time.
        use_tqdm: show a progress bar.
        settings: fields of `RunSettings`: temperature, top_p, max_new_tokens, seed, conv_mode, reduce, router_bias and
            route.

    Returns:
        One result for each answers file; `.outcome.skipped` has the rows that could not be answered.

    Raises:
        DpnError: a file cannot be used, or the engine cannot be loaded.
    """
    texts = [sweep] if isinstance(sweep, str) else sweep
    return run_all(
        EngineChoice(Path(engine), device, max_num_seqs),
        QuestionSource(
            Path(question_file), Path(image_folder), PromptStyle(single_pred_prompt, all_rounds, "en", post_prompt)
        ),
        RunSettings(engine="", **settings),
        Path(answers_file),
        [Sweep.parse(text) for text in texts],
        use_tqdm=use_tqdm,
    )


def score(
    name: str,
    answers_file: str | Path,
    annotations: str | Path,
    *,
    question_file: str | Path | None = None,
    split: str = "test",
) -> Score:
    """The score of an answers file; `.metrics` has the numbers, `.graded` each question.

    Args:
        name: of the benchmark, see docs/evaluate.md.
        answers_file: of `run` or of LLaVA.
        annotations: the right answers; for "exact" the question file itself.
        question_file: for benchmarks whose annotations lack the questions' ids.
        split: of ScienceQA.

    Raises:
        EvaluationError: a file cannot be used.
    """
    chosen = benchmark(name)
    inputs = Inputs(Path(annotations), None if question_file is None else Path(question_file), split)
    return chosen.score(chosen.read(inputs), read_answers(Path(answers_file)))
