"""What the answers say about a model: accuracy, visual tokens, FLOPs and routes, per kind and level."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from examples.tiny_dpn.answers import Answer
from examples.tiny_dpn.data import KINDS, LEVELS


@dataclass(frozen=True, slots=True)
class Group:
    """Answers to one kind, one level or all of the questions."""

    questions: int
    accuracy: float
    """Share of right answers."""
    visual_tokens: tuple[float, ...]
    """Mean per stage."""
    flops_ratio: float
    """Decoder prefill FLOPs over those without pooling; means over the questions."""


@dataclass(frozen=True, slots=True)
class Summary:
    """All groups of one model."""

    overall: Group
    levels: dict[str, Group]
    kinds: dict[str, Group]
    routes: dict[str, dict[str, int]]
    """Kind -> route ("2x2 1x2 2x2") -> questions, most frequent first."""
    fine_to_coarse: float
    """Visual tokens of the last stage for fine questions over those for coarse ones about the same picture; mean over
    the pictures of mean over mean."""


def summarize(answers: Sequence[Answer]) -> Summary:
    """Numbers of one model's answers, at least one per kind and level."""
    return Summary(
        overall=group(answers),
        levels={level: group([a for a in answers if a.level == level]) for level in LEVELS},
        kinds={kind: group([a for a in answers if a.kind == kind]) for kind in KINDS},
        routes={
            kind: dict(Counter(" ".join(a.route) for a in answers if a.kind == kind).most_common()) for kind in KINDS
        },
        fine_to_coarse=fine_to_coarse(answers),
    )


def group(answers: Sequence[Answer]) -> Group:
    """Means over answers, at least one."""
    return Group(
        questions=len(answers),
        accuracy=mean(answer.is_right for answer in answers),
        visual_tokens=tuple(mean(stage) for stage in zip(*(answer.visual_tokens for answer in answers), strict=True)),
        flops_ratio=sum(answer.flops for answer in answers) / sum(answer.dense_flops for answer in answers),
    )


def fine_to_coarse(answers: Sequence[Answer]) -> float:
    """See `Summary.fine_to_coarse`."""
    ratios = []
    for scene in sorted({answer.scene for answer in answers}):
        tokens = {
            level: [a.visual_tokens[-1] for a in answers if a.scene == scene and a.level == level]
            for level in ("coarse", "fine")
        }
        if tokens["coarse"] and tokens["fine"]:
            ratios.append(mean(tokens["fine"]) / mean(tokens["coarse"]))
    return mean(ratios)
