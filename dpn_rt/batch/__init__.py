"""Answers to any number of questions in tables, by engines on the machines of a Ray cluster (Ray Data)."""

from __future__ import annotations

from dpn_rt.batch.parquet import answer_parquet, read_answers
from dpn_rt.batch.processor import Processor, build_processor

__all__ = ["Processor", "answer_parquet", "build_processor", "read_answers"]
