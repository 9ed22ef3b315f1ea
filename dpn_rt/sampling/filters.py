"""Penalties, filters and random draws, each vectorised over rows [num_seqs, vocab_size] of float32 logits.

Top-k and top-p order the tokens of a row by logit, descending, and equal logits by id, ascending. Each of them keeps
some number of the first tokens. Ordering ties by id makes the result of a row independent of the other rows, which
matters for bfloat16 logits: they have many ties.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpn_rt import ops

TOP_P_CANDIDATES = (256, 2048)
"""Numbers of best tokens that top-p tries first. They usually hold enough probability, and sorting all costs more."""

_NUMPY_SORT_FROM = 512
"""From about this many values on, numpy's vectorised partition and sort are faster than torch's top-k on the CPU."""

NO_SOFTMAX = -1
"""Replaces the best id in a row that has no softmax, because its largest logit is NaN or infinite."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def argmax(logits: Tensor) -> Tensor:
    """Id of the largest logit per row, and of equal ones the lowest id: [rows, vocab_size] -> [rows] int64."""
    if logits.device.type == "cpu":
        # numpy's argmax is vectorised: it is 12 times as fast as torch's on 8 x 32000.
        return torch.from_numpy(logits.float().numpy().argmax(axis=-1))
    return logits.argmax(dim=-1)


def best_ids(logits: Tensor) -> Tensor:
    """`argmax`, but `NO_SOFTMAX` where a row has no softmax: [rows, vocab_size] -> [rows] int64."""
    if logits.is_cuda or (logits.dtype in (torch.float32, torch.bfloat16) and logits.stride(-1) == 1):
        return ops.sample_greedy(logits)
    best = argmax(logits)
    # NaN counts as the largest value, so a softmax exists exactly where the largest logit is finite.
    is_finite = logits.gather(1, best[:, None])[:, 0].isfinite()
    return best.masked_fill(~is_finite, NO_SOFTMAX)


def apply_penalties(
    logits: Tensor, seen: Tensor, counts: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor
) -> Tensor:
    """Logits with repetition, presence and frequency penalties.

    Args:
        logits: [rows, vocab_size] float32.
        seen: [rows, vocab_size] bool, whether the token occurs in the prompt.
        counts: [rows, vocab_size] int32, occurrences of the token in the output.
        repetition, presence, frequency: [rows, 1] float32.

    Returns:
        [rows, vocab_size] float32.
    """
    in_output = counts > 0
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(seen | in_output, repeated, logits)
    return logits - frequency * counts - presence * in_output


def apply_min_p(logits: Tensor, min_p: Tensor) -> Tensor:
    """Logits with -inf for all tokens that are less probable than `min_p` times the most probable one.

    Args:
        logits: [rows, vocab_size] float32; the largest entry of a row is 0.
        min_p: [rows, 1] float32, 0 where off.
    """
    return logits.masked_fill(logits < min_p.log(), -torch.inf)


def apply_top_k_top_p(logits: Tensor, top_k: Tensor, top_p: Tensor, largest_k: int) -> Tensor:
    """Logits with -inf for tokens outside the top k, and for those of the k outside the smallest set that holds top_p.

    Args:
        logits: [rows, vocab_size] float32; the largest entry of a row is 0.
        top_k: [rows, 1] int64, vocab_size where off.
        largest_k: the maximum of top_k.
        top_p: [rows, 1] float64, 1 where off.
    """
    vocab_size = logits.shape[1]
    if largest_k < vocab_size:
        return _keep_largest(logits, *_kept(logits, top_k, top_p, largest_k))
    unlimited = top_k == vocab_size
    off = unlimited & (top_p >= 1)
    for candidates in TOP_P_CANDIDATES if _can_look(logits) else ():
        if candidates < vocab_size:
            counts, smallest = _kept(logits, top_k, top_p, candidates)
            seen_enough = (counts < candidates) & (unlimited | (top_k <= candidates))
            if bool((seen_enough | off).all()):
                return _keep_largest(logits, counts.masked_fill(off, vocab_size), smallest.masked_fill(off, -torch.inf))
    return _keep_largest(logits, *_kept(logits, top_k, top_p, vocab_size))


