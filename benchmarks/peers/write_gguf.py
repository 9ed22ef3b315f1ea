"""The decoder of a Hugging Face checkpoint as GGUF: `python write_gguf.py CHECKPOINT OUTPUT Q8_0|Q4_0`.

Matrices are quantised as llama.cpp does; its own quantisation keeps the output layer in more bits, and so does this
(Q8_0).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType, quants
from safetensors import safe_open

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def tensors(checkpoint: Path) -> Iterator[tuple[str, np.ndarray]]:
    """All tensors of the decoder, in float32."""
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (no mapping)
                if "vision" not in name and "projector" not in name:
                    yield name, opened.get_tensor(name).float().numpy()


def rotary_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys in the order of llama.cpp's rotary embedding, which turns neighbours."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def main(checkpoint: Path, output: Path, kind: GGMLQuantizationType) -> None:
    config = json.loads((checkpoint / "config.json").read_text())["text_config"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(output, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{i}>" for i in range(config["vocab_size"])])
    writer.add_token_scores([0.0] * config["vocab_size"])
    writer.add_token_types([gguf.TokenType.NORMAL] * config["vocab_size"])
    for name, value in tensors(checkpoint):
        module = name.removesuffix(".weight").split("layers.")[-1]
        if module.endswith("lm_head"):
            target, this = "output", GGMLQuantizationType.Q8_0
        elif module.endswith("embed_tokens"):
            target, this = "token_embd", kind
        elif "layers." not in name:
            target, this = "output_norm", GGMLQuantizationType.F32
        else:
            layer, _, part = module.partition(".")
            target, this = f"blk.{layer}.{NAMES[part]}", kind if value.ndim == 2 else GGMLQuantizationType.F32
            if part in ("self_attn.q_proj", "self_attn.k_proj"):
                value = rotary_order(value, heads if "q_proj" in part else kv_heads)
        writer.add_tensor(f"{target}.weight", quants.quantize(value, this), raw_dtype=this)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), GGMLQuantizationType[sys.argv[3]])
