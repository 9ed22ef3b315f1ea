"""A stage as a TensorRT-LLM model: hidden states in, hidden states or logits out. Not yet run with the real package."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from dpn_rt.backends.tensorrt_llm.contract import Surface


def make_stage_model(surface: Surface, config: Any, is_last: bool) -> Any:
    """A model of the stage's layers. Its input is the output of the previous stage.

    Args:
        surface: the package's API; the model's classes derive from the package's.
        config: `LLaMAConfig` of one stage.
        is_last: whether it is the last stage, which includes final norm and output layer.
    """
    module: Any = surface.Module
    causal_model: Any = surface.DecoderModelForCausalLM

    class StageModel(module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layers = surface.DecoderLayerList(surface.LLaMADecoderLayer, config)
            if is_last:
                self.ln_f = surface.RmsNorm(
                    normalized_shape=config.hidden_size, eps=config.norm_epsilon, dtype=config.dtype
                )

        def forward(self, hidden_states: Any, kv_cache_params: Any, attention_params: Any) -> Any:
            hidden_states, presents = self.layers.forward(
                hidden_states,
                use_cache=True,
                attention_mask=None,
                kv_cache_params=kv_cache_params,
                attention_params=attention_params,
            )
            return (self.ln_f(hidden_states) if is_last else hidden_states), presents

    class StageModelForCausalLM(causal_model):  # type: ignore[misc]
        def __init__(self) -> None:
            head = None
            if is_last:
                head = surface.ColumnLinear(
                    in_features=config.hidden_size, out_features=config.vocab_size, bias=False, dtype=config.dtype
                )
            super().__init__(config, StageModel(), head)

        def forward(
            self, hidden_states: Any, kv_cache_params: Any, attention_params: Any, last_token_ids: Any = None
        ) -> Any:
            attention_params = surface.Attention.fill_attention_params(self, attention_params)
            hidden_states, presents = self.transformer.forward(hidden_states, kv_cache_params, attention_params)
            if is_last:
                last = surface.gather_last_token_logits(hidden_states, last_token_ids, True)
                result = self.lm_head(last)
                result.mark_output("logits", config.logits_dtype)
            else:
                result = hidden_states
                result.mark_output("hidden_states_output", config.dtype)
            for layer, present in enumerate(presents):
                present.mark_output(f"present_key_value_{layer}", config.kv_dtype)
            return result, presents

        def prepare_inputs(self, **limits: Any) -> dict[str, Any]:
            return _inputs(surface, self, config, is_last, limits)

    return StageModelForCausalLM()


def _inputs(surface: Surface, model: Any, config: Any, is_last: bool, limits: dict[str, Any]) -> dict[str, Any]:
    """The network's inputs by the names of `forward`'s parameters, with packed rows, contiguous caches, one profile."""
    num_profiles, ranges = surface.GenerationMixin.get_profiles_ranges(
        max_batch_size=limits["max_batch_size"],
        max_beam_width=1,
        max_input_len=limits["max_input_len"],
        max_num_tokens=limits["max_num_tokens"],
        max_draft_len=0,
        opt_batch_size=limits.get("opt_batch_size"),
        opt_num_tokens=limits.get("opt_num_tokens"),
        enable_ctx_gen_opt_profiles=False,
        multiple_profiles=False,
        kv_cache_type=surface.KVCacheType.CONTINUOUS,
    )
    hidden_states = surface.Tensor(
        name="hidden_states_input",
        dtype=surface.str_dtype_to_trt(config.dtype),
        shape=[-1, config.hidden_size],
        dim_range=OrderedDict(num_tokens=ranges["num_tokens_range"], hidden_size=[config.hidden_size] * num_profiles),
    )
    inputs = {"hidden_states": hidden_states, **_attention_inputs(surface, model, config, limits, num_profiles)}
    if is_last:
        inputs["last_token_ids"] = surface.Tensor(
            name="last_token_ids",
            dtype=surface.str_dtype_to_trt("int32"),
            shape=[-1],
            dim_range=OrderedDict(batch_size_last_token_ids=ranges["bbd_range"]),
        )
    return inputs


def _attention_inputs(
    surface: Surface, model: Any, config: Any, limits: dict[str, Any], num_profiles: int
) -> dict[str, Any]:
    """`kv_cache_params` and `attention_params`, which hold the inputs of the attention plugin."""
    attention = model.prepare_attention_inputs(
        max_batch_size=limits["max_batch_size"],
        max_beam_width=1,
        max_input_len=limits["max_input_len"],
        max_seq_len=limits["max_seq_len"],
        num_kv_heads=config.num_key_value_heads,
        head_size=config.head_size,
        num_layers=config.num_hidden_layers,
        kv_dtype=surface.str_dtype_to_trt(config.kv_dtype),
        kv_cache_type=surface.KVCacheType.CONTINUOUS,
        num_profiles=num_profiles,
        remove_input_padding=True,
        use_gpt_attention_plugin=True,
        mapping=config.mapping,
        opt_batch_size=limits.get("opt_batch_size"),
    )
    return {
        "kv_cache_params": surface.KeyValueCacheParams(
            past_key_value=attention["past_key_value"],
            host_past_key_value_lengths=attention["host_past_key_value_lengths"],
            host_max_attention_window_sizes=attention["host_max_attention_window_sizes"],
            host_sink_token_length=attention["host_sink_token_length"],
            cache_indirection=attention["cache_indirection"],
        ),
        "attention_params": surface.AttentionParams(
            sequence_length=attention["sequence_length"],
            context_lengths=attention["context_lengths"],
            host_context_lengths=attention["host_context_lengths"],
            max_context_length=limits["max_input_len"],
            host_request_types=attention["host_request_types"],
            host_runtime_perf_knobs=attention["host_runtime_perf_knobs"],
            host_context_progress=attention["host_context_progress"],
        ),
    }
