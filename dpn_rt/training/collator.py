"""Samples -> a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dpn_rt.reference.training import IGNORE_LABEL
from dpn_rt.training.samples import Sample

PADDING_ID = 0
"""Never read: the model runs samples without padding."""


def collate(samples: Sequence[Sample]) -> dict[str, Any]:
    """A batch as `EagerDpn.forward` takes it.

    Returns:
        `input_ids`, `labels` and `attention_mask` [num_samples, most ids], padded on the right, and `pixel_values`: a
        list with [3, side, side], or None, for each sample.
    """

    def padded(rows: Sequence[Tensor], value: int) -> Tensor:
        return pad_sequence(list(rows), batch_first=True, padding_value=value)

    ids = [sample["input_ids"] for sample in samples]
    return {
        "input_ids": padded(ids, PADDING_ID),
        "labels": padded([sample["labels"] for sample in samples], IGNORE_LABEL),
        "attention_mask": padded([row.new_ones(len(row)) for row in ids], 0),
        "pixel_values": [sample.get("pixel_values") for sample in samples],
    }
