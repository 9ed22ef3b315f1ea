"""Chooses tokens from logits, for a whole batch at once."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpn_rt import ops
from dpn_rt.device.transfer import to_device, to_host, upload
from dpn_rt.sampling.filters import (
    NO_SOFTMAX,
    apply_min_p,
    apply_penalties,
    apply_top_k_top_p,
    argmax,
    best_ids,
    draw,
    stream_key,
    uniforms,
)
from dpn_rt.sampling.logprobs import Logprob, LogprobTable, TokenText
from dpn_rt.sampling.params import SamplingParams


class SamplingState:
    """The sampler's state of one sequence. It is kept, not recomputed, when the sequence is preempted."""

    __slots__ = (
        "_counts",
        "_seen",
        "can_run_ahead",
        "forbidden_early",
        "key",
        "needs_only_argmax",
        "num_output",
        "params",
    )

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: npt.NDArray[np.int64],
        vocab_size: int,
        eos_token_ids: Sequence[int] = (),
        index: int = 0,
    ) -> None:
        """
        Args:
            params: of the request.
            prompt_token_ids: [num_prompt_ids] int64; may include negative placeholders.
            vocab_size: of the logits.
            eos_token_ids: ids that end the sequence, unless `ignore_eos`.
            index: of the completion among the request's n completions; each draws its own random numbers.
        """
        self.params = params
        self.num_output = 0
        seed = secrets.randbits(63) if params.seed is None else params.seed
        self.key = stream_key(seed, index)
        ends = {*params.stop_ids, *(() if params.ignore_eos else eos_token_ids)}
        early = sorted(token_id for token_id in ends if token_id < vocab_size)
        is_bounded = bool(params.min_tokens and early)
        self.forbidden_early = torch.tensor(early, dtype=torch.int64, device="cpu") if is_bounded else None
        self._counts: npt.NDArray[np.int32] | None = None
        self._seen: npt.NDArray[np.bool_] | None = None
        if params.has_penalties:
            self._counts = np.zeros(vocab_size, dtype=np.int32)
            self._seen = np.zeros(vocab_size, dtype=np.bool_)
            self._seen[prompt_token_ids[prompt_token_ids >= 0]] = True
        self.can_run_ahead = not params.has_penalties and params.logprobs is None and not params.min_tokens
        """Whether the next token can be chosen without the host and before the last token is known."""
        self.needs_only_argmax = params.is_greedy and self.can_run_ahead
        """Whether the next token is the argmax of the logits."""

    def append(self, token_id: int) -> None:
        """Records a sampled token."""
        self.num_output += 1
        if self._counts is not None:
            self._counts[token_id] += 1

    @property
    def seen(self) -> npt.NDArray[np.bool_]:
        """[vocab_size] bool, whether each token occurs in the prompt. Only for requests with penalties."""
        assert self._seen is not None
        return self._seen

    @property
    def counts(self) -> npt.NDArray[np.int32]:
        """[vocab_size] int32, occurrences of each token in the output. Only for requests with penalties."""
        assert self._counts is not None
        return self._counts


@dataclass(frozen=True)
class SampledTokens:
    """One token per sequence."""

    token_ids: list[int]
    logprobs: list[Mapping[int, Logprob] | None] | None
    """One entry per sequence, None for a sequence that asks for none; None when no sequence asks for any."""
    finite: list[bool]
    """Per sequence, whether its logits have a softmax. If not, its token is meaningless."""


def sampled_tokens(
    ids: npt.NDArray[np.int64], logprobs: list[Mapping[int, Logprob] | None] | None = None
) -> SampledTokens:
    """Converts the result of `Sampler.choose`, after it was copied to the host.

    Args:
        ids: `[2, num_seqs]`, as `Sampler.choose` returns them.
        logprobs: as in `SampledTokens`.
    """
    token_ids, best = ids.tolist()
    finite = [token_id != NO_SOFTMAX for token_id in best]
    return SampledTokens([max(token_id, 0) for token_id in token_ids], logprobs, finite)


class Sampler:
    """Chooses one token per row of logits. It has no state; the state of each sequence is in its `SamplingState`."""

    def __init__(self, token_text: TokenText | None = None) -> None:
        """Args: token_text: gives the text for `Logprob.decoded_token`; None without a tokenizer."""
        self._token_text = token_text

    def sample(self, logits: Tensor, states: Sequence[SamplingState], best: Tensor | None = None) -> SampledTokens:
        """The next token of every sequence. The caller appends it to the sequence's state.

        Args:
            logits: [num_seqs, vocab_size], any float dtype and device, not modified.
            states: one per row.
            best: [num_seqs] int64, `best_ids` of the logits; None: it is computed here.
        """
        ids = self.choose(logits, states, best)
        wanted = {row: count for row, state in enumerate(states) if (count := state.params.logprobs) is not None}
        if not wanted:
            return sampled_tokens(to_host(ids))
        table = _logprob_table(logits, ids[0], wanted)
        # One transfer of both; float64 holds ids exactly.
        both = to_host(torch.cat((ids.double().flatten(), table.numbers.flatten())))
        entries = table.entries(both[ids.numel() :].reshape(table.numbers.shape), self._token_text)
        logprobs: list[Mapping[int, Logprob] | None] = [None] * len(states)
        for row, of_row in zip(wanted, entries, strict=True):
            logprobs[row] = of_row
        return sampled_tokens(both[: ids.numel()].reshape(ids.shape).astype(np.int64), logprobs)

    def choose(
        self, logits: Tensor, states: Sequence[SamplingState], best: Tensor | None = None, num_unread: int = 0
    ) -> Tensor:
        """As `sample`, but without log-probabilities, and without waiting for a device.

        Args:
            logits: [num_seqs, vocab_size], any float dtype and device, not modified.
            states: one per row.
            best: [num_seqs] int64, `best_ids` of the logits; None: it is computed here.
            num_unread: number of tokens of each sequence that are chosen already but not in the states yet. If it is
                above 0, `can_run_ahead` must be true of all states.

        Returns:
            `[2, num_seqs]` int64 on the device of the logits: the tokens, and `best`.
        """
        best = best_ids(logits) if best is None else best
        if all(state.needs_only_argmax for state in states):
            return torch.stack((best, best))
        return torch.stack((self._choose(logits, states, num_unread), best))

    def _choose(self, logits: Tensor, states: Sequence[SamplingState], num_unread: int) -> Tensor:
        scores = _penalize(_forbid_early_ends(logits.float(), states), states)
        random_rows = [row for row, state in enumerate(states) if not state.params.is_greedy]
        if not random_rows:
            return argmax(scores)
        if len(random_rows) == len(states):
            return _draw_rows(scores, states, num_unread)
        rows = to_device(torch.tensor(random_rows, device="cpu"), scores.device)
        drawn = _draw_rows(scores.index_select(0, rows), [states[row] for row in random_rows], num_unread)
        return argmax(scores).index_copy_(0, rows, drawn)


