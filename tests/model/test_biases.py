"""Biases of the attention's projections: qkv and o, each alone and both together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dpn_rt import LLM
from dpn_rt.errors import ConfigError
from dpn_rt.format.engine_dir import EngineDir
from dpn_rt.reference import EagerDpn
from tests.engine.models import random_prompt, with_decoder, write_random_engine
from tests.model.test_precision import eager_logprobs, logprobs

ALL = [(False, False), (True, False), (False, True), (True, True)]


@pytest.mark.parametrize(("qkv_bias", "o_bias"), ALL)
def test_the_runtime_equals_the_reference(qkv_bias: bool, o_bias: bool, tmp_path: Path) -> None:
    path = write_random_engine(tmp_path / "engine", with_decoder(qkv_bias=qkv_bias, o_bias=o_bias))
    weights = EngineDir.open(path).load_weights()
    assert ("layers.0.qkv.bias" in weights, "layers.6.o.bias" in weights) == (qkv_bias, o_bias)
    llm, eager = LLM(path), EagerDpn.from_engine(path)
    assert {name: tensor.shape for name, tensor in eager.canonical_weights()} == {
        name: tensor.shape for name, tensor in weights.items()
    }
    prompt = random_prompt(np.random.default_rng(torch.initial_seed()), (8, 8))
    expected = eager_logprobs(eager, prompt["prompt_token_ids"], prompt["multi_modal_data"]["image_embeds"])
    torch.testing.assert_close(logprobs(llm, prompt), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("qkv_bias", "o_bias"), ALL[1:3])
def test_a_checkpoint_cannot_say_one_alone(qkv_bias: bool, o_bias: bool, tmp_path: Path) -> None:
    path = write_random_engine(tmp_path / "engine", with_decoder(qkv_bias=qkv_bias, o_bias=o_bias))
    with pytest.raises(ConfigError, match=f"qkv_bias {qkv_bias}, o_bias {o_bias}: expected both or none"):
        EagerDpn.from_engine(path).save_checkpoint(tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()
