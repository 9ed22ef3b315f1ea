"""The runtime's answers to held-out questions, and their costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from dpn_rt import LLM, SamplingParams
from dpn_rt.format.config import ModelConfig
from dpn_rt.format.flops import prefill_flops
from dpn_rt.outputs import RequestOutput
from examples.tiny_dpn.data import Question, Sample

MAX_TOKENS = 8
SCENES_PER_CALL = 16


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to one question, and its costs."""

    scene: int
    """Index of the scene."""
    kind: str
    level: str
    expected: str
    text: str
    token_ids: tuple[int, ...]
    route: tuple[str, ...]
    """Pooling kernel per boundary, such as "1x2"; "skipped" where nothing was pooled."""
    visual_tokens: tuple[int, ...]
    """Visual tokens per stage."""
    flops: int
    """FLOPs of the decoder's prefill."""
    dense_flops: int
    """The same for the dense model, whose prompt has no `<ROUTER>`."""

    @property
    def is_right(self) -> bool:
        return self.text.strip() == self.expected


def chat_messages(image: Any, text: str) -> list[dict[str, Any]]:
    """One question about one picture as OpenAI chat messages."""
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]


def ask_runtime(
    llm: LLM,
    samples: Sequence[Sample],
    description: str,
    *,
    reduce: str | None = None,
    router_bias: float | None = None,
) -> list[Answer]:
    """Ask every question of every sample, decoding greedily; `reduce` and `router_bias` as of `LLM.chat`."""
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    answers = []
    for first in tqdm(range(0, len(samples), SCENES_PER_CALL), desc=description):
        asked = [
            (index, sample, question)
            for index, sample in enumerate(samples[first : first + SCENES_PER_CALL], first)
            for question in sample.questions
        ]
        conversations = [chat_messages(sample.image, question.text) for _, sample, question in asked]
        outputs = llm.chat(conversations, params, use_tqdm=False, reduce=reduce, router_bias=router_bias)
        for (index, _, question), output in zip(asked, outputs, strict=True):
            answers.append(_answer(llm.model, index, question, output))
    return answers


def _answer(model: ModelConfig, scene: int, question: Question, output: RequestOutput) -> Answer:
    pyramid = output.pyramid
    assert model.vision is not None
    num_text = len(output.prompt_token_ids) - 1
    dense_rows = num_text + model.vision.num_visual_tokens - model.reduction.use_router_token
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
        dense_flops=prefill_flops(model, [dense_rows] * len(rows)),
    )
