"""The counts and files of the benchmarks. No test asserts a time."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import document, latency, ops, serve_reduced
from benchmarks.comparison.measure import measure
from benchmarks.comparison.rows import plan
from benchmarks.measuring.clock import Stopwatch, replayable, seconds
from benchmarks.measuring.samples import Samples, paired_ratio
from benchmarks.models.dense_llava import IMAGE_TOKEN, dense_llava
from benchmarks.models.shapes import NUM_TEXT_ROWS, SHAPES, prompt_token_ids, random_weights
from benchmarks.op_cases import cases as ops_cases
from dpn_rt.format import flops
from dpn_rt.format.config import IMAGE_PLACEHOLDER_ID
from dpn_rt.format.engine_dir import check_model, weight_spec
from dpn_rt.model.reduction.reduction import NoReduction
from dpn_rt.reference import EagerDpn
from tests.fake_streams import FakeStream
from tests.skips import GPU_PRESENT

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


def test_needed_flops_leave_out_rows_that_the_last_layer_does_not_need() -> None:
    model = SHAPES["llava-1b"].model("bfloat16")
    left_out = flops.prefill_flops(model, (640,) * 4) - flops.needed_prefill_flops(model, (640,) * 4)
    # Query rows are counted: they are computed in one multiplication with keys and values.
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
    # Older torch counts attention as batched products (bmm), which are not linear layers.
    linear = sum(n for op, n in counts.items() if "mm" in str(op) and "bmm" not in str(op))
    stages = flops.stage_rows(TINY, (2, 1, 2), NUM_TEXT_ROWS)
    assert (trace.kv_lengths, trace.visual_tokens) == (stages.rows, stages.visual)
    layers = TINY.stage_layers
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
    assert flops.vision_flops(TINY) - attention == counted


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
    subjects = ["transformers", "eager", "dpn_rt"]
    arguments = ["--subjects", *subjects, "--repeats", "1", "--tokens", "2", "--batch", "1", "2", "--quantize", "int8"]
    latency.main([*arguments, "--json", str(file)])
    report = json.loads(file.read_text())
    labels = [(row["subject"], row["routes"], row["batch"]) for row in report["rows"]]
    assert labels == [
        ("transformers", "dense", 1),
        ("eager", "222", 1),
        ("dpn_rt", "dense", 1),
        ("dpn_rt", "222", 1),
        ("dpn_rt int8", "dense", 1),
        ("dpn_rt int8", "222", 1),
        ("transformers", "dense", 2),
        ("eager", "mixed", 2),
        ("dpn_rt", "dense", 2),
        ("dpn_rt", "222", 2),
        ("dpn_rt", "mixed", 2),
        ("dpn_rt int8", "dense", 2),
        ("dpn_rt int8", "222", 2),
        ("dpn_rt int8", "mixed", 2),
    ]
    assert all(row["boundary"]["median"] > 0 for row in report["rows"] if row["subject"] != "transformers")
    for row in report["rows"]:
        assert ("between_stages" in row) == row["subject"].startswith("dpn_rt")
        if row["subject"].startswith("dpn_rt"):  # routing and pooling are between stages
            assert row["between_stages"]["median"] >= row["boundary"]["median"]
    assert report["rows"][0]["flops_to_dense"] == 1.0
    assert all(row["prefill"]["median"] > 0 for row in report["rows"])
    assert "eager 222 x1" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason=GPU_PRESENT)
def test_latency_says_why_there_are_no_plans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "latency.json"
    arguments = ["--subjects", "dpn_rt", "--tensorrt", "--repeats", "1", "--tokens", "1", "--batch", "1"]
    with pytest.raises(SystemExit):
        latency.main(arguments)
    assert "rows of TensorRT plans need --device cuda" in capsys.readouterr().err
    options = latency.parse_arguments([*arguments, "--device", "cuda", "--json", str(file)])
    options.device = "cpu"  # there is no GPU to time the others on
    file.write_text(json.dumps(measure(options)))
    assert {row["subject"] for row in json.loads(file.read_text())["rows"]} == {"dpn_rt"}
    assert "no rows of TensorRT plans, which do not work here: plans run on GPUs alone" in capsys.readouterr().err


def test_paired_ratios_are_taken_round_by_round() -> None:
    ratio = paired_ratio(Samples([2.0, 8.0, 3.0]), Samples([1.0, 2.0, 3.0]))
    assert ratio.values == [2.0, 4.0, 1.0] and ratio.median == 2.0


def test_unknown_routes_are_refused() -> None:
    for bad in ("22", "223", "2222", "a"):
        with pytest.raises(SystemExit):
            latency.parse_arguments(["--routes", bad])


def latency_result() -> dict[str, Any]:
    def spread(value: float) -> dict[str, float]:
        return {"median": value, "min": value, "max": value}

    row = {
        "subject": "dpn_rt", "routes": "222", "batch": 1, "prefill_flops": 4e12, "computed_prefill_flops": 4e12,
        "flops_to_dense": 0.4, "kv_bytes": 1e6, "ratios": {}, "tokens_per_second": spread(300.0),
        "prefill_flops_per_second": spread(6e14),
    }  # fmt: skip
    times = {"vision": 0.004, "prefill": 0.007, "time_to_first_token": 0.011, "decode_step": 0.0035}
    row |= {name: spread(value) for name, value in times.items()}
    gpu = {"name": "GPU", "capability": "9.0", "driver": "1.2", "cuda": "13.0"}
    machine = {
        "cpu": "CPU",
        "device": "GPU",
        "threads": 1,
        "gpu": gpu,
        "torch": "2",
        "transformers": "5",
        "python": "3",
    }
    return {
        "shape": "llava-1.5-7b", "dtype": "bfloat16", "machine": machine, "rounds": 1, "decode_weight_bytes": 13e9,
        "prompt": {"visual_rows": 576, "text_rows": 64},
        "limits": {"gemm_flops_per_second": spread(8e14), "read_bytes_per_second": spread(4e12)},
        "rows": [row, row | {"subject": "eager", "prefill": spread(0.03), "computed_prefill_flops": 9e12}],
    }  # fmt: skip


def kernels_result() -> dict[str, Any]:
    numbers = {name: {"median": 1e-5, "min": 1e-5, "max": 1e-5} for name in ("ours", "torch", "speedup", "of_limit")}
    return {"kernels": [{"name": "route", "shape": "32 sequences", "bytes": 1, "flops": 0, **numbers}]}


def test_the_document_gets_tables_and_a_plot_in_place_of_the_old_ones(tmp_path: Path) -> None:
    larger = latency_result() | {"shape": "llava-1.5-13b"}
    for name, value in (("latency", latency_result()), ("larger", larger), ("ops", kernels_result())):
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    page = tmp_path / "performance.md"
    page.write_text(f"# Above\n\n{document.BEGIN}\nold\n{document.END}\n\n# Below\n")
    files = [f"{tmp_path}/{name}.json" for name in ("latency", "larger")]
    arguments = ["--latency", *files, f"--ops={tmp_path}/ops.json", f"--docs={tmp_path}"]
    document.main(arguments)
    written = page.read_text()
    assert written.startswith("# Above\n") and written.endswith("\n# Below\n")
    assert "old" not in written
    assert "GPU (capability 9.0, driver 1.2), CUDA 13.0" in written
    assert "dpn_rt 222 x1" in written and "32 sequences" in written
    for result in (latency_result(), larger):
        assert document.plot_name(result) in written
        assert (tmp_path / document.plot_name(result)).stat().st_size > 1000
    document.main(arguments)
    assert page.read_text() == written, "a second run changes nothing"


def test_a_document_without_marks_gets_them_at_its_end_and_half_a_mark_is_refused() -> None:
    assert document.with_section("# Page\n", "text") == "# Page\n\ntext\n"
    with pytest.raises(ValueError, match="without"):
        document.with_section(f"a {document.BEGIN} b", "text")


def test_missing_results_are_told_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        document.main([f"--latency={tmp_path}/none.json"])
    assert "none.json is not there" in capsys.readouterr().err


def test_the_limit_is_the_products_or_the_weights() -> None:
    result = latency_result()
    assert document.least_seconds(result, 8e14) == pytest.approx(1.0)
    assert document.least_seconds(result, 1.0) == pytest.approx(13e9 / 4e12)


def test_mixes_hold_what_their_names_say() -> None:
    options = argparse.Namespace(
        batch=[10], routes=[], subjects=["dpn_rt"], mix="40-40-20", reduce=[], quantize=[], peers=None
    )
    (_, mixed) = plan(options)
    assert (mixed.label, len(mixed.routes)) == ("mixed", 10)
    assert [mixed.routes.count((kernel,) * 3) for kernel in (2, 1, 0)] == [4, 4, 2]


def test_a_stopwatch_sums_what_runs_within_it() -> None:
    watch = Stopwatch("cpu")
    assert watch(lambda: 5) == 5
    first = watch.seconds
    watch(lambda: sum(range(1000)))
    assert 0 < first < watch.seconds
    assert seconds(lambda: None) >= 0
    assert replayable(run := lambda: None, "cpu") is run


def test_a_graph_is_warmed_up_on_inputs_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream of its own does not wait by itself: kernels would read indices that are still being made."""
    events: list[str] = []
    inputs, warm_up, graph = (FakeStream(name, events) for name in ("inputs", "warm-up", "graph"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: warm_up)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: inputs)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "graph", lambda _: graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: argparse.Namespace(replay=None))
    replayable(lambda: events.append("runs"), "cuda")
    assert events == [
        "warm-up waits for inputs", "on warm-up", "runs", "off warm-up", "inputs waits for warm-up",
        "on graph", "runs", "off graph",
    ]  # fmt: skip


