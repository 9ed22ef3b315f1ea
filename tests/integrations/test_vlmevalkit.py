"""The model of VLMEvalKit gives the answers of `LLM.chat`; its package has a stand-in here."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dpn_rt import LLM, SamplingParams
from dpn_rt.errors import ConfigError, ImageError, RequestError
from examples.tiny_dpn.data import sample

SCENES = [sample("test", number).image for number in range(2)]
TEXT = "What color is the background?"
GREEDY = SamplingParams(temperature=0, max_tokens=8)


def expected(llm: LLM, *parts: Any) -> str:
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts
    ]
    return llm.chat([{"role": "user", "content": content}], GREEDY)[0].outputs[0].text


@pytest.fixture
def model(vlmevalkit: ModuleType, engine_dir: Path) -> Any:
    return vlmevalkit.DpnRt(engine_dir, max_new_tokens=8)


def test_messages_keep_the_order_of_their_parts(model: Any, llm: LLM, tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{number}.png") for number in range(2)]
    for path, scene in zip(paths, SCENES, strict=True):
        scene.save(path)
    first, second = ({"type": "image", "value": path} for path in paths)
    text = {"type": "text", "value": TEXT}
    assert model.generate([first, text], dataset="MMBench") == expected(llm, SCENES[0], TEXT)
    assert model.generate([text, first, second]) == expected(llm, TEXT, *SCENES)
    assert model.generate([text]) == expected(llm, TEXT)
    assert model.generate([{"type": "image", "value": SCENES[1]}, text]) == expected(llm, SCENES[1], TEXT)
    assert model.INTERLEAVE


def test_what_is_refused(model: Any, vlmevalkit: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="a part of type 'video': expected text or image"):
        model.generate_inner([{"type": "video", "value": "a.mp4"}])
    with pytest.raises(ImageError, match="no such file"):
        model.generate_inner([{"type": "image", "value": str(tmp_path / "none.png")}])
    with pytest.raises(ConfigError, match="DpnRt has no argument 'model_path': expected engine, device, reduce"):
        vlmevalkit.DpnRt(model_path="x")
