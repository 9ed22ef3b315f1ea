"""Inference runtime for multimodal LLMs that pool visual tokens inside the decoder (Dynamic Pyramid Network)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dpn_rt.errors import DpnError

if TYPE_CHECKING:
    from dpn_rt.llm import LLM
    from dpn_rt.sampling.params import SamplingParams

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