def test_ops_report_names_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "ops.json"
    monkeypatch.setattr(ops, "CPU", dataclasses.replace(ops.CPU, limit_bytes=1 << 20, cold_bytes=1 << 20, gemm_rows=2))
    monkeypatch.setattr(ops, "call_cost", dict)
    monkeypatch.setattr("sys.argv", ["ops.py", "--rounds", "1", "--only", "rms_norm", "--json", str(file)])
    ops.main()
    result = json.loads(file.read_text())
    assert [row["name"] for row in result["kernels"]] == ["rms_norm", "add_rms_norm"]
    assert result["machine"]["gpu"] is None and result["machine"]["torch"] == torch.__version__


def test_every_kernel_has_its_row_on_both_devices() -> None:
    names = [{case.name for case in ops.all_cases(shape, torch.bfloat16, linear)} for shape, linear in
             ((ops.LLAVA_1B, True), (ops.LLAVA_7B, False))]  # fmt: skip
    assert names[0] - names[1] == {"linear"} and not names[1] - names[0]
    assert {"route", "pool", "attention causal", "attention_decode", "sample", "rope_store"} <= names[1]


@pytest.mark.parametrize("lengths", [(63,), (63,) * 3, (63, 20, 9) * 2], ids=str)
def test_attention_is_compared_with_the_same_of_torch(lengths: tuple[int, ...]) -> None:
    with torch.inference_mode():
        case = ops_cases.prefill_case("", lengths, ops_cases.Heads(4, 2, 16), True, torch.float32)
        ours, torchs = case.make()
        actual, parts = ours(), torchs()
    expected = torch.cat([part.transpose(1, 2).flatten(0, 1).flatten(1) for part in parts])
    torch.testing.assert_close(actual, expected)
    assert case.flops == 2 * sum(n * n for n in lengths) * 4 * 16


