"""The columns that a table of questions gets."""

from __future__ import annotations

import pyarrow as pa

ANSWER_SCHEMA = pa.schema(
    [
        ("answer", pa.string()),
        ("finish_reason", pa.string()),
        ("num_tokens", pa.int64()),
        ("logprobs", pa.list_(pa.float64())),  # of the answer's tokens
        ("cumulative_logprob", pa.float64()),
        ("route", pa.list_(pa.int64())),  # expert per boundary
        ("reduction", pa.string()),
        ("visual_tokens", pa.list_(pa.int64())),  # per stage
        ("prefill_flops", pa.int64()),
        ("dense_prefill_flops", pa.int64()),
        ("error", pa.string()),  # why there is no answer
    ]
)
"""They have types of their own, so that files of failures alone fit to the others."""
