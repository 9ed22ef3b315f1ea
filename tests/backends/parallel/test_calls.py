"""Calls arrive as they were sent, whatever their tensors are."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from dpn_rt import LLM
from dpn_rt.backends.parallel.calls import Call
from tests.engine.models import MODEL, write_random_engine


def test_arguments_arrive() -> None:
    matrix = torch.randn(3, 5)
    tensors = [matrix.T, torch.tensor(7), torch.empty(0, 4), torch.tensor([True, False]), matrix.bfloat16(), matrix.T]
    call, sent = Call.of("run", (3, {"tensors": tensors}, np.arange(4), None))
    stage, named, array, nothing = call.unpacked(call.filled_block(sent).clone())
    assert (stage, array.tolist(), nothing) == (3, [0, 1, 2, 3], None)
    for arrived, tensor in zip(named["tensors"], tensors, strict=True):
        assert arrived.dtype == tensor.dtype and torch.equal(arrived, tensor)


@pytest.mark.usefixtures("ranks_in_threads")
def test_a_call_without_rows(tmp_path: Path) -> None:
    """Its tensors have no bytes: either all ranks broadcast them, or none."""
    with closing(LLM(write_random_engine(tmp_path / "e"), tensor_parallel_size=2)) as llm:
        backend = llm.engine.runner.backend
        with torch.inference_mode():
            assert backend.logits(torch.empty(0, MODEL.decoder.hidden_size)).shape == (0, MODEL.decoder.vocab_size)
            assert backend.logits(torch.ones(1, MODEL.decoder.hidden_size)).shape == (1, MODEL.decoder.vocab_size)
