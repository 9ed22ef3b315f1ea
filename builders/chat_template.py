"""The chat template of a checkpoint: where it may be, and which of several is used."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpn_rt.builders.json_values import Json, read_json_if_there
from dpn_rt.errors import CheckpointError, RequestError
from dpn_rt.prompts.template import JinjaTemplate
from dpn_rt.schema.files import TEXT_BYTES, is_directory, is_there, read_text
from dpn_rt.schema.text import shown

_DEFAULT = "default"
_DIRECTORY = "additional_chat_templates"
"""Where transformers saves named templates, a file each."""


def find_chat_template(path: Path, tokenizer_settings: Json) -> str | None:
    """The template that conversations are written by; None where the checkpoint has none.

    A file of its own comes first, as in transformers, then the processor's settings, then the tokenizer's. Files of
    named templates that are additional, none of them the default, count where there is nothing else.

    Raises:
        CheckpointError: there are several, and none of them is the default; or one is no text.
    """
    additional = _additional(path / _DIRECTORY)
    file = path / "chat_template.jinja"
    if not is_there(file):
        file = additional.get(_DEFAULT, file)
    if is_there(file):
        return read_text(file, CheckpointError, TEXT_BYTES)
    template = _of_settings(path, tokenizer_settings)
    if template is None and additional:
        return read_text(additional[_default_of(additional, path / _DIRECTORY)], CheckpointError, TEXT_BYTES)
    return template


def _additional(directory: Path) -> dict[str, Path]:
    """Name -> file of the templates in a directory; empty where there is none."""
    if not is_there(directory):
        return {}
    if not is_directory(directory):
        raise CheckpointError(f"{directory}: expected a directory of templates")
    try:
        return {file.stem: file for file in sorted(directory.iterdir()) if file.suffix == ".jinja"}
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be read: {error.strerror}") from error


def _of_settings(path: Path, tokenizer_settings: Json) -> str | None:
    for name in ("chat_template.json", "processor_config.json"):
        template = read_json_if_there(path / name).get("chat_template")
        if template is not None:
            return _one_of(template, path / name)
    template = tokenizer_settings.get("chat_template")
    return None if template is None else _one_of(template, path / "tokenizer_config.json")


def check_chat_template(
    source: str,
    special_tokens: Mapping[str, str],
    image_token: str | None,
    path: Path,
    takes_images: bool = True,
) -> None:
    """Refuses a template that the runtime cannot use, also one that no conversation with an image could use.

    Args:
        source, special_tokens, image_token, takes_images: as in `JinjaTemplate`.
        path: of the checkpoint, for messages.

    Raises:
        CheckpointError: with what the template says.
    """
    try:
        JinjaTemplate(source, special_tokens, image_token, takes_images)
    except RequestError as error:
        raise CheckpointError(f"{path}: chat_template cannot be used: {error}") from error


def _one_of(template: Any, file: Path) -> str:
    """The default of templates by name, which are a mapping, or a list of objects with "name" and "template"."""
    if isinstance(template, str):
        return template
    if isinstance(template, list) and all(isinstance(item, dict) for item in template):
        template = {item.get("name"): item.get("template") for item in template}
    if isinstance(template, dict) and template and all(isinstance(text, str) for text in template.values()):
        return str(template[_default_of(template, file)])
    raise CheckpointError(f"{file}: chat_template is {template!r:.60}, expected a text, or texts by name")


def _default_of(templates: Mapping[str, Any], place: Path) -> str:
    """The name of the one that is used: the default, or the only one."""
    if _DEFAULT in templates or len(templates) == 1:
        return _DEFAULT if _DEFAULT in templates else next(iter(templates))
    names = shown(sorted(map(str, templates)))
    raise CheckpointError(f"{place}: chat_template has {names}, expected {_DEFAULT!r} among them")
