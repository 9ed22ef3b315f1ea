"""Log-probabilities of sampled tokens, computed from the unmodified logits, as mappings token id -> `Logprob`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpn_rt.device.transfer import to_device

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
        return VocabularyLogprobs, (self.values_array,)


def gather_logprobs(
    logits: Tensor, token_ids: Tensor, counts: Sequence[int], text: TokenText | None
) -> list[Mapping[int, Logprob]]:
    """Log-probabilities of each row's sampled token and of its `counts[row]` most probable tokens.

    Args:
        logits: [rows, vocab_size], unmodified, any float dtype; computed in float32.
        token_ids: [rows] int64, the sampled tokens.
        counts: number of most probable tokens per row; -1: the whole vocabulary.
        text: token id -> text; None without a tokenizer.

    Returns:
        Per row, token id -> log-probability.
    """
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    sampled = logprobs.gather(1, token_ids[:, None])
    ranks = (logprobs > sampled).sum(dim=1, keepdim=True) + 1
    most = min(max(*counts, 0), logits.shape[1])
    best = logprobs.topk(most, dim=1)
    # One transfer; float64 holds ids, ranks and float32 values exactly.
    parts = (token_ids[:, None], ranks, sampled, best.indices, best.values)
    rows = torch.cat([part.double() for part in parts], dim=1).tolist()
    whole = [row for row, count in enumerate(counts) if count < 0]
    whole_logprobs = dict(zip(whole, _rows_on_host(logprobs, whole), strict=True))
    result: list[Mapping[int, Logprob]] = []
    for row, (token_id, rank, value, *top) in enumerate(rows):
        if row in whole_logprobs:
            result.append(VocabularyLogprobs(whole_logprobs[row], text))
            continue
        count = min(counts[row], most)
        entries = {int(token_id): Logprob(value, int(rank), int(token_id), text)}
        pairs = zip(top[:count], top[most : most + count], strict=True)
        for place, (top_id, top_value) in enumerate(pairs, start=1):
            entries[int(top_id)] = Logprob(top_value, place, int(top_id), text)
        result.append(entries)
    return result


def _rows_on_host(logprobs: Tensor, rows: list[int]) -> list[npt.NDArray[np.float32]]:
    """Copies of the given rows, `[vocab_size]` each."""
    if not rows:
        return []
    if len(rows) < len(logprobs):
        logprobs = logprobs.index_select(0, to_device(torch.tensor(rows), logprobs.device))
    return [row.copy() for row in logprobs.cpu().numpy()]
