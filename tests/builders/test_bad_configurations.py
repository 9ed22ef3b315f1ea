"""Every fault of a config.json has a message that names it, and no engine is left."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpn_rt.errors import ConfigError
from tests.builders.checkpoints import OriginalCheckpoint
from tests.builders.refusals import message_of


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "llava_mixtral"},
            "model_type: expected one of llava_llama, llava, llava_mistral, llava_qwen, llava_qwen2, llava_qwen3; "
            "got 'llava_mixtral', nearest to llava_mistral",
        ),
        ({"model_type": "gpt2"}, "llava_qwen3; got 'gpt2'"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
            "rope_parameters.full_attention: expected one rule for all layers, got an object of its own",
        ),
        ({"model_type": 3}, "model_type: expected str, got 3"),
        ({"hidden_act": "gelu"}, "hidden_act: expected one of silu, swish; got 'gelu'"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "32"}, "hidden_size: expected int, got '32'"),
        ({"hidden_size": 33}, "hidden_size 33 is not a multiple of num_attention_heads 4"),
        ({"num_attention_heads": 0}, "num_attention_heads 0"),
        ({"num_hidden_layers": -1}, "num_layers must be positive, got -1"),
        (
            {"num_key_value_heads": 3},
            "num_heads 4 is not a multiple of num_kv_heads 3 (in config.json num_attention_heads and",
        ),
        ({"head_dim": 7}, "head_dim is 7, expected a multiple of 8 from 8 to 256"),
        ({"head_dim": 20}, "head_dim is 20, expected a multiple of 8 from 8 to 256"),
        ({"head_dim": 264}, "head_dim is 264, expected a multiple of 8 from 8 to 256"),
        ({"mlp_bias": True}, "mlp_bias is not supported"),
        ({"rope_scaling": {"type": "spiral"}}, "rope_scaling.rope_type: expected one of default, linear"),
        ({"rope_scaling": {"type": "linear"}}, "'factor' is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0.0}}, "gives the frequencies"),
        ({"rope_scaling": {"type": "yarn", "factor": "x"}}, "rope scaling {"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"eos_token_id": "</s>"}, "eos_token_id: expected a token id or a list of them, got '</s>'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config.quant_method is missing"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end is not supported"),
        (
            {"mm_projector_type": "mlp3x_gelu"},
            "mm_projector_type: expected one of mlp2x_gelu, linear; got 'mlp3x_gelu'",
        ),
        ({"mm_vision_select_feature": "cls"}, "mm_vision_select_feature: expected one of patch, cls_patch; got 'cls'"),
        ({"mm_vision_select_feature": "cls_patch"}, "pooling needs a grid of visual tokens"),
        ({"mm_vision_select_layer": 4}, "vision select layer 4 does not exist: a tower of 3 layers"),
        ({"image_aspect_ratio": "wide"}, "image_aspect_ratio: expected one of pad, square, anyres; got 'wide'"),
        ({"router_token_id": None}, "use_special_token is set, but neither the tokenizer"),
        ({"router_token_id": 120}, "router_token_id 120 is outside the vocabulary of 120"),
        ({"pooling": []}, "pooling: expected an object, got []"),
    ],
)
def test_configurations(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    checkpoint = OriginalCheckpoint().fill()
    checkpoint.config.update(changes)
    assert message in message_of(checkpoint, tmp_path, ConfigError)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pooling_type": "magic"}, "pooling_type: expected one of adaptive, static, random; got 'magic'"),
        ({"pooling_type": None}, "pooling_type is missing"),
        ({"pooling_function": "median"}, "pooling_function: expected one of max, avg, conv; got 'median'"),
        ({"router_version": "v3"}, "router_version: expected one of v1, v2; got 'v3'"),
        ({"pooling_location": "pre"}, "pooling_location: expected one of post; got 'pre'"),
        ({"prepooling": True}, "prepooling is not supported"),
        ({"pooling_layers": 3}, "pooling_layers: expected a list of objects, got 3"),
        ({"pooling_layers": [{"kernel_size": [[1, 1]]}]}, "index is missing"),
    ],
)
def test_pooling_objects(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    checkpoint = OriginalCheckpoint().fill()
    checkpoint.pooling.update(changes)
    assert message in message_of(checkpoint, tmp_path, ConfigError)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"index": 4}, "pooling layer 4 does not exist: the decoder has layers 0 to 3"),
        ({"index": -1}, "pooling layer -1 does not exist"),
        ({"index": 3}, "pooling layer 3 is the last layer"),
        ({"index": 2}, "pooling layers must rise without repetition, got [2, 2]"),
        ({"index": 1.5}, "index: expected int, got 1.5"),
        ({"kernel_size": [2, 2]}, "kernel_size: expected a list of [height, width], got [2, 2]"),
        ({"kernel_size": []}, "kernel_size: expected a list"),
        ({"kernel_size": [[1, 1], [2, 2], [2, True]]}, "kernel_size: expected a list"),
        ({"stride": [[1, 1], [1, 2], [1, 1]]}, "stride must equal kernel_size [[1, 1], [1, 2], [2, 2]], got [[1, 1]"),
        ({"kernel_size": [[1, 1]] * 9999, "stride": [[2, 2]] * 9999}, "[1, ..., got [[2, 2], "),
        ({"kernel_size": [[1, 1], [0, 2], [2, 2]], "stride": None}, "kernels[1][0] must be positive, got 0"),
        ({"kernel_size": [[1, 1], [1, 2], [8, 8]], "stride": None}, "kernel [8, 8] does not fit the visual grid (4x4)"),
    ],
)
def test_pooling_layers(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    checkpoint = OriginalCheckpoint().fill()
    checkpoint.pooling["pooling_layers"][0].update(changes)
    assert message in message_of(checkpoint, tmp_path, ConfigError)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "dinov2"}, "model_type: expected one of clip_vision_model, siglip_vision_model; got 'dinov2'"),
        ({"image_size": [28, 56]}, "image_size: only square sizes are supported, got [28, 56]"),
        ({"patch_size": {"height": 7, "width": 7}}, "patch_size: only square sizes are supported"),
        ({"hidden_act": "relu"}, "hidden_act: expected one of quick_gelu, gelu, gelu_pytorch_tanh; got 'relu'"),
        ({"num_channels": 4}, "num_channels: expected 3, got 4"),
        ({"num_attention_heads": 5}, "vision hidden_size 24 is not a multiple of its num_heads 5"),
        ({"patch_size": 0}, "vision patch_size must be positive, got 0"),
    ],
)
def test_vision_configurations(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    checkpoint = OriginalCheckpoint().fill()
    checkpoint.config["vision_config"].update(changes)
    assert message in message_of(checkpoint, tmp_path, ConfigError)
