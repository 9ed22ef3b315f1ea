"""Turns of a conversation -> the text of a prompt, by the built-in Vicuna form or by a checkpoint's Jinja template."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dpn_rt.errors import EngineError, RequestError
from dpn_rt.prompts.markers import IMAGE_TEXT
from dpn_rt.prompts.messages import Marker, Turn
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
        text = VICUNA_SYSTEM if system is None else written(system, router)
        for turn in turns:
            if turn.role == "user":
                text += f"{'' if text.endswith(_END) else ' '}USER: {_images_first(turn, router)}"
            else:
                text += f" ASSISTANT: {written(turn, router)}{_END}"
        if options.continue_final_message:
            return text.removesuffix(_END)
        return text + " ASSISTANT:" if options.add_generation_prompt else text


class JinjaTemplate:
    """A checkpoint's own template. How it takes contents, as strings or as lists of parts, is found by rendering."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], image_token: str | None) -> None:
        """
        Args:
            source: of the template.
            special_tokens: variables that a template may use, such as `bos_token`.
            image_token: what stands for an image in the text, besides `<image>`; None: nothing does.

        Raises:
            RequestError: the template cannot be rendered; EngineError: nor any other.
        """
        self._process, self._special_tokens = TemplateProcess(source), dict(special_tokens)
        self._roles_with_parts = self._find_roles_with_parts([IMAGE_TEXT, *([image_token] if image_token else [])])

    def render(self, turns: Sequence[Turn], router: str, options: ChatOptions) -> str:
        """See `ChatTemplate`."""
        messages = [_message(turn, router, turn.role in self._roles_with_parts) for turn in turns]
        return self._render(messages, options)

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

    def _find_roles_with_parts(self, image_markers: Sequence[str]) -> frozenset[str]:
        """The roles whose contents are to be lists of parts.

        Raises:
            RequestError: the template renders a conversation in no form.
        """
        failure: RequestError | None = None
        for roles in _subsets(("user", "assistant")):
            try:
                fits = self._fits(roles, image_markers)
            except TemplateLimitError:
                raise
            except RequestError as error:
                failure = failure or error
                continue
            if fits:
                return roles | ({"system"} if self._takes_system_parts(roles) else set())
        if failure is None:
            raise RequestError("the chat template leaves out what messages say")
        raise failure

    def _fits(self, roles: frozenset[str], image_markers: Sequence[str]) -> bool:
        """Whether a conversation appears in the prompt, text for text, if these roles' contents are lists."""
        first = Turn("user", (Marker.IMAGE, "DpnQuestionA", "DpnQuestionB") if "user" in roles else ("DpnQuestionA",))
        turns = [first, Turn("assistant", ("DpnAnswer",)), Turn("user", ("DpnQuestionC",))]
        text = self._render([_message(turn, "", turn.role in roles) for turn in turns], ChatOptions())
        words = [part for turn in turns for part in turn.parts if isinstance(part, str)]
        has_image = any(marker in text for marker in image_markers)
        return _in_order(words, text) and (has_image or "user" not in roles)

    def _takes_system_parts(self, roles: frozenset[str]) -> bool:
        turns = [Turn("system", ("DpnSystem",)), Turn("user", ("DpnQuestion",))]
        messages = [_message(turn, "", turn.role != "user" or "user" in roles) for turn in turns]
        try:
            return _in_order(["DpnSystem", "DpnQuestion"], self._render(messages, ChatOptions()))
        except RequestError:
            return False


def written(turn: Turn, router: str) -> str:
    """The parts of a turn in their order, with nothing between them."""
    markers = {Marker.IMAGE: IMAGE_TEXT, Marker.ROUTER: router}
    return "".join(part if isinstance(part, str) else markers[part] for part in turn.parts)


def _images_first(turn: Turn, router: str) -> str:
    """A turn as LLaVA writes it: images, each on a line of its own, and then the text.

    A turn whose images stand between texts keeps their places.
    """
    places = [i for i, part in enumerate(turn.parts) if part is Marker.IMAGE]
    texts = [i for i, part in enumerate(turn.parts) if isinstance(part, str) and part]
    if not places or (texts and texts[0] < places[-1] and places[0] < texts[-1]):
        return written(turn, router)
    others = tuple(part for part in turn.parts if part is not Marker.IMAGE)
    return f"{IMAGE_TEXT}\n" * len(places) + written(Turn(turn.role, others), router)


def _message(turn: Turn, router: str, takes_parts: bool) -> dict[str, Any]:
    """A turn as templates take it."""
    if not takes_parts:
        content = _images_first(turn, router) if turn.has_image else written(turn, router)
        return {"role": turn.role, "content": content}
    parts: list[dict[str, Any]] = []
    for part in turn.parts:
        if part is Marker.IMAGE:
            parts.append({"type": "image"})
        elif isinstance(part, str):
            parts.append({"type": "text", "text": part})
        elif parts and parts[-1]["type"] == "text":  # templates may write something after each text
            parts[-1]["text"] += router
        else:
            parts.append({"type": "text", "text": router})
    return {"role": turn.role, "content": parts}


def _marked(message: dict[str, Any]) -> dict[str, Any]:
    """A message with the mark at the end of its text."""
    if isinstance(message["content"], str):
        return {**message, "content": message["content"] + _CONTINUED}
    parts = list(message["content"])
    last = next((i for i, part in reversed(list(enumerate(parts))) if part["type"] == "text"), None)
    if last is None:
        raise RequestError("continue_final_message: the last message has no text to continue")
    parts[last] = {**parts[last], "text": parts[last]["text"] + _CONTINUED}
    return {**message, "content": parts}


def _before_mark(text: str) -> str:
    place = text.rfind(_CONTINUED.strip())
    if place < 0:
        raise RequestError("continue_final_message: the model's chat template leaves out the end of the last message")
    is_whole = text.startswith(_CONTINUED, place)  # else the template trims messages, and the last one as well
    return text[:place] if is_whole else text[:place].rstrip()


def _in_order(words: Sequence[str], text: str) -> bool:
    """Whether each word is in the text once, one after the other, and no list of parts is printed as Python or JSON."""
    places = [text.find(word) for word in words]
    is_printed = any(f"{quote}type{quote}:" in text for quote in "'\"")
    return not is_printed and places == sorted(places) and all(text.count(word) == 1 for word in words)


def _subsets(roles: tuple[str, ...]) -> list[frozenset[str]]:
    """Largest first: lists of parts say more than strings."""
    counts = range(len(roles), -1, -1)
    return [frozenset(subset) for count in counts for subset in itertools.combinations(roles, count)]


def load_template(directory: Path, tokenizer: Tokenizer, image_token_id: int | None) -> JinjaTemplate:
    """The template of an engine's tokenizer.

    Raises:
        EngineError: it is missing, or cannot be rendered.
    """
    path = directory / "chat_template.jinja"
    image_token = None if image_token_id is None else tokenizer.token(image_token_id)
    source = read_text(path, EngineError, TEXT_BYTES)
    try:
        return JinjaTemplate(source, tokenizer.special_tokens, image_token)
    except RequestError as error:
        raise EngineError(f"{path}: no template that can be used: build the engine again") from error