def _logprob_table(logits: Tensor, token_ids: Tensor, wanted: Mapping[int, int]) -> LogprobTable:
    """Of the rows of logits that are asked for log-probabilities: row -> number of most probable tokens."""
    if len(wanted) < len(logits):
        rows = to_device(torch.tensor(list(wanted), device="cpu"), logits.device)
        logits, token_ids = logits.index_select(0, rows), token_ids.index_select(0, rows)
    return LogprobTable.of(logits, token_ids, list(wanted.values()))


def _forbid_early_ends(logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """Logits with -inf for ids that would end a sequence that has fewer than `min_tokens` tokens."""
    rows, ids = [], []
    for row, state in enumerate(states):
        if state.forbidden_early is not None and state.num_output < state.params.min_tokens:
            rows.append(torch.full_like(state.forbidden_early, row))
            ids.append(state.forbidden_early)
    if not rows:
        return logits
    indices = to_device(torch.stack((torch.cat(rows), torch.cat(ids))), logits.device)
    forbidden = torch.full((), -torch.inf, device=logits.device)
    return logits.index_put((indices[0], indices[1]), forbidden)


def _penalize(logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """Logits with the penalties of each sequence that has some."""
    rows = [row for row, state in enumerate(states) if state.params.has_penalties]
    if not rows:
        return logits
    params = [states[row].params for row in rows]
    strengths = torch.tensor(
        [[p.repetition_penalty, p.presence_penalty, p.frequency_penalty] for p in params],
        dtype=torch.float32,
        device="cpu",
    )
    device = logits.device
    repetition, presence, frequency = (to_device(strengths, device)[:, i, None] for i in range(3))
    seen = to_device(torch.from_numpy(np.stack([states[row].seen for row in rows])), device)
    counts = to_device(torch.from_numpy(np.stack([states[row].counts for row in rows])), device)
    indices = to_device(torch.tensor(rows, device="cpu"), device)
    penalized = apply_penalties(logits.index_select(0, indices), seen, counts, repetition, presence, frequency)
    return logits.index_copy(0, indices, penalized)


def draw_without_sorting(logits: Tensor, states: Sequence[SamplingState], num_unread: int = 0) -> Tensor:
    """As `_draw_rows`, with one kernel. The host reads no values, for which it would have to wait on a GPU."""
    params = [state.params for state in states]
    inputs = upload(
        logits.device,
        np.array([p.temperature for p in params], dtype=np.float32),
        np.array([min(p.top_k, logits.shape[1]) for p in params], dtype=np.int32),
        np.array([p.top_p for p in params], dtype=np.float64),
        np.array([p.min_p for p in params], dtype=np.float32),
        np.array([state.key for state in states], dtype=np.uint64).view(np.int64),
        np.array([state.num_output + num_unread for state in states], dtype=np.int64),
    )
    return ops.sample(logits, *inputs)[0].long()


def _draw_rows(logits: Tensor, states: Sequence[SamplingState], num_unread: int = 0) -> Tensor:
    """One random token per row of `logits` [rows, vocab_size] float32: [rows] int64."""
    if logits.is_cuda:
        return draw_without_sorting(logits, states, num_unread)
    vocab_size = logits.shape[1]
    params = [state.params for state in states]
    temperatures = torch.tensor([[p.temperature] for p in params], dtype=torch.float32, device="cpu")
    # The largest entry becomes 0, so that the division by a small temperature cannot give +inf.
    logits = (logits - logits.amax(dim=1, keepdim=True)) / temperatures
    if any(p.min_p > 0 for p in params):
        min_p = torch.tensor([[p.min_p] for p in params], dtype=torch.float32, device="cpu")
        logits = apply_min_p(logits, min_p)
    if any(p.top_k > 0 or p.top_p < 1 for p in params):
        top_k = [min(p.top_k, vocab_size) if p.top_k > 0 else vocab_size for p in params]
        top_p = torch.tensor([[p.top_p] for p in params], dtype=torch.float64, device="cpu")
        logits = apply_top_k_top_p(logits, torch.tensor(top_k, device="cpu")[:, None], top_p, max(top_k))
    keys = np.array([state.key for state in states], dtype=np.uint64)
    positions = np.array([state.num_output + num_unread for state in states], dtype=np.uint64)
    return draw(logits, torch.from_numpy(uniforms(keys, positions)))
