"""Sampling of one row in plain float64 Python, by the definitions of the parameters, independent of the sampler."""

from __future__ import annotations

import math
from collections import Counter

from dpn_rt.sampling.params import SamplingParams


def penalized(logits: list[float], prompt: list[int], output: list[int], params: SamplingParams) -> list[float]:
    counts, seen = Counter(output), {*prompt, *output}
    result = []
    for token_id, logit in enumerate(logits):
        if token_id in seen:
            logit = logit / params.repetition_penalty if logit > 0 else logit * params.repetition_penalty
        logit -= params.frequency_penalty * counts[token_id]
        logit -= params.presence_penalty * (token_id in counts)
        result.append(logit)
    return result


def distribution(logits: list[float], params: SamplingParams) -> list[float]:
    """Probability of each token after temperature, min-p, top-k and top-p."""
    top = max(logits)
    weights = [math.exp((logit - top) / params.temperature) for logit in logits]
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    kept = [i for i in order if weights[i] >= params.min_p * weights[order[0]]]
    if params.top_k > 0:
        kept = kept[: params.top_k]
    if params.top_p < 1:
        total, mass, nucleus = sum(weights[i] for i in kept), 0.0, []
        for i in kept:
            nucleus.append(i)
            mass += weights[i]
            if mass >= params.top_p * total:
                break
        kept = nucleus
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in set(kept) else 0.0 for i in range(len(logits))]
