"""One image of 1024 pixels takes less than 300 MB beside the weights. Measured in a separate process."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.skips import NOT_LINUX

MB = 10**6

# The published channels; fewer blocks, since a block's memory is used again by the next one.
MEASURE = """
import json, sys
import torch
from benchmarks.measuring.memory import peak_memory
from benchmarks.models.shapes import random_weights
from dpn_rt.model.vision.encoder import load_encoder
from dpn_rt.model.vision.hr.config import FastConfig, HrConfig
from dpn_rt.model.vision.hr.convnext_config import ConvNextConfig
from dpn_rt.model.vision.projector import ProjectorConfig

dims = tuple(int(dim) for dim in sys.argv[1].split(","))
fast = FastConfig(1024, 4096, 4, 16, 448, 14, 1e-5, "quick_gelu", "patch")
vision = HrConfig(1024, ConvNextConfig((1, 1, 1, 1), dims, 1e-6), fast, True, False)
projector = ProjectorConfig("mlp2x_gelu", 1024)
specs = dict(vision.weight_specs(torch.bfloat16)) | dict(projector.weight_specs(1024, torch.bfloat16))
weights = {name: torch.randn(spec.shape, dtype=torch.bfloat16) * 0.02 for name, spec in specs.items()}
with torch.inference_mode():
    encoder = load_encoder(vision, projector, weights, prepack=False)
    torch.nn.functional.linear(torch.ones(64, 64, dtype=torch.bfloat16), torch.ones(64, 64, dtype=torch.bfloat16))
    pixels = torch.randn(1, 3, 1024, 1024)
    with peak_memory() as memory:
        rows = encoder.forward((pixels,))
assert rows.isfinite().all()
print(json.dumps(memory.extra))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason=NOT_LINUX)
@pytest.mark.parametrize("dims", [(192, 384, 768, 1536), (384, 768, 1536, 3072)], ids=["large", "xxlarge"])
def test_peak_memory(dims: tuple[int, ...]) -> None:
    command = [sys.executable, "-c", MEASURE, ",".join(map(str, dims))]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    extra = json.loads(result.stdout)
    print(f"{extra / MB:.0f} MB")
    assert extra < 300 * MB
