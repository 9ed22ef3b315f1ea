"""The chat template of a checkpoint: where it may be, and which of several is used."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpn_rt.builders.json_values import Json, read_json_if_there
from dpn_rt.errors import CheckpointError, RequestError
from dpn_rt.prompts.template import JinjaTemplate
from dpn_rt.schema.files import TEXT_BYTES, is_there, read_text

_DEFAULT = "default"


def find_chat_template(path: Path, tokenizer_settings: Json) -> str | None:
    """The template that conversations are written by; None where the checkpoint has none.

    A file of its own comes first, as in transformers, then the processor's settings, then the tokenizer's.

    Raises:
        CheckpointError: there are several, and none of them is the default; or one is no text.
    """
    if is_there(path / "chat_template.jinja"):
        return read_text(path / "chat_template.jinja", CheckpointError, TEXT_BYTES)
    for name in ("chat_template.json", "processor_config.json"):
        template = read_json_if_there(path / name).get("chat_template")
        if template is not None:
            return _one_of(template, path / name)
    template = tokenizer_settings.get("chat_template")
    return None if template is None else _one_of(template, path / "tokenizer_config.json")


def check_chat_template(source: str, special_tokens: Mapping[str, str], image_token: str | None, path: Path) -> None:
    """Refuses a template that the runtime cannot use.

    Raises:
        CheckpointError: with what the template says.
    """
    try:
        JinjaTemplate(source, special_tokens, image_token)
    except RequestError as error:
        raise CheckpointError(f"{path}: chat_template cannot be used: {error}") from error


def _one_of(template: Any, file: Path) -> str:
    """The default of templates by name, which are a mapping, or a list of objects with "name" and "template"."""
    if isinstance(template, str):
        return template
    if isinstance(template, list) and all(isinstance(item, dict) for item in template):
        template = {item.get("name"): item.get("template") for item in template}
    if isinstance(template, dict) and template and all(isinstance(text, str) for text in template.values()):
        if _DEFAULT in template or len(template) == 1:
            return str(template.get(_DEFAULT, next(iter(template.values()))))
        raise CheckpointError(
            f"{file}: chat_template has {sorted(map(str, template))}, expected {_DEFAULT!r} among them"
        )
    raise CheckpointError(f"{file}: chat_template is {template!r:.60}, expected a text, or texts by name")
