"""Grouped-query attention (several query heads per key head) against transformers' own model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dpn_rt import SamplingParams
from dpn_rt.model.reduction.reduction import NoReduction
from tests.backends.tensorrt.engines import evaluated_llm, limits_of, logprob_error, write_plan_engine
from tests.engine.models import MODEL, with_decoder
from tests.skips import NO_TENSORRT

pytest.importorskip("tensorrt_rtx_bindings", reason=NO_TENSORRT)

LAYERS = 3
NUM_TOKENS = 4


def transformers_model(kv_heads: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.15)
    return model


def canonical(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    source = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    result = {
        "embed_tokens.weight": source["model.embed_tokens.weight"],
        "norm.weight": source["model.norm.weight"],
        "lm_head.weight": source["lm_head.weight"],
    }
    for layer in range(LAYERS):
        old, new = f"model.layers.{layer}.", f"layers.{layer}."
        result[f"{new}input_norm.weight"] = source[f"{old}input_layernorm.weight"]
        result[f"{new}post_norm.weight"] = source[f"{old}post_attention_layernorm.weight"]
        result[f"{new}qkv.weight"] = torch.cat([source[f"{old}self_attn.{x}_proj.weight"] for x in "qkv"])
        result[f"{new}o.weight"] = source[f"{old}self_attn.o_proj.weight"]
        result[f"{new}gate_up.weight"] = torch.cat([source[f"{old}mlp.{x}_proj.weight"] for x in ("gate", "up")])
        result[f"{new}down.weight"] = source[f"{old}mlp.down_proj.weight"]
    return result


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_logits_equal_those_of_transformers(kv_heads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = transformers_model(kv_heads)
    dense = dataclasses.replace(MODEL, reduction=NoReduction(), vision=None, projector=None)
    model = with_decoder(dense, num_layers=LAYERS, num_kv_heads=kv_heads)
    model = dataclasses.replace(model, prompt=dataclasses.replace(model.prompt, router_token_id=None))
    path = write_plan_engine(tmp_path / "engine", model, canonical(reference), limits_of(model, rows=64))
    llm = evaluated_llm(path, monkeypatch)
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, logprobs=-1, ignore_eos=True)
    prompts = [torch.randint(3, 99, (length,)).tolist() for length in (3, 17, 9)]
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = torch.tensor([[*prompt, *output.outputs[0].token_ids[:-1]]])
        with torch.no_grad():
            logits = reference(ids).logits[0, len(prompt) - 1 :].double()
        assert logprob_error(output, torch.log_softmax(logits, -1)) < 1e-3
