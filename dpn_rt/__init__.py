"""Inference runtime for multimodal LLMs that pool visual tokens inside the decoder (Dynamic Pyramid Network)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from dpn_rt.errors import DpnError

if TYPE_CHECKING:
    from dpn_rt.llm import LLM
    from dpn_rt.sampling.params import SamplingParams

# torch reads it at its first allocation: from then on tensors of 2 MB and more are in huge pages, oneDNN's copies of
# weights among them. See device/huge_pages.py.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__all__ = ["LLM", "DpnError", "SamplingParams"]


def __getattr__(name: str) -> Any:
    """Loads `LLM` and `SamplingParams` on first use, so that tools which need neither start fast."""
    if name == "LLM":
        from dpn_rt.llm import LLM

        return LLM
    if name == "SamplingParams":
        from dpn_rt.sampling.params import SamplingParams

        return SamplingParams
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