def test_quantised_products_are_compared_with_products_of_the_same_size() -> None:
    shapes = dataclasses.replace(ops.LLAVA_1B, hidden=48, ffn=136, rows=9)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.inference_mode():
            cases = [(case.name, *(run() for run in case.make())) for case in ops.quantized_cases(shapes, dtype)]
        assert {name for name, *_ in cases} == {"linear_int8", "linear_int4"}
        assert sorted({len(actual) for _, actual, _ in cases}) == [1, 8, 9]
        assert all((actual.shape, actual.dtype) == (expected.shape, dtype) for _, actual, expected in cases)


def test_reduction_is_compared_with_the_same_of_torch() -> None:
    shapes = dataclasses.replace(ops.LLAVA_1B, num_seqs=3)
    with torch.inference_mode():
        cases = [(case.name, *(run() for run in case.make())) for case in ops.reduction_cases(shapes, torch.float32)]
    assert [name for name, *_ in cases] == ["last_row_scores"] * 4 + ["segmented_top_k", "kept_rows"]
    for name, actual, expected in cases:
        if name == "last_row_scores":  # torch has other keys
            assert actual.shape == expected.flatten().shape and (actual.sum(), expected.sum()) > (0.5, 0.5)
        else:
            assert torch.equal(actual, expected.flatten().to(actual.dtype))


def test_serve_reduced_compares_with_the_same_server(tmp_path: Path) -> None:
    path, spec = tmp_path / "result.json", "fastv:k=2,ratio=0.5"
    options = ["--shape", "tiny", "--reduce", spec, "--clients", "2", "--max-tokens", "2", "--json", str(path)]
    assert serve_reduced.main(options) == 0
    dense, reduced = json.loads(path.read_text())["loads"]
    assert (dense["reduce"], reduced["reduce"]) == ("none", spec)
    assert dense["errors"] == reduced["errors"] == 0 and dense["speed_to_dense"]["median"] == dense["bound"] == 1
    assert dense["flops"]["vision"] == reduced["flops"]["vision"] and 1 < reduced["bound"] < 2
    assert dense["flops"]["prefill"] == flops.prefill_flops(
        dataclasses.replace(TINY, reduction=NoReduction()), [576 + json.loads(path.read_text())["text_rows"]]
    )
