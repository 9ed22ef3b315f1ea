from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from dpn_rt import SamplingParams
from dpn_rt.builders.native import build_engine

CHECKPOINT = Path(__file__).parents[2] / "examples" / "tiny_dpn" / "checkpoint"
PARAMS = SamplingParams(temperature=0, max_tokens=6, logprobs=0)


@pytest.fixture(scope="package")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_engine(CHECKPOINT, tmp_path_factory.mktemp("batch") / "tiny", dtype="float32").path


def png(image: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
