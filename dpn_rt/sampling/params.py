"""Parameters that control how tokens are chosen and when a request ends. Names, defaults and meanings are vLLM's."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dpn_rt.errors import RequestError
from dpn_rt.schema.keywords import lists_keywords
from dpn_rt.schema.text import check_unicode, shown

GREEDY_TEMPERATURE = 1e-5
"""Below this temperature sampling is greedy, since a division by it could overflow. The bound is vLLM's."""
MAX_COMPLETIONS = 16384
"""Of one prompt, each of which takes memory before the first step. The bound is vLLM's."""


@lists_keywords(RequestError)
@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of one request.

    Raises:
        RequestError: a name is unknown, or a value is out of range, of the wrong type, or contradicts another.
    """

    n: int = 1
    """Number of completions; each is sampled independently."""
    temperature: float = 1.0
    """0 always takes the most probable token; larger values make the choice more random."""
    top_p: float = 1.0
    """Sample from the smallest set of most probable tokens that holds this probability; 1 is off."""
    top_k: int = 0
    """Sample from the k most probable tokens; 0 and -1 are off."""
    min_p: float = 0.0
    """Drop tokens less probable than this fraction of the most probable one; 0 is off."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens of prompt and output less likely."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of each token in the output."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once per occurrence in the output."""
    seed: int | None = None
    """The same seed gives the same tokens in any batch. None (or -1, as in vLLM) draws a seed."""
    stop: str | Sequence[str] | None = None
    """Strings that end the output; kept as a tuple. They may span tokens."""
    stop_token_ids: Sequence[int] | None = None
    """Token ids that end the output; kept as a tuple."""
    max_tokens: int | None = 16
    """Most tokens to generate; None: up to the model's maximum length."""
    min_tokens: int = 0
    """Number of tokens before which no end-of-sequence token, stop token or stop string ends the output."""
    ignore_eos: bool = False
    """Go on after an end-of-sequence token."""
    logprobs: int | None = None
    """Number of most probable tokens whose log-probabilities are returned in addition to the sampled one's; -1: all."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""
    include_stop_str_in_output: bool = False
    """Keep the stop string (or stop token) in the text."""

    def __post_init__(self) -> None:
        for name in ("n", "top_k", "min_tokens"):
            object.__setattr__(self, name, _integer(name, getattr(self, name)))
        for name in ("seed", "max_tokens", "logprobs"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _integer(name, getattr(self, name)))
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
            object.__setattr__(self, name, _number(name, getattr(self, name)))
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise _wrong(name, getattr(self, name), "True or False")
        object.__setattr__(self, "stop", _strings(self.stop))
        object.__setattr__(self, "stop_token_ids", _token_ids(self.stop_token_ids))
        object.__setattr__(self, "seed", None if self.seed == -1 else self.seed)
        self._check_ranges()
        self._check_together()

    def _check_ranges(self) -> None:
        _require("n", self.n, 1 <= self.n <= MAX_COMPLETIONS, f"1 to {MAX_COMPLETIONS}")
        _require("temperature", self.temperature, 0 <= self.temperature <= 1e6, "from 0 (greedy) to 1e6")
        _require("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        _require("top_k", self.top_k, self.top_k >= -1, "0 or -1 (off), or at least 1")
        _require("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1")
        penalty = self.repetition_penalty
        _require("repetition_penalty", penalty, 1e-6 <= penalty <= 1e6, "from 1e-6 to 1e6 (1 is off)")
        for name in ("presence_penalty", "frequency_penalty"):
            _require(name, getattr(self, name), -2 <= getattr(self, name) <= 2, "from -2 to 2")
        _require("seed", self.seed, self.seed is None or -(2**63) <= self.seed < 2**63, "a 64-bit integer or None")
        _require("max_tokens", self.max_tokens, self.max_tokens is None or self.max_tokens >= 1, "at least 1, or None")
        _require("min_tokens", self.min_tokens, self.min_tokens >= 0, "0 or more")
        _require("logprobs", self.logprobs, self.logprobs is None or self.logprobs >= -1, "None, -1 (all) or more")

    def _check_together(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}: expected at most as many",
                field="min_tokens",
            )
        if self.n > 1 and self.is_greedy:
            raise RequestError(
                f"n={self.n} with temperature={self.temperature}: greedy completions are all the same; "
                "expected n=1, or a temperature above 0",
                field="n",
            )

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def has_penalties(self) -> bool:
        """Whether earlier tokens change the logits."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, empty when there is none."""
        return tuple(self.stop or ())

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """`stop_token_ids` as a tuple, empty when there are none."""
        return tuple(self.stop_token_ids or ())


def _require(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise _wrong(name, value, expected)


def _wrong(name: str, value: object, expected: str) -> RequestError:
    return RequestError(f"{name}={shown(value)}: expected {expected}", field=name)


def _integer(name: str, value: Any) -> int:
    """The value as an int. Integers of numpy are accepted, booleans and floats are not."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise _wrong(name, value, f"an integer, got {type(value).__name__}") from None


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise _wrong(name, value, f"a number, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise _wrong(name, value, "a finite number")
    return number


def _strings(stop: Any) -> tuple[str, ...]:
    items = () if stop is None else (stop,) if isinstance(stop, str) else stop
    if not isinstance(items, Sequence) or not all(isinstance(item, str) for item in items):
        raise _wrong("stop", stop, "a string or a list of strings")
    if not all(items):
        raise _wrong("stop", stop, "non-empty strings (an empty one would match at once)")
    for item in items:
        check_unicode(item, "stop", field="stop")
    return tuple(items)


def _token_ids(ids: Any) -> tuple[int, ...]:
    items = () if ids is None else ids
    if isinstance(items, str) or not isinstance(items, Sequence):
        raise _wrong("stop_token_ids", ids, "a list of token ids")
    result = tuple(_integer("stop_token_ids", item) for item in items)
    if any(item < 0 for item in result):
        raise _wrong("stop_token_ids", ids, "token ids of 0 and more")
    return result
