"""Samples of a benchmark and their statistics."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field


@dataclass
class Samples:
    """One quantity, measured once per round."""

    values: list[float] = field(default_factory=list)

    def add(self, value: float) -> None:
        self.values.append(value)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def to_json(self) -> dict[str, object]:
        return {"median": self.median, "min": min(self.values), "max": max(self.values), "samples": list(self.values)}


def paired_ratio(numerator: Samples, denominator: Samples) -> Samples:
    """Ratios round by round, so that a drift over the run cancels."""
    return Samples([n / d for n, d in zip(numerator.values, denominator.values, strict=True)])
