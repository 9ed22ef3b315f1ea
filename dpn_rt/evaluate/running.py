"""The runs of `evaluate run`: what is asked is checked, then the engine is loaded, then each run goes through it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from dpn_rt.errors import EvaluationError
from dpn_rt.evaluate.answers_file import AnswersFile
from dpn_rt.evaluate.readers.rows import BadRow
from dpn_rt.evaluate.runner import OTHER_SYSTEM, Outcome, Run
from dpn_rt.evaluate.settings import RunSettings, Sweep, runs_of
from dpn_rt.evaluate.source import QuestionSource, Scan
from dpn_rt.format.config import ModelConfig
from dpn_rt.format.engine_dir import EngineDir
from dpn_rt.format.fingerprint import fingerprint
from dpn_rt.llm import LLM
from dpn_rt.model.reduction.pooling_config import PoolingConfig

BUILT_IN_MODES = ("vicuna_v1", "v1", *OTHER_SYSTEM)
"""LLaVA's names of conversation modes that the built-in template can write."""


@dataclass(frozen=True)
class EngineChoice:
    """The engine that answers, and how it is loaded; none of this changes an answer, but for rounding."""

    path: Path
    device: str = "auto"
    max_num_seqs: int = 64
    reuse_bytes: int = 0
    verify: bool = True
    tensor_parallel_size: int = 1

    def load(self, runs: Sequence[RunSettings], model: ModelConfig) -> LLM:
        """The engine, with boundaries for all reductions that runs ask for."""
        specs = list(dict.fromkeys(run.reduce for run in runs if run.reduce is not None))
        # A trained model skips its boundaries on request; it is loaded with them, for the runs that do not ask.
        reduce = specs if specs and not isinstance(model.reduction, PoolingConfig) else None
        return LLM(
            self.path,
            self.device,
            max_num_seqs=self.max_num_seqs,
            reuse_bytes=self.reuse_bytes,
            tensor_parallel_size=self.tensor_parallel_size,
            verify=self.verify,
            reduce=reduce,
        )


@dataclass(frozen=True)
class RunResult:
    """What one run came to."""

    answers_file: Path
    settings: RunSettings
    num_questions: int
    num_answers: int
    """That the file holds now."""
    outcome: Outcome

    @property
    def skipped_file(self) -> Path:
        """Where the skipped rows are listed."""
        return skipped_file(self.answers_file)


def skipped_file(answers_file: Path) -> Path:
    """The file that lists the rows that a run skipped, beside its answers."""
    return answers_file.with_name(f"{answers_file.name}.skipped.jsonl")


def run_all(
    engine: EngineChoice,
    source: QuestionSource,
    settings: RunSettings,
    answers_file: Path,
    sweeps: Sequence[Sweep] = (),
    *,
    use_tqdm: bool = True,
) -> list[RunResult]:
    """Answers all questions once for each value of the sweeps, and goes on with what an earlier call has left.

    The answers file is opened, and question file and engine are checked, before the engine is loaded, which is left out
    where nothing is open.

    Args:
        engine: to load.
        source: of the questions.
        settings: of all runs; the engine's fingerprint is filled in.
        answers_file: of the run; with sweeps, their names and values are put before its ending.
        sweeps: each replaces one setting.
        use_tqdm: show a progress bar on standard error.

    Raises:
        EvaluationError: a file cannot be used. Answers that were written are kept.
        DpnError: the engine cannot be loaded, or has stopped.
    """
    settings.sampling("0")  # wrong values are told before anything is opened
    model = _checked_model(engine.path, settings)
    runs = runs_of(replace(settings, engine=fingerprint(engine.path)), sweeps, answers_file)
    for _, path in runs:
        AnswersFile.check_writable(path)  # to read the questions may take a while
    scan = Scan.of(source)
    with ExitStack() as stack:
        files = [
            stack.enter_context(AnswersFile(path, run_settings.to_json(), scan.places)) for run_settings, path in runs
        ]
        open_runs: dict[Path, Run] = {}
        if any(len(file) < len(scan.places) for file in files):
            llm = engine.load([run_settings for run_settings, _ in runs], model)
            for (run_settings, path), file in zip(runs, files, strict=True):
                open_runs[path] = Run(llm, source, run_settings, file, engine.path.resolve().name)
                open_runs[path].check()
        results = []
        for (run_settings, path), file in zip(runs, files, strict=True):
            if len(file) < len(scan.places):
                outcome = _answer(open_runs[path], len(scan.places), use_tqdm)
            else:
                outcome = Outcome(skipped=scan.bad_rows)
                file.arrange()
            _write_skipped(skipped_file(path), outcome.skipped)
            results.append(RunResult(path, run_settings, len(scan.places), len(file), outcome))
    return results


def _answer(run: Run, num_questions: int, use_tqdm: bool) -> Outcome:
    with tqdm(
        total=num_questions,
        initial=len(run.file),
        desc=run.file.path.name,
        unit="q",
        disable=not use_tqdm,
        dynamic_ncols=True,
    ) as bar:
        return run.answer(bar.update)


def _checked_model(path: Path, settings: RunSettings) -> ModelConfig:
    """The engine's configuration.

    Raises:
        EngineError: it is no engine; EvaluationError: it cannot answer questions in this conversation mode.
    """
    model = EngineDir.open(path, verify=False).model
    if not model.prompt.has_tokenizer:
        raise EvaluationError(f"{path}: this engine has no tokenizer: expected one, to answer questions")
    mode = settings.conv_mode
    if mode is None:
        return model
    if model.prompt.template == "tokenizer":
        raise EvaluationError(
            f"--conv-mode {mode}: {path} has a chat template of its own, which is used: expected no --conv-mode"
        )
    if mode not in BUILT_IN_MODES:
        raise EvaluationError(f"--conv-mode {mode}: expected {', '.join(BUILT_IN_MODES)}, or none")
    return model


def _write_skipped(path: Path, rows: Sequence[BadRow]) -> None:
    """Lists the skipped rows; removes the list of an earlier run where there are none."""
    if not rows:
        with suppress(FileNotFoundError):
            path.unlink()
        return
    lines = [{"place": row.place, "question_id": row.question_id, "reason": row.reason} for row in rows]
    try:
        path.write_text("".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines), encoding="utf-8")
    except OSError as error:
        print(f"warning: {path}: cannot be written: {error.strerror}", file=sys.stderr)
