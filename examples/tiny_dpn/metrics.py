"""Numbers of one model's answers: accuracy, visual tokens, FLOPs and routes, per kind and level."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from examples.tiny_dpn.answers import Answer
from examples.tiny_dpn.data import KINDS, LEVELS


@dataclass(frozen=True, slots=True)
class Group:
    """Answers to the questions of one kind, of one level, or to all. All but the counts are means over questions."""

    questions: int
    right: int
    accuracy: float
    """Share of right answers."""
    visual_tokens: tuple[float, ...]
    """Visual tokens per stage."""
    flops: float
    """FLOPs of the decoder's prefill, text rows included."""
    flops_ratio: float
    """Prefill FLOPs over those of the dense model on the same question."""


@dataclass(frozen=True, slots=True)
class Summary:
    """All groups of one model."""

    overall: Group
    levels: dict[str, Group]
    kinds: dict[str, Group]
    routes: dict[str, dict[str, int]]
    """Kind -> route ("2x2 1x2 2x2") -> number of questions, most frequent first."""
    fine_to_coarse: float
    """Last-stage visual tokens of fine questions over those of coarse questions about the same picture: the ratio of
    the two means per picture, then the mean over pictures."""
    fine_to_coarse_of_means: float
    """The same ratio, taken once of the means over all pictures."""


def summarize(answers: Sequence[Answer]) -> Summary:
    """Summarise one model's answers; there must be at least one per kind and level."""
    return Summary(
        overall=group(answers),
        levels={level: group([a for a in answers if a.level == level]) for level in LEVELS},
        kinds={kind: group([a for a in answers if a.kind == kind]) for kind in KINDS},
        routes={
            kind: dict(Counter(" ".join(a.route) for a in answers if a.kind == kind).most_common()) for kind in KINDS
        },
        fine_to_coarse=fine_to_coarse(answers),
        fine_to_coarse_of_means=_last_stage(answers, "fine") / _last_stage(answers, "coarse"),
    )


def group(answers: Sequence[Answer]) -> Group:
    """Counts and means of at least one answer."""
    return Group(
        questions=len(answers),
        right=sum(answer.is_right for answer in answers),
        accuracy=mean(answer.is_right for answer in answers),
        visual_tokens=tuple(mean(stage) for stage in zip(*(answer.visual_tokens for answer in answers), strict=True)),
        flops=mean(answer.flops for answer in answers),
        flops_ratio=mean(answer.flops / answer.dense_flops for answer in answers),
    )


def fine_to_coarse(answers: Sequence[Answer]) -> float:
    """See `Summary.fine_to_coarse`. Pictures without both a coarse and a fine question do not count."""
    ratios = []
    for scene in sorted({answer.scene for answer in answers}):
        about = [answer for answer in answers if answer.scene == scene]
        if {"coarse", "fine"} <= {answer.level for answer in about}:
            ratios.append(_last_stage(about, "fine") / _last_stage(about, "coarse"))
    return mean(ratios)


def _last_stage(answers: Sequence[Answer], level: str) -> float:
    return mean(answer.visual_tokens[-1] for answer in answers if answer.level == level)
