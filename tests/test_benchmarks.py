"""What the benchmarks count and make, never what they time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import latency
from benchmarks.dense_llava import IMAGE_TOKEN, dense_llava
from benchmarks.samples import Samples, paired_ratio
from benchmarks.shapes import NUM_TEXT_ROWS, SHAPES, prompt_token_ids, random_weights
from dpn_rt import flops
from dpn_rt.config import IMAGE_PLACEHOLDER_ID
from dpn_rt.eager import EagerDpn
from dpn_rt.engine_dir import check_model, weight_spec

TINY = SHAPES["tiny"].model("float32")


def test_llava_1b_needs_the_flops_that_its_shape_says() -> None:
    model = SHAPES["llava-1b"].model("bfloat16")
    # q, o: 2048 x 2048; k, v: 2048 x 256; gate, up, down: 2048 x 5632
    layer = 2 * 2048 * 2048 + 2 * 2048 * 256 + 3 * 2048 * 5632
    assert flops.layer_weights(model.decoder) == layer
    rows = flops.stage_rows(model, None, 64)
    assert rows.rows == (640, 640, 640, 640)
    attention = 22 * 2 * 2048 * 640 * 641
    assert flops.prefill_flops(model, rows.rows) == 2 * 22 * layer * 640 + attention + 2 * 32064 * 2048
    assert flops.decode_weight_bytes(model) == 2 * (22 * layer + 32064 * 2048)
    assert flops.kv_row_bytes(model) == 2 * 4 * 64 * 2
    assert flops.kv_rows(model, rows.rows) == 22 * 640


def test_needed_flops_leave_out_what_nobody_reads_in_the_last_layer() -> None:
    model = SHAPES["llava-1b"].model("bfloat16")
    left_out = flops.prefill_flops(model, (640,) * 4) - flops.needed_prefill_flops(model, (640,) * 4)
    # Query rows count as kept: they are computed in one multiplication with keys and values.
    linear = 2 * 639 * (2048 * 2048 + 3 * 2048 * 5632)
    assert left_out == linear + 4 * 2048 * (640 * 641 // 2 - 640)
    assert flops.needed_prefill_flops(model, (1,) * 4) == flops.prefill_flops(model, (1,) * 4)


def test_stage_rows_follow_the_route() -> None:
    model = SHAPES["llava-1.5-7b"].model("bfloat16")
    assert flops.stage_rows(model, (2, 2, 2), 40).rows == (616, 184, 76, 49)
    assert flops.stage_rows(model, (0, 1, 2), 21).visual == (576, 576, 288, 72)
    assert flops.stage_rows(model, (0, 0, 0), 21) == flops.stage_rows(model, None, 21)


def test_flops_equal_those_that_torch_counts() -> None:
    model = EagerDpn.from_weights(TINY, random_weights(TINY))
    embeds = torch.randn(576, TINY.decoder.hidden_size)
    with torch.inference_mode():
        rows, layout = model.embed(prompt_token_ids(TINY), embeds)
        with FlopCounterMode(display=False) as counter:
            hidden, _, trace = model.prefill(rows, layout, (2, 1, 2))
            model.lm_head(hidden[-1:])
    counts = counter.get_flop_counts()["Global"]
    linear = sum(n for op, n in counts.items() if "mm" in str(op))
    stages = flops.stage_rows(TINY, (2, 1, 2), NUM_TEXT_ROWS)
    assert (trace.kv_lengths, trace.visual_tokens) == (stages.rows, stages.visual)
    layers = TINY.pyramid.stage_layers(TINY.decoder.num_layers)
    attention = sum(
        len(stage) * flops.causal_attention(TINY.decoder, n) for stage, n in zip(layers, stages.rows, strict=True)
    )
    router = 3 * 2 * (128 * 32 + 32 * 3)
    assert flops.prefill_flops(TINY, stages.rows) - attention == linear - router


def test_vision_flops_equal_those_that_torch_counts() -> None:
    model = EagerDpn.from_weights(TINY, random_weights(TINY))
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model.encode_image(torch.randn(3, 336, 336))
    counts = counter.get_flop_counts()["Global"]
    counted = sum(n for op, n in counts.items() if "mm" in str(op) or "conv" in str(op))
    assert TINY.vision is not None
    attention = TINY.vision.num_layers * 4 * TINY.vision.hidden_size * 577 * 577
    assert flops.vision_flops(TINY.vision, TINY.decoder.hidden_size) - attention == counted


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_a_valid_model(name: str) -> None:
    model = SHAPES[name].model("bfloat16")
    check_model(model)
    ids = prompt_token_ids(model)
    assert ids.count(IMAGE_PLACEHOLDER_ID) == 1 and len(ids) == NUM_TEXT_ROWS + 1
    assert ids.index(model.prompt.router_token_id) > ids.index(IMAGE_PLACEHOLDER_ID)


def test_random_weights_are_an_engines_and_not_constant() -> None:
    spec = weight_spec(TINY)
    made = dict(random_weights(TINY))
    assert list(made) == list(spec)
    for name, tensor in made.items():
        assert (tuple(tensor.shape), tensor.dtype) == (spec[name].shape, spec[name].dtype)
        assert torch.isfinite(tensor).all()
        assert "norm" in name or 0.015 < tensor.std() < 0.025, name


def test_the_transformers_baseline_and_eager_are_the_same_model() -> None:
    weights = dict(random_weights(TINY))
    dense = dense_llava(TINY, weights)
    eager = EagerDpn.from_weights(TINY, weights.items(), copy=False)
    assert dense.lm_head.weight.data_ptr() == eager.lm_head.weight.data_ptr() == weights["lm_head.weight"].data_ptr()
    pixels = torch.randn(3, 336, 336)
    ids = prompt_token_ids(TINY)
    at = ids.index(IMAGE_PLACEHOLDER_ID)
    repeated = torch.tensor([[*ids[:at], *[IMAGE_TOKEN] * 576, *ids[at + 1 :]]])
    with torch.inference_mode():
        expected = dense(input_ids=repeated, pixel_values=pixels[None]).logits[0]
        # A probability of 1 makes the 1x1 expert do nothing.
        for module in eager.boundaries:
            module.register_forward_hook(lambda _module, args, _out: (args[0], args[1], _out[2]))
        actual = eager(ids, pixels, route=(0, 0, 0)).logits
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def test_latency_reports_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "latency.json"
    arguments = ["--subjects", "transformers", "eager", "--repeats", "1", "--tokens", "2", "--batch", "1", "2"]
    latency.main([*arguments, "--json", str(file)])
    report = json.loads(file.read_text())
    labels = [(row["subject"], row["routes"], row["batch"]) for row in report["rows"]]
    assert labels == [
        ("transformers", "dense", 1),
        ("eager", "222", 1),
        ("transformers", "dense", 2),
        ("eager", "mixed", 2),
    ]
    assert report["rows"][0]["flops_to_dense"] == 1.0
    assert all(row["prefill"]["median"] > 0 for row in report["rows"])
    assert "eager 222 x1" in capsys.readouterr().out


def test_paired_ratios_are_taken_round_by_round() -> None:
    ratio = paired_ratio(Samples([2.0, 8.0, 3.0]), Samples([1.0, 2.0, 3.0]))
    assert ratio.values == [2.0, 4.0, 1.0] and ratio.median == 2.0


def test_unknown_routes_are_refused() -> None:
    for bad in ("22", "223", "2222", "a"):
        with pytest.raises(SystemExit):
            latency.parse_arguments(["--routes", bad])
