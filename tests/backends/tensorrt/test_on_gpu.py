"""Plans on this machine's GPU against the product's own kernels on the CPU. These tests have not been run yet."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from dpn_rt import LLM, SamplingParams
from dpn_rt.builders.tensorrt.plans import build_plans
from dpn_rt.errors import ConfigError
from dpn_rt.format.config import ModelConfig
from dpn_rt.format.engine_dir import EngineSource, write_engine
from dpn_rt.format.plans import BuiltPlans, PlanLimits
from dpn_rt.format.weight_spec import weight_spec
from tests.backends.tensorrt.engines import logprob_error
from tests.engine.models import MODEL, random_images, random_prompt, random_weights, write_random_engine
from tests.skips import NO_GPU, NO_TENSORRT, UNSUPPORTED_BY_GPU

pytest.importorskip("tensorrt_rtx_bindings", reason=NO_TENSORRT)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)]

BOUND = 0.1
"""Largest difference between log-probabilities of two bfloat16 computations, which round differently."""


def plans_for_this_gpu(model: ModelConfig, limits: PlanLimits) -> BuiltPlans:
    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    try:
        return build_plans(model, "rtx", [capability], limits)
    except ConfigError as error:
        if "cannot build for" not in str(error):
            raise
        pytest.skip(UNSUPPORTED_BY_GPU)  # TensorRT-RTX does not build for SM90


def test_plans_give_what_the_native_backend_gives(tmp_path: Path) -> None:
    model = dataclasses.replace(MODEL, dtype="bfloat16")
    native = LLM(write_random_engine(tmp_path / "native", model), device="cpu")
    limits = PlanLimits(4, 2, (128,) * 4)
    weights = dict(random_weights(model))
    ordered = [(name, weights[name]) for name in weight_spec(model)]
    plans = plans_for_this_gpu(model, limits)
    write_engine(tmp_path / "plans", model, EngineSource("0" * 64, "synthetic"), ordered, plans=plans)
    on_plans = LLM(tmp_path / "plans")
    params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=-1, ignore_eos=True)
    random = np.random.default_rng(torch.initial_seed())
    prompts = [random_prompt(random, grid) | ({"route": [2, 0, 1]} if grid else {}) for grid in ((6, 6), None, (4, 5))]
    wanted = native.generate(prompts, params, use_tqdm=False)
    for output, reference in zip(on_plans.generate(prompts, params, use_tqdm=False), wanted, strict=True):
        position = reference.outputs[0].logprobs[0]  # type: ignore[index]
        expected = torch.tensor([[position[token].logprob for token in range(model.decoder.vocab_size)]])
        assert logprob_error(output, expected.double()) < BOUND
    images = random_images(3)
    encoders = (llm.engine.runner.images.encoder for llm in (on_plans, native))
    pairs = zip(*(encoder.encode(images) for encoder in encoders if encoder is not None), strict=True)
    for found, encoded in pairs:
        torch.testing.assert_close(found.rows.cpu().float(), encoded.rows.float(), atol=BOUND, rtol=BOUND)
