"""The runs of `evaluate run`: what is asked is checked, then the engine is loaded, then each run goes through it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dpn_rt.errors import EvaluationError
from dpn_rt.evaluate.answers_file import AnswersFile
from dpn_rt.evaluate.asking import Answer, Answers, Outcome, Run, answers_here
from dpn_rt.evaluate.engine_choice import EngineChoice
from dpn_rt.evaluate.question_format import OTHER_SYSTEM, QuestionFormat
from dpn_rt.evaluate.readers.rows import BadRow
from dpn_rt.evaluate.settings import RunSettings, Sweep, runs_of
from dpn_rt.evaluate.source import QuestionSource, Scan
from dpn_rt.format.engine_dir import EngineDir
from dpn_rt.format.fingerprint import fingerprint
from dpn_rt.schema.files import is_there, real_path

BUILT_IN_MODES = ("vicuna_v1", "v1", *OTHER_SYSTEM)
"""LLaVA's names of conversation modes that the built-in template can write."""


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
    answers: Answers = answers_here,
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
        answers: of an engine in this process, or of several on Ray (`RayEngines.answers`).
        use_tqdm: show a progress bar on standard error.

    Raises:
        EvaluationError: a file cannot be used. Answers that were written are kept.
        DpnError: the engine cannot be loaded, or has stopped.
    """
    settings.sampling("0")  # wrong values are told before anything is opened
    _check_model(engine.path, settings)
    wanted = runs_of(replace(settings, engine=fingerprint(engine.path)), sweeps, answers_file)
    model_id = real_path(engine.path).name
    with _new_files([path for _, path in wanted]), ExitStack() as stack:
        scan = Scan.of(source)
        runs = [
            Run(
                QuestionFormat(run_settings, model_id),
                stack.enter_context(AnswersFile(path, run_settings.to_json(), scan.places)),
                scan,
            )
            for run_settings, path in wanted
        ]
        open_runs = [run for run in runs if run.num_open]
        for run in runs:
            if run not in open_runs:
                _finish(run)
        if open_runs:
            with closing(answers(engine, source, open_runs)) as found:
                _write(found, use_tqdm)
            _check_complete(open_runs)
    return [
        RunResult(run.file.path, run.format.settings, run.num_questions, len(run.file), run.outcome) for run in runs
    ]


@contextmanager
def _new_files(paths: Sequence[Path]) -> Iterator[None]:
    """Makes the answers files that are not there, since to read the questions may take a while. Those without an answer
    go again where the runs fail.

    Raises:
        EvaluationError: one could not be written.
    """
    made = [path for path in paths if not is_there(path)]
    try:
        for path in paths:
            AnswersFile.check_writable(path)
        yield
    except BaseException:
        for path in made:
            AnswersFile.remove_empty(path)
        raise


def _write(answers: Iterable[tuple[Run, Answer]], use_tqdm: bool) -> None:
    """Writes answers as they come, with a progress bar for each run."""
    with ExitStack() as stack:
        bars: dict[Run, Any] = {}
        for run, answer in answers:
            if run not in bars:
                bars[run] = stack.enter_context(_bar(run, use_tqdm))
            run.take(answer)
            bars[run].update()
            if not run.num_open:
                bars[run].close()
                _finish(run)


def _check_complete(runs: Sequence[Run]) -> None:
    """Refuses to call a run finished of whose questions nothing has been heard.

    Raises:
        EvaluationError: a question was not there any more when it was to be asked.
    """
    for run in runs:
        if run.num_open:
            raise EvaluationError(
                f"{run.file.path}: {run.num_open} questions were not asked: has the question file changed meanwhile? "
                "The same command goes on"
            )


def _finish(run: Run) -> None:
    run.file.arrange()
    _write_skipped(skipped_file(run.file.path), run.outcome.skipped)


def _bar(run: Run, use_tqdm: bool) -> Any:
    return tqdm(
        total=run.num_questions,
        initial=len(run.file),
        desc=run.file.path.name,
        unit="q",
        disable=not use_tqdm,
        dynamic_ncols=True,
    )


def _check_model(path: Path, settings: RunSettings) -> None:
    """Refuses what is no engine, or cannot answer questions.

    Raises:
        EngineError: it is no engine; EvaluationError: it cannot answer questions in this conversation mode.
    """
    model = EngineDir.open(path, verify=False).model
    if not model.prompt.has_tokenizer:
        raise EvaluationError(f"{path}: this engine has no tokenizer: expected one, to answer questions")
    mode = settings.conv_mode
    if mode is None:
        return
    if model.prompt.template == "tokenizer":
        raise EvaluationError(
            f"--conv-mode {mode}: {path} has a chat template of its own, which is used: expected no --conv-mode"
        )
    if mode not in BUILT_IN_MODES:
        raise EvaluationError(f"--conv-mode {mode}: expected {', '.join(BUILT_IN_MODES)}, or none")


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
