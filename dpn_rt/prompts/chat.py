"""Conversations in OpenAI's form -> prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dpn_rt.errors import RequestError
from dpn_rt.prompts.markers import Typed
from dpn_rt.prompts.messages import Marker, Message, Turn, parse_messages
from dpn_rt.prompts.prompt import check_num_images
from dpn_rt.prompts.template import ChatOptions, ChatTemplate
from dpn_rt.prompts.tokenizer import Tokenizer
from dpn_rt.schema.text import shown

_OWN_VARIABLES = ("add_generation_prompt", "chat_template", "continue_final_message", "conversations", "documents",
                  "messages", "return_assistant_tokens_mask", "tools")  # fmt: skip


def chat_options(
    add_generation_prompt: bool | None = None,
    continue_final_message: bool | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> ChatOptions:
    """Checked options; None is the default of each.

    Raises:
        RequestError: a value has the wrong type, or two of them contradict each other.
    """
    values = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
    for name, value in values.items():
        if value is not None and not isinstance(value, bool):
            raise RequestError(f"{name}={shown(value)}: expected true or false", field=name)
    if continue_final_message and add_generation_prompt:
        raise RequestError(
            "continue_final_message and add_generation_prompt are both set: expected one of them",
            field="continue_final_message",
        )
    if template_kwargs is not None and not isinstance(template_kwargs, Mapping):
        raise RequestError(
            f"chat_template_kwargs: expected a dict, got {type(template_kwargs).__name__}", field="chat_template_kwargs"
        )
    own = [name for name in template_kwargs or {} if name in _OWN_VARIABLES]
    if own:
        raise RequestError(
            f"chat_template_kwargs: {own[0]} is not a variable of the template, expected others",
            field="chat_template_kwargs",
        )
    adds = not continue_final_message if add_generation_prompt is None else add_generation_prompt
    return ChatOptions(adds, bool(continue_final_message), dict(template_kwargs or {}))


def chat_prompt(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    options: ChatOptions,
    *,
    image_token_id: int | None,
    router_token_id: int | None,
    max_images: int,
    check_text: Callable[[int], None],
) -> dict[str, Any]:
    """The prompt of a conversation, ready for the assistant's answer.

    Where there is a router token, every user turn ends with it, from the first turn with an image on: routers read what
    was asked about the image, and a router token before the image would be an error.

    What users type never becomes a special token: `<image>` in a text reaches the model as these seven characters.

    Args:
        messages: in OpenAI's form.
        tokenizer: of the model.
        template: of the model.
        options: how the prompt ends.
        image_token_id: of the tokenizer; None where it has none.
        router_token_id: None for a model without a router token.
        max_images: of a prompt.
        check_text: refuses a number of characters that cannot fit.

    Raises:
        RequestError: a message has the wrong form; ImageError: an image has, or there are more than `max_images`.
    """
    turns, images = parse_messages(messages)
    _check_last(turns, options)
    check_num_images(len(images), max_images, f"messages: got {len(images)} images")
    router = None if router_token_id is None else tokenizer.token(router_token_id)
    if router is not None:
        turns = _with_router_tokens(turns, router)
    typed = Typed.of(tokenizer.marker_texts(image_token_id, router_token_id), _texts(turns))
    if typed is None:
        text = template.render(turns, router or "", options)
        check_text(len(text))
        ids = tokenizer.encode(text, image_token_id)
    else:
        text = template.render([_hidden(turn, typed) for turn in turns], router or "", options)
        check_text(len(text))
        ids = tokenizer.encode_typed(text, typed, image_token_id)
        text = typed.show(text)
    media = {"multi_modal_data": {"image": images if len(images) > 1 else images[0]}} if images else {}
    return {"prompt": text, "prompt_token_ids": ids, **media}


def _check_last(turns: Sequence[Turn], options: ChatOptions) -> None:
    last, name = turns[-1], f"messages[{len(turns) - 1}]"
    if options.continue_final_message and last.role != "assistant":
        raise RequestError(
            f"{name}: role {last.role}, expected assistant, since continue_final_message is set", field=name
        )
    if last.role != "user" and options.add_generation_prompt:
        raise RequestError(
            f"messages: the last one has role {last.role}, expected user (or assistant with continue_final_message)",
            field="messages",
        )
    if last.role == "user" and last.is_blank:
        raise RequestError(f"{name}: empty, expected a question or an image", field=name)


def _with_router_tokens(turns: Sequence[Turn], router: str) -> list[Turn]:
    """Turns with the router token where `chat_prompt` says."""
    first = next((i for i, turn in enumerate(turns) if turn.has_image), len(turns))
    return [
        Turn(turn.role, (*turn.parts, Marker.ROUTER)) if turn.role == "user" and i >= first else turn
        for i, turn in enumerate(turns)
    ]


def _hidden(turn: Turn, typed: Typed) -> Turn:
    return Turn(turn.role, tuple(typed.hide(part) if isinstance(part, str) else part for part in turn.parts))


def _texts(turns: Sequence[Turn]) -> list[str]:
    return [part for turn in turns for part in turn.parts if isinstance(part, str)]
