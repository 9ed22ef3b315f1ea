"""Rows of other engines: how they are run and reported. The engines themselves have an environment of their own."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import latency
from benchmarks.comparison import measure as benchmark
from benchmarks.comparison.rows import PEERS
from benchmarks.models.shapes import SHAPES, random_weights
from benchmarks.peers.models import save_checkpoint
from benchmarks.peers.remote import WORKERS, Remote
from dpn_rt.builders.native import build_engine
from dpn_rt.format.engine_dir import EngineDir, EngineSource, write_engine
from dpn_rt.model.reduction.reduction import NoReduction

STUB = """
import sys
sys.path.insert(0, {workers!r})
from worker import serve

class Engine:
    def __init__(self, layers): self.layers = layers
    def prefill(self, batch, rows): return batch * rows * self.layers
    def step(self): print("this is not a reply")

if len(sys.argv) > 1 and sys.argv[1] == "dies":
    sys.exit(3)
serve({{"first": lambda: Engine(8), "second": lambda: Engine(8)}}, {vision})
"""


def stub(path: Path, vision: str) -> Path:
    """A worker of a peer that answers without any work."""
    file = path / f"stub_{len(list(path.iterdir()))}.py"
    file.write_text(STUB.format(workers=str(WORKERS), vision=vision))
    return file


def test_peers_are_rows_beside_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those without a tower have no time of it, and no ratio to it."""

    def load(subject: str, python: Path, *_: object) -> Remote:
        return Remote(python, str(stub(tmp_path, "None" if subject.startswith("llama.cpp") else "lambda batch: None")))

    monkeypatch.setattr(benchmark, "load_peer", load)
    file = tmp_path / "latency.json"
    arguments = ["--batch", "1", "2", "--repeats", "1", "--tokens", "2", "--subjects", "dpn_rt"]
    latency.main([*arguments, "--peers", sys.executable, "--json", str(file)])
    report, printed = json.loads(file.read_bytes()), capsys.readouterr().out
    found = [(row["subject"], row["batch"]) for row in report["rows"] if row["subject"] in PEERS]
    with_batches = [peer for peer in PEERS if peer.startswith("openvino")]
    assert found == [*((peer, 1) for peer in PEERS), *((peer, 2) for peer in with_batches)]
    assert report["peers"]["openvino int8"]["used"].keys() == {"prefill", "decode_step"}
    own = next(row for row in report["rows"] if row["subject"] == "dpn_rt" and row["routes"] == "222")
    assert own["ratios"]["openvino int8 dense"].keys() == {"vision", "prefill", "time_to_first_token", "decode_step"}
    assert own["ratios"]["llama.cpp q4_0 dense"].keys() == {"prefill", "decode_step"}
    assert "prefill / ov8" in printed and "vision / q8_0" not in printed


def test_a_peer_that_dies_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="ended with 3"):
        Remote(Path(sys.executable), str(stub(tmp_path, "None")), "dies")
    with pytest.raises(SystemExit):
        latency.parse_arguments(["--peers", sys.executable, "--dtype", "float32"])


def test_a_saved_checkpoint_is_the_engines_model(tmp_path: Path) -> None:
    """transformers loads what peers are exported from, and the build makes the same weights of it."""
    model = dataclasses.replace(SHAPES["tiny"].model("bfloat16"), reduction=NoReduction())
    engine = tmp_path / "engine"
    write_engine(engine, model, EngineSource("0" * 64, "synthetic"), random_weights(model))
    save_checkpoint(engine, model, tmp_path / "checkpoint")
    built = build_engine(tmp_path / "checkpoint", tmp_path / "built")
    expected, actual = EngineDir.open(engine).load_weights(), built.load_weights()
    assert all(torch.equal(actual[name], value) for name, value in expected.items())
