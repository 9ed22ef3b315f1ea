"""Asks an engine questions, each once, and writes the answers of a run as they come."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from dpn_rt.evaluate.answers_file import AnswersFile
from dpn_rt.evaluate.engine_choice import EngineChoice
from dpn_rt.evaluate.question import Question, QuestionId
from dpn_rt.evaluate.question_format import QuestionFormat
from dpn_rt.evaluate.readers.rows import BadRow
from dpn_rt.evaluate.source import QuestionSource, Scan
from dpn_rt.llm import LLM
from dpn_rt.outputs import RequestOutput
from dpn_rt.prompts.processor import ProcessedPrompt


@dataclass
class Outcome:
    """What a run did."""

    answered: int = 0
    """Questions that this run answered."""
    cut: int = 0
    """Of them, those whose answer ended at `max_new_tokens`."""
    skipped: list[BadRow] = field(default_factory=list)


@dataclass(frozen=True)
class Answer:
    """What became of a question."""

    place: str
    question_id: QuestionId
    key: str
    line: dict[str, Any] | None
    """Of the answers file; None where the question could not be answered."""
    error: str = ""


class Run:
    """One answers file, and what it still lacks."""

    def __init__(self, question_format: QuestionFormat, file: AnswersFile, scan: Scan) -> None:
        self.format, self.file = question_format, file
        self.num_questions = len(scan.places)
        self.num_open = self.num_questions - len(file)
        """Questions that have not been asked yet."""
        self.outcome = Outcome(skipped=list(scan.bad_rows))

    def open_questions(self, source: QuestionSource) -> Iterator[Question]:
        """The questions that the file lacks."""
        for question in source.questions():
            if isinstance(question, Question) and question.key not in self.file:
                yield question

    def take(self, answer: Answer) -> None:
        """Writes an answer.

        Raises:
            EvaluationError: it cannot be written; those before it are kept.
        """
        self.num_open -= 1
        if answer.line is None:
            self.outcome.skipped.append(BadRow(answer.place, answer.question_id, answer.error))
        else:
            self.file.append(answer.key, answer.line)
            self.outcome.answered += 1
            self.outcome.cut += answer.line["metadata"]["finish_reason"] == "length"


Answers = Callable[[EngineChoice, QuestionSource, Sequence[Run]], Generator[tuple[Run, Answer], None, None]]
"""What gives the answers to the open questions of runs: `answers_here`, or `RayEngines.answers`."""


def answers_here(
    engine: EngineChoice, source: QuestionSource, runs: Sequence[Run]
) -> Generator[tuple[Run, Answer], None, None]:
    """The answers of an engine in this process, run by run.

    Raises:
        DpnError: the engine cannot be loaded, or refuses the settings of a run.
        DeviceError: the engine has stopped.
    """
    yield from answers_of(engine.load([run.format.settings for run in runs]), source, runs)


def answers_of(llm: LLM, source: QuestionSource, runs: Sequence[Run]) -> Generator[tuple[Run, Answer], None, None]:
    """The answers of a loaded engine.

    Raises:
        DpnError: it refuses the settings of a run.
        DeviceError: it has stopped.
    """
    for run in runs:
        run.format.check(llm.processor)
    for run in runs:
        asked = ((run.format, question) for question in run.open_questions(source))
        with closing(ask(llm, asked)) as answers:
            for _, answer in answers:
                yield run, answer


def ask(llm: LLM, asked: Iterable[tuple[QuestionFormat, Question]]) -> Generator[tuple[int, Answer], None, None]:
    """Answers questions in bounded memory.

    Yields:
        The number of a question and what became of it, as soon as it is known.

    Raises:
        DeviceError: the engine has stopped.
    """
    running: dict[int, tuple[QuestionFormat, Question]] = {}
    for_prompts, for_params = itertools.tee(asked)

    def prompt(number: int, question_format: QuestionFormat, question: Question) -> ProcessedPrompt:
        # An image in a table would stay in memory with its question.
        running[number] = question_format, replace(question, images=())
        return question_format.prompt(llm.processor, question)

    prompts = (partial(prompt, number, *each) for number, each in enumerate(for_prompts))
    params = (question_format.settings.sampling(question.key) for question_format, question in for_params)
    with closing(llm.as_completed(prompts, params)) as results:
        for number, result in results:
            question_format, question = running.pop(number)
            line = question_format.line(question, result) if isinstance(result, RequestOutput) else None
            error = "" if isinstance(result, RequestOutput) else str(result)
            yield number, Answer(question.place, question.question_id, question.key, line, error)
