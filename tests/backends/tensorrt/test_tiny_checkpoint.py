"""The trained tiny model from picture to text: evaluated networks against the product's own kernels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dpn_rt import LLM, SamplingParams
from dpn_rt.builders.native import build_engine
from tests.backends.tensorrt.engines import evaluated_llm, logprob_error, named_plans
from tests.skips import NO_TENSORRT

pytest.importorskip("tensorrt_rtx_bindings", reason=NO_TENSORRT)

EXAMPLES = Path(__file__).parents[3] / "examples"
PARAMS = SamplingParams(max_tokens=6, temperature=0.0, logprobs=-1, ignore_eos=True)


def test_pictures_and_text_give_what_the_native_backend_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = EXAMPLES / "tiny_dpn/checkpoint"
    build_engine(checkpoint, tmp_path / "native", dtype="float32")
    build_engine(checkpoint, tmp_path / "plans", dtype="float32", make_plans=named_plans)
    native = LLM(tmp_path / "native", device="cpu")
    messages = [
        [{"role": "user", "content": [{"type": "image", "image": str(EXAMPLES / f"images/{name}")}, text]}]
        for name, text in (
            ("scene_1.png", {"type": "text", "text": "What is in the picture?"}),
            ("scene_2.png", {"type": "text", "text": "How many shapes are there?"}),
        )
    ]
    vocab_size = native.model.decoder.vocab_size
    wanted = [native.chat(each, PARAMS) for each in messages]
    on_plans = evaluated_llm(tmp_path / "plans", monkeypatch, reuse_bytes=1 << 24)
    for each, reference in zip(messages, wanted, strict=True):
        for output in (on_plans.chat(each, PARAMS), on_plans.chat(each, PARAMS)):  # the second from the image cache
            output = output[0] if isinstance(output, list) else output
            expected = reference[0] if isinstance(reference, list) else reference
            positions = expected.outputs[0].logprobs or []
            table = torch.tensor([[p[token].logprob for token in range(vocab_size)] for p in positions])
            assert output.pyramid.experts == expected.pyramid.experts
            assert output.pyramid.kv_lengths == expected.pyramid.kv_lengths
            assert output.outputs[0].text == expected.outputs[0].text
            assert logprob_error(output, table.double()) < 1e-3
