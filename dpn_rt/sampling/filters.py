"""Penalties, filters and the draw, each vectorised over rows [num_seqs, vocab_size] of float32 logits.

Top-k and top-p keep the first tokens of a row in the order (logit descending, id ascending), so each of the two is
a count. Breaking ties by id makes the result of a row independent of the other rows. That matters for bfloat16 logits,
which have many ties.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpn_rt import ops

TOP_P_CANDIDATES = (256, 2048)
"""Numbers of best tokens that top-p tries first: they usually hold the mass, and sorting a vocabulary costs more."""

_NUMPY_SORT_FROM = 512
"""From about this many values on, numpy's vectorised partition and sort are faster than torch's top-k on the CPU."""

NO_SOFTMAX = -1
"""Takes the place of the best id in a row that has no softmax: its largest logit is NaN or infinite."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def argmax(logits: Tensor) -> Tensor:
    """Id of the largest logit per row, the lowest id among equal ones: [rows, vocab_size] -> [rows] int64."""
    if logits.device.type == "cpu":
        # numpy's argmax is vectorised: 12 times as fast as torch's on 8 x 32000.
        return torch.from_numpy(logits.float().numpy().argmax(axis=-1))
    return logits.argmax(dim=-1)


def best_ids(logits: Tensor) -> Tensor:
    """`argmax`, but `NO_SOFTMAX` where a row has no softmax: [rows, vocab_size] -> [rows] int64."""
    if logits.is_cuda:
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
        counts: [rows, vocab_size] int32, occurrences in the output.
        repetition, presence, frequency: [rows, 1] float32.
    """
    in_output = counts > 0
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(seen | in_output, repeated, logits)
    return logits - frequency * counts - presence * in_output


def apply_min_p(logits: Tensor, min_p: Tensor) -> Tensor:
    """Logits with -inf for all tokens less probable than `min_p` times the most probable one.

    Args:
        logits: [rows, vocab_size] float32, largest entry of a row 0. min_p: [rows, 1] float32, 0 where off.
    """
    return logits.masked_fill(logits < min_p.log(), -torch.inf)


def apply_top_k_top_p(logits: Tensor, top_k: Tensor, top_p: Tensor, largest_k: int) -> Tensor:
    """Logits with -inf for all tokens outside the top k, then outside the smallest set that holds the mass top_p.

    Args:
        logits: [rows, vocab_size] float32, largest entry of a row 0.
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
    """How many tokens each row keeps, and the smallest kept logit, as far as its `candidates` largest logits tell.

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
    # A token is kept while the mass before it is below the target. This keeps the smallest set that reaches it.
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
    """Logits with -inf for all but the `counts` largest of each row; of equal ones those with lower ids are kept.

    Args:
        logits: [rows, vocab_size]. counts: [rows, 1] int64. smallest: [rows, 1], the counts-th largest logit.
    """
    keep = logits >= smallest
    if not _can_look(logits) or bool((keep.sum(dim=1, keepdim=True) > counts).any()):
        above = logits > smallest
        room = counts - above.sum(dim=1, keepdim=True)
        keep = above | (keep & ((keep & ~above).cumsum(dim=1) <= room))
    return logits.masked_fill(~keep, -torch.inf)


def _can_look(tensor: Tensor) -> bool:
    """Whether a shortcut may depend on a tensor's values. Reading them from a GPU would wait for the GPU."""
    return tensor.device.type == "cpu"


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """One token per row by inverting the cumulative distribution in vocabulary order.

    In vocabulary order a change in the last bit of a logit (as another batch size causes in a matrix product) moves the
    borders between tokens by as little. In order of probability it could swap two tokens.

    Args:
        logits: [rows, vocab_size] float32, largest entry of a row 0, dropped tokens -inf.
        uniforms: [rows] float64 in [0, 1).

    Returns:
        [rows] int64.
    """
    cumulative = logits.exp().cumsum(dim=1, dtype=torch.float64)
    total = cumulative[:, -1:]
    # The largest uniform times the total may round up to the total, and no entry is greater than that.
    target = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=logits.shape[1] - 1)


def stream_key(seed: int, index: int) -> int:
    """Key of the random numbers for completion `index` of a request with this seed."""
    # In arrays, because numpy warns when a scalar wraps around.
    seeds, indices = np.array([[seed % 2**64], [index]], dtype=np.uint64)
    return int(_mix(_mix(seeds + _GOLDEN) + indices * _GOLDEN)[0])


def uniforms(keys: npt.NDArray[np.uint64], positions: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """Random numbers in [0, 1), each a function of its key and position alone (SplitMix64 at that index).

    A sequence therefore draws the same numbers in any batch, and again after a preemption.

    Args:
        keys: [rows], of `stream_key`.
        positions: [rows], index of the token in its output.
    """
    bits = _mix(keys + (positions + np.uint64(1)) * _GOLDEN)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    state = (state ^ (state >> np.uint64(30))) * _MIX[0]
    state = (state ^ (state >> np.uint64(27))) * _MIX[1]
    return state ^ (state >> np.uint64(31))
