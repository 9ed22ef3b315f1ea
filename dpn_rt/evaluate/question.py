"""What a model is asked."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from dpn_rt.evaluate.images import ImageSource

QuestionId = str | int


@dataclass(frozen=True)
class Question:
    """What the model is asked once."""

    place: str
    """In its file, such as "line 7"."""
    question_id: QuestionId
    text: str
    """What the model gets."""
    prompt: str
    """What LLaVA's answers files say was asked: `text`, in some formats without the instruction at its end."""
    images: tuple[ImageSource, ...] = ()
    category: str = ""
    round_id: int | None = None
    """Of a multiple-choice question that is asked once for each order of its options."""
    options: tuple[str, ...] = ()
    letters: tuple[str, ...] = ()
    """Of the options, as they were in the first round."""

    @property
    def key(self) -> str:
        """Tells questions apart: TextVQA and MME have several of one id, with other texts."""
        return question_key(self.question_id, self.round_id, self.prompt)


def question_key(question_id: QuestionId, round_id: int | None, prompt: str) -> str:
    """See `Question.key`."""
    content = json.dumps([question_id, round_id, prompt])
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class PromptStyle:
    """What is added to the questions of a file."""

    single_pred_prompt: bool = False
    """Ask for the letter of an option alone, as LLaVA does."""
    all_rounds: bool = False
    """Ask a multiple-choice question once for each rotation of its options."""
    lang: str = "en"
    """Language of that instruction: "en" or "cn"."""
    post_prompt: str = ""
    """Added on a line of its own."""
