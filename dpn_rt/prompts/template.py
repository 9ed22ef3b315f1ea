"""Turns of a conversation -> the text of a prompt, by the built-in Vicuna form or by a checkpoint's Jinja template."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from dpn_rt.errors import EngineError, RequestError
from dpn_rt.prompts.markers import IMAGE_TEXT, unused_characters
from dpn_rt.prompts.messages import Marker, Turn
from dpn_rt.prompts.template_form import (
    LEFT_OUT,
    ContentForm,
    Marks,
    content_forms,
    images_first,
    problem_of_marks,
    problem_of_words,
    written,
)
from dpn_rt.prompts.template_process import TemplateLimitError, TemplateProcess
from dpn_rt.prompts.tokenizer import Tokenizer
from dpn_rt.schema.files import TEXT_BYTES, read_text
from dpn_rt.schema.text import check_unicode

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_END = "</s>"
_CONTINUED = "DpnContinuesHere "
_ROUTER = "<DpnRouter>"
"""A router token in conversations that are tried."""


@dataclass(frozen=True)
class ChatOptions:
    """How a prompt ends, and further variables of a template; names and meanings as in vLLM."""

    add_generation_prompt: bool = True
    """End where the assistant's answer begins."""
    continue_final_message: bool = False
    """End within the last message, which the answer continues."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


class ChatTemplate(Protocol):
    """A way to write conversations."""

    def render(self, turns: Sequence[Turn], router: str, options: ChatOptions) -> str:
        """The prompt, with `IMAGE_TEXT` or the template's own image token where images go.

        Args:
            turns: the last one is continued where the options say so.
            router: text of the router token.
            options: see `ChatOptions`.

        Raises:
            RequestError: the template does not take these turns.
        """


class VicunaTemplate:
    """The form that LLaVA's Vicuna models were trained on."""

    def render(self, turns: Sequence[Turn], router: str, options: ChatOptions) -> str:
        """See `ChatTemplate`."""
        system, turns = (turns[0], turns[1:]) if turns[0].role == "system" else (None, turns)
        if _has_system(turns):
            raise _misplaced_system()
        marks = _marks(router)
        text = VICUNA_SYSTEM if system is None else written(system, marks)
        for turn in turns:
            if turn.role == "user":
                text += f"{'' if text.endswith(_END) else ' '}USER: {images_first(turn, marks)}"
            else:
                text += f" ASSISTANT: {written(turn, marks)}{_END}"
        if options.continue_final_message:
            return text.removesuffix(_END)
        return text + " ASSISTANT:" if options.add_generation_prompt else text