def _kept(logits: Tensor, top_k: Tensor, top_p: Tensor, candidates: int) -> tuple[Tensor, Tensor]:
    """How many tokens each row keeps and the smallest logit kept, found among its `candidates` largest logits.

    Exact for rows whose top-k is at most `candidates`, and for rows without top-k that keep fewer than `candidates`.

    Returns:
        counts [rows, 1] int64; smallest [rows, 1] float32.
    """
    best = _largest(logits, candidates)
    probs = best.exp().double()
    cumulative = probs.cumsum(dim=1)
    mass = cumulative.gather(1, top_k.clamp(max=candidates) - 1)
    if candidates < logits.shape[1]:
        everything = logits.exp().sum(dim=1, keepdim=True, dtype=torch.float64)
        mass = torch.where(top_k <= candidates, mass, everything)
    # A token is kept while the sum of the tokens before it is below the target. So the kept set is the smallest one
    # that reaches the target.
    in_top_p = ((cumulative - probs) < top_p * mass).sum(dim=1, keepdim=True).clamp(min=1)
    counts = torch.minimum(torch.where(top_p < 1, in_top_p, candidates), top_k)
    return counts, best.gather(1, counts - 1)


def _largest(logits: Tensor, count: int) -> Tensor:
    """The `count` largest values of each row in descending order: [rows, vocab_size] -> [rows, count]."""
    if logits.device.type != "cpu" or count < _NUMPY_SORT_FROM:
        return logits.topk(count, dim=1).values
    negated = -logits.numpy()
    if count < negated.shape[1]:
        negated = np.partition(negated, count - 1, axis=1)[:, :count]
    return -torch.from_numpy(np.sort(negated, axis=1))


def _keep_largest(logits: Tensor, counts: Tensor, smallest: Tensor) -> Tensor:
    """Logits with -inf for all but the `counts` largest of each row. Among equal logits, lower ids are kept.

    Args:
        logits: [rows, vocab_size].
        counts: [rows, 1] int64.
        smallest: [rows, 1], the counts-th largest logit.
    """
    keep = logits >= smallest
    if not _can_look(logits) or bool((keep.sum(dim=1, keepdim=True) > counts).any()):
        above = logits > smallest
        room = counts - above.sum(dim=1, keepdim=True)
        keep = above | (keep & ((keep & ~above).cumsum(dim=1) <= room))
    return logits.masked_fill(~keep, -torch.inf)


def _can_look(tensor: Tensor) -> bool:
    """Whether the host may read a tensor's values to take a shortcut; not on a GPU, where it would have to wait."""
    return tensor.device.type == "cpu"


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one token per row by inverting the cumulative distribution in vocabulary order.

    In a matrix product another batch size can change the last bit of a logit. In vocabulary order such a change moves
    the borders between tokens only a little. In order of probability it could swap two tokens.

    Args:
        logits: [rows, vocab_size] float32; the largest entry of a row is 0, dropped tokens are -inf.
        uniforms: [rows] float64 in [0, 1).

    Returns:
        [rows] int64.
    """
    cumulative = logits.exp().cumsum(dim=1, dtype=torch.float64)
    total = cumulative[:, -1:]
    # uniform * total may round up to the total, and searchsorted would find no entry above that.
    target = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=logits.shape[1] - 1)


def stream_key(seed: int, index: int) -> int:
    """Key of the random numbers for completion `index` of a request with this seed, an unsigned 64-bit integer."""
    # numpy warns when a scalar wraps around, but not when an array does.
    seeds, indices = np.array([[seed % 2**64], [index]], dtype=np.uint64)
    return int(_mix(_mix(seeds + _GOLDEN) + indices * _GOLDEN)[0])


def uniforms(keys: npt.NDArray[np.uint64], positions: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """Random numbers in [0, 1) that depend only on key and position: SplitMix64 with seed `key`, at index `position`.

    So a sequence draws the same numbers in any batch, and again after a preemption.

    Args:
        keys: [rows] uint64, of `stream_key`.
        positions: [rows] uint64, index of the token in its output.

    Returns:
        [rows] float64.
    """
    bits = _mix(keys + (positions + np.uint64(1)) * _GOLDEN)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    state = (state ^ (state >> np.uint64(30))) * _MIX[0]
    state = (state ^ (state >> np.uint64(27))) * _MIX[1]
    return state ^ (state >> np.uint64(31))
