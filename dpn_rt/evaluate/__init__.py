"""Benchmarks: questions answered by an engine, scored by the published rules, and reported.

`python -m dpn_rt.evaluate run|score|convert|report`; from Python `run`, `score` and `to_dataframe`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpn_rt.evaluate.api import run, score
    from dpn_rt.evaluate.dataframe import to_dataframe

__all__ = ["run", "score", "to_dataframe"]


def __getattr__(name: str) -> Any:
    """Loads a function on first use, so that `--help` does not wait for torch."""
    if name in ("run", "score"):
        from dpn_rt.evaluate import api

        return getattr(api, name)
    if name == "to_dataframe":
        from dpn_rt.evaluate.dataframe import to_dataframe

        return to_dataframe
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
