"""Rows of questions -> what the model is asked, in the words of LLaVA's evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpn_rt.errors import DpnError, EvaluationError
from dpn_rt.evaluate.images import ImageSource, image_source
from dpn_rt.evaluate.question import PromptStyle, Question
from dpn_rt.evaluate.readers.rows import BadRow, Row, category_of, choices_of, is_empty, question_id_of, text_of
from dpn_rt.schema.text import check_unicode

LETTER_ALONE = {
    "en": "Answer with the option's letter from the given choices directly.",
    "cn": "请直接回答选项字母。",
}
IMAGE_MARK = "<image>"


def questions_of_row(row: Row, image_folder: Path, style: PromptStyle) -> Iterator[Question | BadRow]:
    """The questions of a row: one, or one for each rotation of its options; a bad row where it is none."""
    question_id = None
    try:
        question_id = question_id_of(row)
        images = tuple(_images(row, image_folder))
        if "conversations" in row.values:
            yield _of_conversation(row, question_id, images, style)
        else:
            yield from _of_columns(row, question_id, images, style)
    except DpnError as error:
        yield BadRow(row.place, question_id, str(error))


def _images(row: Row, folder: Path) -> Iterator[ImageSource]:
    value = row.values.get("image")
    for each in value if isinstance(value, list) else [value]:
        if not is_empty(each):
            yield image_source(each, folder, row.place)


def _of_conversation(row: Row, question_id: str | int, images: tuple[ImageSource, ...], style: PromptStyle) -> Question:
    """ScienceQA: the first turn is the question."""
    turns = row.values["conversations"]
    first = turns[0] if isinstance(turns, list) and turns else None
    value = first.get("value") if isinstance(first, dict) else None
    if not isinstance(value, str):
        raise EvaluationError("conversations: expected a list that begins with the question, as {'value': text}")
    text = _with_instructions(_checked(value.replace(IMAGE_MARK, "").strip()), style)
    prompt = f"{IMAGE_MARK}\n{text}" if images else text
    return Question(row.place, question_id, text, prompt, images, category_of(row))


def _of_columns(
    row: Row, question_id: str | int, images: tuple[ImageSource, ...], style: PromptStyle
) -> Iterator[Question]:
    asked, category = _checked(_without_mark(text_of(row))), category_of(row)
    options = choices_of(row)
    if not options:
        text = _with_instructions(asked, style)
        yield Question(row.place, question_id, text, text, images, category)
        return
    hint = row.values.get("hint")
    asked = asked if is_empty(hint) else f"{hint}\n{asked}"
    letters = tuple("ABCDEFGHIJ"[: len(options)])
    for round_id in range(len(options) if style.all_rounds else 1):
        rotated = options[round_id:] + options[:round_id]
        lines = [f"{letter}. {option}" for letter, option in zip(letters, rotated, strict=True)]
        prompt = _checked("\n".join([asked, *lines]))
        yield Question(
            row.place,
            question_id,
            _with_instructions(prompt, style),
            prompt,
            images,
            category,
            round_id,
            rotated,
            letters[round_id:] + letters[:round_id],
        )


def _with_instructions(text: str, style: PromptStyle) -> str:
    added = [style.post_prompt] if style.post_prompt else []
    if style.single_pred_prompt:
        added.append(LETTER_ALONE[style.lang])
    return "\n".join([text, *added])


def _without_mark(text: str) -> str:
    """The place of the image, which files in LLaVA's training format name, is the template's affair."""
    return text.removeprefix(f"{IMAGE_MARK}\n").removesuffix(f"\n{IMAGE_MARK}")


def _checked(text: Any) -> str:
    check_unicode(text, "question")
    return str(text)
