"""Asks an engine all questions of a source, each once, and writes the answers as they come."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from dpn_rt.errors import DeviceError
from dpn_rt.evaluate.answers_file import AnswersFile
from dpn_rt.evaluate.question import Question
from dpn_rt.evaluate.readers.rows import BadRow
from dpn_rt.evaluate.settings import RunSettings
from dpn_rt.evaluate.source import QuestionSource
from dpn_rt.evaluate.trace import trace_of
from dpn_rt.llm import LLM
from dpn_rt.outputs import RequestOutput
from dpn_rt.prompts.processor import ProcessedPrompt

OTHER_SYSTEM = {
    "llava_v1": "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
}
"""System message of a conversation mode that differs from the built-in template in it alone."""


@dataclass
class Outcome:
    """What a run did."""

    answered: int = 0
    """Questions that this run answered."""
    cut: int = 0
    """Of them, those whose answer ended at `max_new_tokens`."""
    skipped: list[BadRow] = field(default_factory=list)


@dataclass(frozen=True)
class Run:
    """One run over the questions that its answers file lacks."""

    llm: LLM
    source: QuestionSource
    settings: RunSettings
    file: AnswersFile
    model_id: str

    def check(self) -> None:
        """Refuses settings that the engine cannot take, before every question would be refused for them.

        Raises:
            DpnError: with the setting.
        """
        self._processed([{"role": "user", "content": "?"}])

    def answer(self, progress: Callable[[], object]) -> Outcome:
        """Answers the questions, and arranges the file.

        Args:
            progress: is called after each question, answered or skipped.

        Raises:
            EvaluationError: an answer cannot be written; those before it are kept.
            DeviceError: the engine has stopped.
        """
        outcome = Outcome()
        running: dict[int, Question] = {}
        asked, for_params = itertools.tee(self._open_questions(outcome))
        prompts = (partial(self._prompt, running, number, question) for number, question in enumerate(asked))
        params = (self.settings.sampling(question.key) for question in for_params)
        with closing(self.llm.as_completed(prompts, params)) as results:
            for number, result in results:
                question = running.pop(number)
                if isinstance(result, RequestOutput):
                    self.file.append(question.key, self._line(question, result))
                    outcome.answered += 1
                    outcome.cut += result.outputs[0].finish_reason == "length"
                elif isinstance(result, DeviceError):
                    raise result
                else:
                    outcome.skipped.append(BadRow(question.place, question.question_id, str(result)))
                progress()
        self.file.arrange()
        return outcome

    def _open_questions(self, outcome: Outcome) -> Iterator[Question]:
        for question in self.source.questions():
            if isinstance(question, BadRow):
                outcome.skipped.append(question)
            elif question.key not in self.file:
                yield question

    def _prompt(self, running: dict[int, Question], number: int, question: Question) -> ProcessedPrompt:
        """The prompt of a question; its images are opened here."""
        running[number] = replace(question, images=())  # an image in a table would stay in memory with it
        messages: list[dict[str, Any]] = []
        system = OTHER_SYSTEM.get(self.settings.conv_mode or "")
        if system is not None:
            messages.append({"role": "system", "content": system})
        content: list[dict[str, Any]] = [{"type": "image", "image": image.open()} for image in question.images]
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": question.text}]})
        return self._processed(messages)

    def _processed(self, messages: list[dict[str, Any]]) -> ProcessedPrompt:
        processor, settings = self.llm.processor, self.settings
        prompt = processor.chat(messages)
        return processor.process(
            {**prompt, "route": settings.route, "router_bias": settings.router_bias, "reduce": settings.reduce}
        )

    def _line(self, question: Question, output: RequestOutput) -> dict[str, Any]:
        """One line of LLaVA's answers file."""
        line: dict[str, Any] = {"question_id": question.question_id}
        if question.round_id is not None:
            line["round_id"] = question.round_id
        line |= {"prompt": question.prompt, "text": output.outputs[0].text.strip()}
        if question.options:
            line |= {"options": list(question.options), "option_char": list(question.letters)}
        settings = self.settings.to_json()
        category = {"category": question.category} if question.category else {}
        line["answer_id"] = hashlib.blake2b(f"{question.key}{settings}".encode(), digest_size=11).hexdigest()
        line["model_id"] = self.model_id
        line["metadata"] = {**category, "settings": settings, **trace_of(output)}
        return line
