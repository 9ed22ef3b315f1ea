"""The compiled kernels, as one typed function each. No other package imports the extension.

Activations are packed rows `[num_tokens, hidden_size]` in float32 or bfloat16, with float32 accumulation; index tensors
are contiguous int32. Every function checks shape, dtype, device, layout and content of its arguments before it writes
anything, and raises `KernelArgumentError` with the kernel, the argument, the expected and the actual value.

A function runs on the device of its tensors, the CPU or one CUDA device. On a CUDA device it is queued on torch's
current stream and also takes float16; attention takes only bfloat16 and float16 there. The host never reads the values
of a CUDA tensor, so they are not checked: an index out of range is undefined behaviour. A launch that fails raises
`RuntimeError` with the name of the op.
"""

from dpn_rt.ops.activation import activation, silu_mul
from dpn_rt.ops.advance_layout import Advance, DeviceLayout, advance_layout
from dpn_rt.ops.attention import CUDA_HEAD_DIMS, HEAD_DIMS, attention, attention_decode, attention_extend
from dpn_rt.ops.depthwise_conv import depthwise_conv
from dpn_rt.ops.embedding import embedding
from dpn_rt.ops.isa import available_cpu_isas, cpu_isa, tune_cpu_isa, tuned_cpu_isa
from dpn_rt.ops.kept_rows import kept_rows
from dpn_rt.ops.last_row_scores import last_row_scores, last_row_scores_paged
from dpn_rt.ops.linear import linear
from dpn_rt.ops.linear_int4 import linear_int4
from dpn_rt.ops.linear_int8 import linear_int8
from dpn_rt.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from dpn_rt.ops.pool import pool
from dpn_rt.ops.quantize import dequantize, quantize
from dpn_rt.ops.rope import rope_store
from dpn_rt.ops.route import route
from dpn_rt.ops.sample import sample, sample_greedy
from dpn_rt.ops.segmented_top_k import segmented_top_k

__all__ = [
    "CUDA_HEAD_DIMS",
    "HEAD_DIMS",
    "Advance",
    "DeviceLayout",
    "activation",
    "add_layer_norm",
    "add_rms_norm",
    "advance_layout",
    "attention",
    "attention_decode",
    "attention_extend",
    "available_cpu_isas",
    "cpu_isa",
    "depthwise_conv",
    "dequantize",
    "embedding",
    "kept_rows",
    "last_row_scores",
    "last_row_scores_paged",
    "layer_norm",
    "linear",
    "linear_int4",
    "linear_int8",
    "pool",
    "quantize",
    "rms_norm",
    "rope_store",
    "route",
    "sample",
    "sample_greedy",
    "segmented_top_k",
    "silu_mul",
    "tune_cpu_isa",
    "tuned_cpu_isa",
]