class JinjaTemplate:
    """A checkpoint's own template. How it takes contents is found by rendering (`template_form`)."""

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], image_token: str | None, takes_images: bool = True
    ) -> None:
        """
        Args:
            source: of the template.
            special_tokens: variables that a template may use, such as `bos_token`.
            image_token: what stands for an image in the text, besides `<image>`; None: nothing does.
            takes_images: whether conversations may have images.

        Raises:
            RequestError: the template cannot be rendered, or what it makes of a conversation is of no use;
                EngineError: no template can be rendered.
        """
        self._source, self._process, self._special_tokens = source, TemplateProcess(source), dict(special_tokens)
        self._form = self._find_form(image_token, takes_images)

    def render(self, turns: Sequence[Turn], router: str, options: ChatOptions) -> str:
        """See `ChatTemplate`."""
        if _has_system(turns[1:]) and not self._takes_later_system:
            raise _misplaced_system()
        return self._render_as(self._form, turns, router, options)

    @cached_property
    def _takes_later_system(self) -> bool:
        """Whether system messages appear in the prompt that follow others."""
        says = [("user", "DpnQuestionA"), ("assistant", "DpnAnswer"), ("system", "DpnSystem"), ("user", "DpnQuestionB")]
        return self._writes(self._form, [Turn(role, (text,)) for role, text in says])

    def _render_as(self, form: ContentForm, turns: Sequence[Turn], router: str, options: ChatOptions) -> str:
        marks = _marks(router)
        stand_ins: Marks = {}
        if form.has_stand_ins:
            stand_ins = dict(zip(Marker, unused_characters([self._source, *_texts(turns)]), strict=False))
        text = self._render([form.message(turn, {**marks, **stand_ins}) for turn in turns], options)
        for marker, character in stand_ins.items():
            text = text.replace(character, marks[marker])
        return text

    def _render(self, messages: list[dict[str, Any]], options: ChatOptions) -> str:
        """Of a message that is continued, a mark at its end is rendered too: the prompt is what stands before it."""
        is_continued = options.continue_final_message
        variables = {
            **self._special_tokens,
            "tools": None,
            "documents": None,
            **options.template_kwargs,
            "messages": [*messages[:-1], _marked(messages[-1])] if is_continued else messages,
            "add_generation_prompt": options.add_generation_prompt,
        }
        text = self._process.render(variables)
        check_unicode(text, "chat_template_kwargs: the prompt that the chat template makes of them")
        return _before_mark(text) if is_continued else text

    def _find_form(self, image_token: str | None, takes_images: bool) -> ContentForm:
        """The first form in which a conversation appears in the prompt, text for text.

        Raises:
            RequestError: there is none. It says what is wrong with the form that came nearest.
        """
        problems: list[tuple[int, str]] = []  # how near the form came
        for form in content_forms():
            try:
                problem = self._problem(form, image_token, takes_images)
            except TemplateLimitError:
                raise
            except RequestError as error:
                problems.append((1, str(error)))
                continue
            if problem is None:
                with_system = replace(form, roles_with_parts=form.roles_with_parts | {"system"})
                turns = [Turn("system", ("DpnSystem",)), Turn("user", ("DpnQuestion",))]
                return with_system if self._writes(with_system, turns) else form
            problems.append((0 if problem == LEFT_OUT else 2, f"the chat template {problem}"))
        raise RequestError(max(problems, key=lambda problem: problem[0])[1])

    def _problem(self, form: ContentForm, image_token: str | None, takes_images: bool) -> str | None:
        """What is wrong with a conversation in some form; None where nothing is."""
        image = (Marker.IMAGE,) if takes_images else ()
        first = Turn("user", (*image, "DpnQuestionA", "DpnQuestionB", Marker.ROUTER))
        turns = [first, Turn("assistant", ("DpnAnswer",)), Turn("user", ("DpnQuestionC",))]
        text = self._render_as(form, turns, _ROUTER, ChatOptions())
        return problem_of_words(_texts(turns), text) or problem_of_marks(text, image_token, _ROUTER, len(image))

    def _writes(self, form: ContentForm, turns: Sequence[Turn]) -> bool:
        """Whether the template takes a conversation in some form, and writes all of it."""
        try:
            return problem_of_words(_texts(turns), self._render_as(form, turns, "", ChatOptions())) is None
        except RequestError:
            return False


def _has_system(turns: Sequence[Turn]) -> bool:
    return any(turn.role == "system" for turn in turns)


def _misplaced_system() -> RequestError:
    return RequestError(
        "messages: a system message follows others, expected it first: the model's chat template has no other place",
        field="messages",
    )


def _marks(router: str) -> Marks:
    return {Marker.IMAGE: IMAGE_TEXT, Marker.ROUTER: router}


def _texts(turns: Sequence[Turn]) -> list[str]:
    return [part for turn in turns for part in turn.parts if isinstance(part, str)]


def _marked(message: dict[str, Any]) -> dict[str, Any]:
    """A message with the mark at the end of its text."""
    if isinstance(message["content"], str):
        return {**message, "content": message["content"] + _CONTINUED}
    parts = list(message["content"])
    last = next((i for i, part in reversed(list(enumerate(parts))) if part["type"] == "text"), None)
    if last is None:
        raise RequestError(
            "continue_final_message: the last message has no text to continue", field="continue_final_message"
        )
    parts[last] = {**parts[last], "text": parts[last]["text"] + _CONTINUED}
    return {**message, "content": parts}


def _before_mark(text: str) -> str:
    marks = list(re.finditer(re.escape(_CONTINUED.strip()), text, re.IGNORECASE | re.ASCII))
    if not marks:
        raise RequestError(
            "continue_final_message: the model's chat template leaves out the end of the last message",
            field="continue_final_message",
        )
    place = marks[-1].start()
    is_whole = text.startswith(" ", marks[-1].end())  # else the template trims messages, and the last one as well
    return text[:place] if is_whole else text[:place].rstrip()


def load_template(
    directory: Path, tokenizer: Tokenizer, image_token_id: int | None, takes_images: bool
) -> JinjaTemplate:
    """The template of an engine's tokenizer.

    Raises:
        EngineError: it is missing, or cannot be rendered.
    """
    path = directory / "chat_template.jinja"
    image_token = None if image_token_id is None else tokenizer.token(image_token_id)
    source = read_text(path, EngineError, TEXT_BYTES)
    try:
        return JinjaTemplate(source, tokenizer.special_tokens, image_token, takes_images)
    except RequestError as error:
        raise EngineError(f"{path}: no template that can be used: build the engine again") from error
