"""Pixels, token ids and labels of samples, exactly as the runtime's processor makes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer

from dpn_rt.prompts.template import VICUNA_SYSTEM
from examples.tiny_dpn.data import Question

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""CLIP's normalisation, as in preprocessor_config.json."""


@dataclass(frozen=True, slots=True)
class Turn:
    """The text after the image: a question, `<ROUTER>` where the model has one, and the answer."""

    ids: tuple[int, ...]
    answer_start: int
    """Index in `ids` of the answer's first token; the answer ends with the `</s>` at the end of `ids`."""
    kind: str


@dataclass(frozen=True, eq=False)
class Scene:
    """One picture and the questions asked about it, each as if it were the only one."""

    pixels: torch.Tensor
    """[3, side, side] float32."""
    turns: tuple[Turn, ...]


class Encoder:
    """Encodes scenes and questions with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, router_token: bool = True) -> None:
        self._tokenizer = tokenizer
        self._question_end = "<ROUTER>" if router_token else ""
        self.before_image = tuple(tokenizer.encode(f"{VICUNA_SYSTEM} USER: ").ids)
        """Ids of the template before the image."""
        self._turn = cache(self._encode_turn)

    def turn(self, question: Question) -> Turn:
        return self._turn(question)

    def _encode_turn(self, question: Question) -> Turn:
        asked = self._ids(f"\n{question.text}{self._question_end} ASSISTANT:")
        answer = self._ids(f" {question.answer}</s>")
        return Turn((*asked, *answer), len(asked), question.kind)

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def scene(self, image: Image.Image, questions: Sequence[Question]) -> Scene:
        return Scene(pixels(image), tuple(self.turn(question) for question in questions))


def pixels(image: Image.Image) -> torch.Tensor:
    """[3, side, side] float32, normalised. The picture must have the size that the tower takes."""
    scaled = np.asarray(image, np.float32) / 255
    normalised = (scaled - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    return torch.from_numpy(normalised).permute(2, 0, 1).contiguous()
