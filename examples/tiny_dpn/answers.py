"""Answers of one model to held-out questions: from the runtime, and from `dpn_rt.eager` on the same engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dpn_rt import LLM, SamplingParams
from dpn_rt.config import ModelConfig
from dpn_rt.eager import EagerDpn
from dpn_rt.flops import prefill_flops
from dpn_rt.outputs import RequestOutput
from examples.tiny_dpn.data import Question, Sample

MAX_TOKENS = 8
SCENES_PER_CALL = 16


@dataclass(frozen=True, slots=True)
class Answer:
    """One question, what came back and what it cost."""

    scene: int
    """Index of the scene."""
    kind: str
    level: str
    expected: str
    text: str
    token_ids: tuple[int, ...]
    route: tuple[str, ...]
    """Kernel per boundary, such as "1x2"; "skipped" where nothing was pooled."""
    visual_tokens: tuple[int, ...]
    """Per stage."""
    flops: int
    """Of the decoder's prefill."""
    dense_flops: int
    """The same without pooling."""

    @property
    def is_right(self) -> bool:
        return self.text.strip() == self.expected


@dataclass(frozen=True, slots=True)
class Disagreement:
    """A question that runtime and eager answer differently."""

    scene: int
    kind: str
    runtime: str
    eager: str
    margin: float
    """Eager's difference between its two largest logits where the answers part: a near tie when tiny."""


def chat_messages(image: Any, text: str) -> list[dict[str, Any]]:
    """One question about one picture, in OpenAI's form."""
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]


def ask_runtime(llm: LLM, samples: Sequence[Sample], description: str) -> list[Answer]:
    """All questions about all samples, greedily."""
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    answers = []
    for first in tqdm(range(0, len(samples), SCENES_PER_CALL), desc=description):
        asked = [
            (index, sample, question)
            for index, sample in enumerate(samples[first : first + SCENES_PER_CALL], first)
            for question in sample.questions
        ]
        conversations = [chat_messages(sample.image, question.text) for _, sample, question in asked]
        outputs = llm.chat(conversations, params, use_tqdm=False)
        for (index, _, question), output in zip(asked, outputs, strict=True):
            answers.append(_answer(llm.model, index, question, output))
    return answers


def _answer(model: ModelConfig, scene: int, question: Question, output: RequestOutput) -> Answer:
    pyramid = output.pyramid
    num_text = len(output.prompt_token_ids) - 1
    rows = [num_text + visual for visual in pyramid.visual_tokens]
    return Answer(
        scene=scene,
        kind=question.kind,
        level=question.level,
        expected=question.answer,
        text=output.outputs[0].text,
        token_ids=tuple(output.outputs[0].token_ids),
        route=tuple("skipped" if kernel is None else f"{kernel[0]}x{kernel[1]}" for kernel in pyramid.kernels),
        visual_tokens=tuple(pyramid.visual_tokens),
        flops=prefill_flops(model, rows),
        dense_flops=prefill_flops(model, [rows[0]] * len(rows)),
    )


def compare_with_eager(
    llm: LLM, engine: Path, samples: Sequence[Sample], answers: Sequence[Answer], description: str
) -> list[Disagreement]:
    """Asks `dpn_rt.eager` the same questions, one at a time, on the weights and in the dtype of the engine."""
    model = EagerDpn.from_engine(engine, verify=False)
    expected = {(answer.scene, answer.kind): answer for answer in answers}
    found = []
    for index, sample in enumerate(tqdm(samples, desc=description)):
        for question in sample.questions:
            prompt = llm.processor.process(llm.processor.chat(chat_messages(sample.image, question.text)))
            assert prompt.visual is not None
            own = model.generate(prompt.token_ids.tolist(), prompt.visual.pixels, max_new_tokens=MAX_TOKENS)
            other = expected[index, question.kind]
            if tuple(own.token_ids) != other.token_ids:
                found.append(_disagreement(llm, other, own.token_ids, own.logits))
    return found


def _disagreement(llm: LLM, answer: Answer, eager_ids: list[int], logits: torch.Tensor) -> Disagreement:
    pairs = zip(eager_ids, answer.token_ids, strict=False)
    first = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), 0)
    largest = logits[first].float().topk(2).values
    assert llm.processor.tokenizer is not None
    text = llm.processor.tokenizer.decode(eager_ids, skip_special_tokens=True)
    return Disagreement(answer.scene, answer.kind, answer.text, text, float(largest[0] - largest[1]))
