"""Log-probabilities of sampled tokens, computed from the unmodified logits, as mappings token id -> `Logprob`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpn_rt.device.transfer import to_device, to_host

TokenText = Callable[[int], str]
"""Token id -> its text."""


class Logprob(float):
    """A token's log-probability, with the token's rank (1 is the most probable) and, with a tokenizer, its text."""

    __slots__ = ("_text", "rank", "token_id")

    rank: int
    token_id: int
    _text: TokenText | None

    def __new__(cls, value: float, rank: int, token_id: int, text: TokenText | None = None) -> Logprob:
        """
        Args:
            value: natural logarithm of the probability.
            rank: 1 for the most probable token.
            token_id: the token.
            text: token id -> text, called when `decoded_token` is read; None without a tokenizer.
        """
        self = super().__new__(cls, value)
        self.rank = rank
        self.token_id = token_id
        self._text = text
        return self

    @property
    def logprob(self) -> float:
        """The plain number."""
        return float(self)

    @property
    def decoded_token(self) -> str | None:
        """The token's text, decoded when this property is read; None for an engine without a tokenizer."""
        return None if self._text is None else self._text(self.token_id)

    def __repr__(self) -> str:
        return f"Logprob(logprob={float(self)!r}, rank={self.rank}, decoded_token={self.decoded_token!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        # The text function holds a tokenizer, so only the text itself is pickled.
        return _restore, (float(self), self.rank, self.token_id, self.decoded_token)


def _restore(value: float, rank: int, token_id: int, decoded: str | None) -> Logprob:
    return Logprob(value, rank, token_id, None if decoded is None else lambda _: decoded)


class VocabularyLogprobs(Mapping[int, Logprob]):
    """The log-probabilities of a whole vocabulary. A `Logprob` is made when its entry is read."""

    __slots__ = ("_ranks", "_text", "values_array")

    def __init__(self, values: npt.NDArray[np.float32], text: TokenText | None = None) -> None:
        """
        Args:
            values: [vocab_size] float32.
            text: token id -> text; None without a tokenizer.
        """
        self.values_array = values
        self._text = text
        self._ranks: npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.values_array)

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self.values_array)))

    def __contains__(self, token_id: object) -> bool:
        return isinstance(token_id, int | np.integer) and bool(0 <= token_id < len(self.values_array))

    def __getitem__(self, token_id: int) -> Logprob:
        if token_id not in self:
            raise KeyError(token_id)
        if self._ranks is None:
            order = np.argsort(-self.values_array, kind="stable")
            self._ranks = np.empty_like(order)
            self._ranks[order] = np.arange(1, len(order) + 1)
        return Logprob(self.values_array[token_id], int(self._ranks[token_id]), int(token_id), self._text)

    def __reduce__(self) -> tuple[Any, ...]:
        # The text function holds a tokenizer, so only the texts themselves are pickled.
        texts = None if self._text is None else [self._text(token_id) for token_id in self]
        return _restore_vocabulary, (self.values_array, texts)


def _restore_vocabulary(values: npt.NDArray[np.float32], texts: list[str] | None) -> VocabularyLogprobs:
    return VocabularyLogprobs(values, None if texts is None else texts.__getitem__)


@dataclass(frozen=True, eq=False)
class LogprobTable:
    """The log-probabilities that some rows of logits are asked for, on the device of the logits."""

    numbers: Tensor
    """`[rows, 3 + 2 * most]` float64: the sampled token, its rank, its log-probability, the most probable tokens, and
    their log-probabilities. float64 holds ids, ranks and float32 values exactly."""
    counts: Sequence[int]
    """Number of most probable tokens that each row is asked for; -1: the whole vocabulary."""
    whole: Tensor | None
    """`[rows with count -1, vocab_size]` float32; None without such rows."""

    @classmethod
    def of(cls, logits: Tensor, token_ids: Tensor, counts: Sequence[int]) -> LogprobTable:
        """
        Args:
            logits: [rows, vocab_size], unmodified, any float dtype; computed in float32.
            token_ids: [rows] int64, the sampled tokens.
            counts: as the field.
        """
        logprobs = torch.log_softmax(logits.float(), dim=-1)
        sampled = logprobs.gather(1, token_ids[:, None])
        ranks = (logprobs > sampled).sum(dim=1, keepdim=True) + 1
        best = logprobs.topk(min(max(*counts, 0), logits.shape[1]), dim=1)
        parts = (token_ids[:, None], ranks, sampled, best.indices, best.values)
        numbers = torch.cat([part.double() for part in parts], dim=1)
        rows = [row for row, count in enumerate(counts) if count < 0]
        whole = None
        if rows:
            indices = to_device(torch.tensor(rows, device="cpu"), logprobs.device)
            whole = logprobs if len(rows) == len(counts) else logprobs.index_select(0, indices)
        return cls(numbers, counts, whole)

    def entries(self, numbers: npt.NDArray[np.float64], text: TokenText | None) -> list[Mapping[int, Logprob]]:
        """Per row, token id -> log-probability. Rows that ask for the whole vocabulary are read from the device.

        Args:
            numbers: the field of that name on the host.
            text: token id -> text; None without a tokenizer.
        """
        most = (numbers.shape[1] - 3) // 2
        whole = iter(() if self.whole is None else to_host(self.whole))
        result: list[Mapping[int, Logprob]] = []
        for count, (token_id, rank, value, *top) in zip(self.counts, numbers.tolist(), strict=True):
            if count < 0:
                result.append(VocabularyLogprobs(next(whole).copy(), text))
                continue
            count = min(count, most)
            entries = {int(token_id): Logprob(value, int(rank), int(token_id), text)}
            pairs = zip(top[:count], top[most : most + count], strict=True)
            for place, (top_id, top_value) in enumerate(pairs, start=1):
                entries[int(top_id)] = Logprob(top_value, place, int(top_id), text)
            result.append(entries)
        return result
