"""Questions that the runtime and `dpn_rt.reference` answer differently on one engine, and how near a tie they were."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from dpn_rt import LLM, SamplingParams
from dpn_rt.reference import EagerDpn, EagerGeneration
from examples.tiny_dpn.answers import MAX_TOKENS, Answer, chat_messages
from examples.tiny_dpn.data import Question, Sample


@dataclass(frozen=True, slots=True)
class Disagreement:
    """A question to which the runtime and the eager model give different tokens."""

    scene: int
    kind: str
    question: str
    expected: str
    runtime: str
    """The runtime's answer in a batch."""
    runtime_alone: str
    """The runtime's answer when it is asked this question alone."""
    eager: str
    position: int
    """Index of the first token that differs."""
    eager_margin: float
    """Difference between the eager model's two largest logits at `position`."""
    runtime_margin: float | None
    """The same for the runtime, asked this question alone; None if its answer already differs before `position`."""
    runtime_router_margins: tuple[float | None, ...]
    eager_router_margins: tuple[float | None, ...]
    """Per boundary the difference between the router's two largest probabilities; None where no router ran."""


def compare_with_eager(
    llm: LLM, engine: Path, samples: Sequence[Sample], answers: Sequence[Answer], description: str
) -> list[Disagreement]:
    """Ask `dpn_rt.reference` the same questions one at a time, with the engine's weights and dtype."""
    model = EagerDpn.from_engine(engine, verify=False)
    of_runtime = {(answer.scene, answer.kind): answer for answer in answers}
    found = []
    for index, sample in enumerate(tqdm(samples, desc=description)):
        image = llm.processor.image(sample.image)
        with torch.inference_mode():
            rows = model.encode_image(image.views[0])
        for question in sample.questions:
            prompt = llm.processor.process(llm.processor.chat(chat_messages(image, question.text)))
            own = model.generate(prompt.token_ids.tolist(), image_embeds=rows, max_new_tokens=MAX_TOKENS)
            answer = of_runtime[index, question.kind]
            if tuple(own.token_ids) != answer.token_ids:
                found.append(_look_closer(llm, sample, question, answer, own))
    return found


def _look_closer(llm: LLM, sample: Sample, question: Question, answer: Answer, own: EagerGeneration) -> Disagreement:
    """Ask the runtime this question alone, with log-probabilities, whose differences equal those of the logits."""
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, logprobs=2)
    output = llm.chat(chat_messages(sample.image, question.text), params, use_tqdm=False)[0]
    alone = output.outputs[0]
    position = first_difference(own.token_ids, answer.token_ids)
    is_same_before = list(alone.token_ids[:position]) == own.token_ids[:position]
    assert alone.logprobs is not None and llm.processor.tokenizer is not None
    return Disagreement(
        scene=answer.scene,
        kind=answer.kind,
        question=question.text,
        expected=answer.expected,
        runtime=answer.text,
        runtime_alone=alone.text,
        eager=llm.processor.tokenizer.decode(own.token_ids, skip_special_tokens=True),
        position=position,
        eager_margin=_margin(own.logits[position].float().tolist()),
        runtime_margin=_margin([*alone.logprobs[position].values()]) if is_same_before else None,
        runtime_router_margins=tuple(None if p is None else _margin(p) for p in output.pyramid.probs),
        eager_router_margins=tuple(None if p is None else _margin(p) for p in own.trace.probs),
    )


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Index of the first token in which two different answers differ.

    Neither answer is a prefix of the other: each ends with the end token or at the maximum length.
    """
    return next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)


def _margin(values: Sequence[float]) -> float:
    """Difference between the two largest of at least two values."""
    largest = sorted((float(value) for value in values), reverse=True)
    return largest[0] - largest[1]
