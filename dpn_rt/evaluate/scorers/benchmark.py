"""What a benchmark is, and its score."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from dpn_rt.errors import EvaluationError
from dpn_rt.evaluate.scorers.truth import Answer, Graded, Inputs, Truth, first_line, pair


def accuracy_by_category(graded: Sequence[Graded]) -> dict[str, float]:
    """Per cent of the points, of all questions and of each category."""
    by_category: dict[str, list[float]] = defaultdict(list)
    for each in graded:
        by_category[each.truth.category].append(each.points)
    metrics = {"accuracy": percent([each.points for each in graded])}
    named = {name: points for name, points in by_category.items() if name}
    return metrics | {f"accuracy, {name}": percent(points) for name, points in sorted(named.items())}


def percent(points: Sequence[float]) -> float:
    """Mean of points between 0 and 1, in per cent; 0 of none."""
    return 100 * fmean(points) if points else 0.0


@dataclass(frozen=True)
class Benchmark:
    """The rule of a benchmark. A question without an answer counts as one that was answered wrongly."""

    title: str
    read: Callable[[Inputs], list[Truth]]
    """The right answers."""
    grade: Callable[[Truth, Sequence[Answer]], float]
    """Points of the answers to a question, 0 to 1; there is at least one answer."""
    summarize: Callable[[Sequence[Graded]], dict[str, float]] = accuracy_by_category
    """Graded questions -> what is published; the first is the one that the benchmark is known for."""
    asked: Callable[[str], str] = first_line
    """The question itself within a prompt."""

    def score(self, truths: Sequence[Truth], answers: Sequence[Answer]) -> Score:
        """The score of answers.

        Raises:
            EvaluationError: there are no questions, or see `pair`.
        """
        if not truths:
            raise EvaluationError("the annotations have no questions")
        graded = [
            Graded(truth, found, self.grade(truth, found) if found else 0.0)
            for truth, found in pair(truths, answers, self.asked)
        ]
        used = {id(answer) for each in graded for answer in each.answers}
        unused = sum(id(answer) not in used for answer in answers)
        return Score(self.title, self.summarize(graded), tuple(graded), unused)


@dataclass(frozen=True)
class Score:
    """What answers are worth."""

    title: str
    metrics: Mapping[str, float]
    """The first is the benchmark's own; accuracies are in per cent."""
    graded: tuple[Graded, ...]
    num_unused: int
    """Answers to no question of the annotations."""

    @property
    def main(self) -> tuple[str, float]:
        """Name and value of the benchmark's own metric."""
        return next(iter(self.metrics.items()))

    @property
    def num_missing(self) -> int:
        """Questions without an answer."""
        return sum(not each.answers for each in self.graded)
