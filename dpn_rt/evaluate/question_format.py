"""How a question becomes a prompt, and an output a line of an answers file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from dpn_rt.evaluate.question import Question
from dpn_rt.evaluate.settings import RunSettings
from dpn_rt.evaluate.trace import trace_of
from dpn_rt.outputs import RequestOutput
from dpn_rt.prompts.processor import ProcessedPrompt, Processor

OTHER_SYSTEM = {
    "llava_v1": "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
}
"""System message of a conversation mode that differs from the built-in template in it alone."""


@dataclass(frozen=True)
class QuestionFormat:
    """Of one run."""

    settings: RunSettings
    model_id: str

    def check(self, processor: Processor) -> None:
        """Refuses settings that the engine cannot take, before every question would be refused for them.

        Raises:
            DpnError: with the setting.
        """
        self._processed(processor, [{"role": "user", "content": "?"}])

    def prompt(self, processor: Processor, question: Question) -> ProcessedPrompt:
        """The prompt of a question; its images are opened here.

        Raises:
            RequestError: the question cannot be asked.
        """
        messages: list[dict[str, Any]] = []
        system = OTHER_SYSTEM.get(self.settings.conv_mode or "")
        if system is not None:
            messages.append({"role": "system", "content": system})
        content: list[dict[str, Any]] = [{"type": "image", "image": image.open()} for image in question.images]
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": question.text}]})
        return self._processed(processor, messages)

    def line(self, question: Question, output: RequestOutput) -> dict[str, Any]:
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

    def _processed(self, processor: Processor, messages: list[dict[str, Any]]) -> ProcessedPrompt:
        settings = self.settings
        choice = {"route": settings.route, "router_bias": settings.router_bias, "reduce": settings.reduce}
        return processor.process({**processor.chat(messages), **choice})
