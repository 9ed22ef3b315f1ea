"""What answers depend on besides the questions: kept in every answer, so that runs are never mixed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dpn_rt.errors import EvaluationError
from dpn_rt.sampling.params import SamplingParams
from dpn_rt.schema.keywords import lists_keywords

Route = tuple[int | None, ...]


@lists_keywords(EvaluationError)
@dataclass(frozen=True)
class RunSettings:
    """Of one answers file."""

    engine: str
    """Fingerprint of the engine."""
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 1024
    seed: int = 0
    """Of sampling, where the temperature is above 0."""
    conv_mode: str | None = None
    reduce: str | None = None
    """SPEC of a training-free reduction; None: what the engine was built with."""
    router_bias: float | None = None
    route: Route | None = None

    def to_json(self) -> dict[str, Any]:
        """Those that are not left to the engine."""
        values: dict[str, Any] = {"engine": self.engine, "temperature": self.temperature}
        if self.temperature > 0:
            values |= {"top_p": self.top_p, "seed": self.seed}
        values["max_new_tokens"] = self.max_new_tokens
        optional = {name: getattr(self, name) for name in ("conv_mode", "reduce", "router_bias")}
        optional["route"] = None if self.route is None else list(self.route)
        return values | {name: value for name, value in optional.items() if value is not None}

    def sampling(self, key: str) -> SamplingParams:
        """Parameters of a question, whose answer depends on its own seed, not on those before it.

        Args:
            key: of the question.
        """
        seed = (self.seed + int(key, 16)) % 2**31 if self.temperature > 0 else None
        return SamplingParams(temperature=self.temperature, top_p=self.top_p, max_tokens=self.max_new_tokens, seed=seed)


def difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """In what two settings differ, for a message; None where they are equal."""
    names = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    if not names:
        return None
    first, second = (", ".join(f"{name}={values.get(name)}" for name in names) for values in (found, wanted))
    return f"made with {first}, and this run has {second}"


@dataclass(frozen=True)
class Sweep:
    """One setting with several values, each of which gets an answers file of its own."""

    name: str
    values: tuple[Any, ...]
    texts: tuple[str, ...] = field(default=())
    """The values as they were given."""

    @classmethod
    def parse(cls, text: str) -> Sweep:
        """`router_bias=-4,0,4`, `route=0,0,0;2,2,2` or `reduce=none;fastv:k=2,ratio=0.5`.

        Raises:
            EvaluationError: the name is another, or a value has the wrong form.
        """
        name, equals, rest = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or name not in PARSERS:
            raise EvaluationError(f"--sweep {text!r:.200}: expected {', '.join(PARSERS)}, = and values")
        texts = tuple(value.strip() for value in rest.split("," if name == "router_bias" else ";"))
        if not all(texts) or len(set(texts)) < len(texts):
            raise EvaluationError(f"--sweep {text!r:.200}: expected values that differ, none of them empty")
        values = tuple(PARSERS[name](value) for value in texts)
        if len(set(values)) < len(values):
            raise EvaluationError(f"--sweep {text!r:.200}: expected values that differ, some are equal")
        return cls(name, values, texts)

    def apply(self, settings: RunSettings, answers_file: Path) -> Iterator[tuple[RunSettings, Path]]:
        """The settings and the answers file of each value."""
        for value, text in zip(self.values, self.texts, strict=True):
            shown = re.sub(r"[^\w.,=+-]", "-", f"{self.name}={text}")
            path = answers_file.with_name(f"{answers_file.stem}.{shown}{answers_file.suffix}")
            yield replace(settings, **{self.name: value}), path


def runs_of(settings: RunSettings, sweeps: Sequence[Sweep], answers_file: Path) -> list[tuple[RunSettings, Path]]:
    """The settings and answers file of every run; a sweep after the other.

    Raises:
        EvaluationError: two runs would write one file, or a setting has a value besides its sweep.
    """
    if not sweeps:
        return [(settings, answers_file)]
    fixed = next((sweep.name for sweep in sweeps if getattr(settings, sweep.name) is not None), None)
    if fixed is not None:
        raise EvaluationError(
            f"--sweep {fixed} with {fixed}={getattr(settings, fixed)!r:.200}: expected one of the two"
        )
    runs = [run for sweep in sweeps for run in sweep.apply(settings, answers_file)]
    paths = [path for _, path in runs]
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice is not None:
        raise EvaluationError(f"--sweep: two values would write {twice}: expected values with names that differ")
    return runs


def parse_route(text: str) -> Route:
    """`2,none,1` -> (2, None, 1).

    Raises:
        EvaluationError: it has another form.
    """
    try:
        return tuple(None if item.strip() == "none" else int(item) for item in text.split(","))
    except ValueError:
        raise EvaluationError(
            f"route {text!r:.200}: expected experts separated by commas, such as 2,2,2 or 2,none,1"
        ) from None


def parse_bias(text: str) -> float:
    """A router bias.

    Raises:
        EvaluationError: it is no number.
    """
    try:
        return float(text)
    except ValueError:
        raise EvaluationError(f"router_bias {text!r:.200}: expected a number") from None


PARSERS: Mapping[str, Callable[[str], Any]] = {"router_bias": parse_bias, "route": parse_route, "reduce": str}
"""Setting that a sweep can have -> its value from a text."""
