"""A build streams: its memory does not grow with the checkpoint. Measured in a separate process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.builders.checkpoints import OriginalCheckpoint
from tests.skips import NOT_LINUX

MB = 1 << 20

MEASURE = """
import json, sys, threading
from dpn_rt.builders.native import build_engine

def resident(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

before = resident("VmRSS")
build_engine(sys.argv[1], sys.argv[2], dtype="float32")
print(json.dumps({"before": before, "peak": resident("VmHWM")}))
"""


def large_checkpoint() -> OriginalCheckpoint:
    """About 300 MB in float16. The float32 engine has 600 MB, and its largest fused weight 34 MB."""
    checkpoint = OriginalCheckpoint()
    checkpoint.config.update(hidden_size=1024, intermediate_size=4096, num_hidden_layers=9, vocab_size=2000)
    checkpoint.config.update(num_attention_heads=8, num_key_value_heads=8)
    del checkpoint.config["pooling"], checkpoint.config["vision_config"]
    shapes = checkpoint.fill(torch.float16).weights
    return OriginalCheckpoint(checkpoint.config, shapes)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason=NOT_LINUX)
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_peak_memory(tmp_path: Path, suffix: str) -> None:
    checkpoint = large_checkpoint()
    path = checkpoint.write(tmp_path / "c", suffix=suffix, shards=4)
    command = [sys.executable, "-c", MEASURE, str(path), str(tmp_path / "e")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    measured = json.loads(result.stdout)
    shard = max(file.stat().st_size for file in path.glob("*-of-*"))
    fused = 2 * 4096 * 1024 * 4
    allowed = 2 * fused + (shard if suffix == "bin" else 0)  # a safetensors shard is never mapped as a whole
    slack = 48 * MB  # a thread pool, the allocator, imports on first use
    grown = measured["peak"] - measured["before"]
    print(
        f"{suffix}: {grown / MB:.0f} MiB grown, {(allowed + slack) / MB:.0f} allowed, {measured['peak'] / MB:.0f} peak"
    )
    assert grown <= allowed + slack
    assert measured["peak"] <= shard + 2 * fused + 500 * 10**6
