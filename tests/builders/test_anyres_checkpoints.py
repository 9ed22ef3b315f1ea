"""Checkpoints whose images come in tiles: both layouts, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dpn_rt import LLM
from dpn_rt.builders.native import build_engine
from dpn_rt.errors import ConfigError, DpnError, ImageError, RequestError
from dpn_rt.format.engine_dir import EngineDir
from dpn_rt.model.vision.anyres.config import AnyresConfig
from tests.builders.checkpoints import OriginalCheckpoint
from tests.model.test_anyres_parity import save_anyres


def original(**changes: Any) -> OriginalCheckpoint:
    checkpoint = OriginalCheckpoint()
    del checkpoint.config["pooling"]
    side = checkpoint.config["vision_config"]["image_size"]
    checkpoint.config |= {
        "image_aspect_ratio": "anyres",
        "mm_patch_merge_type": "spatial_unpad",
        "image_grid_pinpoints": [[side, 2 * side], [2 * side, 2 * side]],
        **changes,
    }
    return checkpoint


def test_the_original_layout(tmp_path: Path) -> None:
    checkpoint = original().fill()
    newline = torch.randn(checkpoint.config["hidden_size"])
    checkpoint.weights["model.image_newline"] = newline
    engine = build_engine(checkpoint.write(tmp_path / "c"), tmp_path / "e", dtype="float32")
    assert isinstance(engine.model.vision, AnyresConfig)
    assert engine.model.vision.several_images == "tiled" and engine.model.vision.max_tiles is None
    assert torch.equal(engine.load_weights()["projector.image_newline"], newline)
    side = engine.model.vision.tower.image_size
    assert engine.model.vision.resolutions == ((side, 2 * side), (2 * side, 2 * side))
    settings = json.loads((engine.path / "processor" / "preprocessor_config.json").read_text())
    assert settings["image_processor_type"] == "LlavaNextImageProcessor"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_patch_merge_type": "flat"}, "mm_patch_merge_type: expected one of spatial_unpad; got 'flat'"),
        ({"mm_patch_merge_type": None}, "mm_patch_merge_type is missing"),
        ({"image_grid_pinpoints": "(336, 672)"}, r"image_grid_pinpoints: expected a list of \[height, width\]"),
        ({"image_grid_pinpoints": [[336]]}, r"image_grid_pinpoints: expected a list of \[height, width\]"),
        ({"image_grid_pinpoints": [[336.0, 672]]}, r"image_grid_pinpoints: expected a list of \[height, width\]"),
        ({"image_grid_pinpoints": [[0, 672]]}, "must be positive, got 0"),
        ({"image_grid_pinpoints": [[333, 672]]}, "vision resolution 333 x 672: expected multiples of the tower's"),
        ({"image_grid_pinpoints": []}, "vision resolutions: expected at least one"),
        ({"mm_vision_select_feature": "cls_patch"}, "images in tiles need a grid of visual tokens"),
    ],
)
def test_bad_configurations(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    checkpoint = original(**changes).fill()
    checkpoint.weights["model.image_newline"] = torch.randn(checkpoint.config["hidden_size"])
    with pytest.raises(ConfigError, match=message):
        build_engine(checkpoint.write(tmp_path / "c"), tmp_path / "e")


def test_trained_pooling_is_refused(tmp_path: Path) -> None:
    checkpoint = original(pooling=OriginalCheckpoint().config["pooling"]).fill()
    checkpoint.weights["model.image_newline"] = torch.randn(checkpoint.config["hidden_size"])
    with pytest.raises(ConfigError, match="trained pooling needs one grid of visual tokens per image"):
        build_engine(checkpoint.write(tmp_path / "c"), tmp_path / "e")


def test_a_newline_row_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DpnError, match=r"missing: model\.image_newline"):
        build_engine(original().fill().write(tmp_path / "c"), tmp_path / "e")


@pytest.fixture(scope="module")
def onevision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onevision")
    save_anyres(path / "checkpoint", "onevision")
    build_engine(path / "checkpoint", path / "engine", dtype="float32")
    return path


def test_files_that_disagree_about_tiles(onevision: Path, tmp_path: Path) -> None:
    path = shutil.copytree(onevision / "checkpoint", tmp_path / "c")
    settings = json.loads((path / "preprocessor_config.json").read_text())
    (path / "preprocessor_config.json").write_text(json.dumps({**settings, "image_grid_pinpoints": [[56, 56]]}))
    with pytest.raises(ConfigError, match=r"image_grid_pinpoints is \[\[56, 56\]\], but config.json has"):
        build_engine(path, tmp_path / "e")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "vision_aspect_ratio": "anyres"}))
    with pytest.raises(ConfigError, match="vision_aspect_ratio: expected anyres_max_ and a number, got 'anyres'"):
        build_engine(path, tmp_path / "e")


def test_a_tower_of_unnamed_kind_is_of_the_kind_that_the_model_has_by_default(onevision: Path, tmp_path: Path) -> None:
    """SigLIP in LLaVA-OneVision, CLIP elsewhere, as in transformers."""
    path = shutil.copytree(onevision / "checkpoint", tmp_path / "c")
    config = json.loads((path / "config.json").read_text())
    del config["vision_config"]["model_type"]
    (path / "config.json").write_text(json.dumps(config))
    engine = build_engine(path, tmp_path / "e", dtype="float32")
    assert engine.model.vision == EngineDir.open(onevision / "engine").model.vision


def test_images_that_do_not_fit(onevision: Path) -> None:
    llm = LLM(onevision / "engine", max_model_len=80)
    picture = Image.new("RGB", (224, 224))
    prompt = {"prompt": "<image> what?", "multi_modal_data": {"image": picture}}
    with pytest.raises(RequestError, match=r"the image as \d+ rows\): expected at most 79"):
        llm.processor.process(prompt)
    with pytest.raises(ImageError, match="image of 4000 x 3: too elongated"):
        llm.processor.image(Image.new("RGB", (4000, 3)))
    several = {"prompt": "<image><image> what?", "multi_modal_data": {"image": [picture, picture]}}
    assert [image.num_rows for image in llm.processor.process(several).images] == [17, 17]
    for count in (1, 3):
        with pytest.raises(ImageError, match=f"{count} image placeholders for 2 images"):
            llm.processor.process({**several, "prompt": "<image>" * count})
    with pytest.raises(RequestError, match=r"multi_modal_data: unknown keys \['video'\]"):
        llm.processor.process({"prompt": "<video> what?", "multi_modal_data": {"video": picture}})
    video = {"role": "user", "content": [{"type": "video", "video": picture}]}
    with pytest.raises(RequestError, match="video"):
        llm.processor.chat([video])
