"""The former name of `dpn_rt.reference`, kept for code that imports it."""

from __future__ import annotations

from dpn_rt.reference import *  # noqa: F403
from dpn_rt.reference import __all__ as __all__
