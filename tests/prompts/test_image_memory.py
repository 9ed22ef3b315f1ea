"""An image takes the memory of one or two pictures of its size, not of five. Measured in a separate process."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.skips import NOT_LINUX

SIDE = 4000
SLACK = 16 * 2**20
"""Bytes, for files, libraries and the allocator."""
BYTES_PER_PIXEL = {
    "RGB": ({"PNG": 4, "JPEG": 4, "BMP": 4, "TIFF": 4, "PPM": 4, "WEBP": 20}, Image.new("RGB", (SIDE, SIDE), "red")),
    "RGB, one colour transparent": ({"PNG": 8}, Image.new("RGB", (SIDE, SIDE), "red")),
    "RGBA": ({"PNG": 8, "TIFF": 8, "WEBP": 20}, Image.new("RGBA", (SIDE, SIDE), "red")),
    "L": ({"PNG": 5, "JPEG": 5, "GIF": 5, "TIFF": 5}, Image.new("L", (SIDE, SIDE), 7)),
    "I;16": ({"PNG": 9, "TIFF": 9, "PPM": 9}, Image.new("I;16", (SIDE, SIDE), 7)),
    "F": ({"TIFF": 9}, Image.new("F", (SIDE, SIDE), 0.5)),
}
"""Four of a picture in colours, one of a gray one. A 16-bit one is four as Pillow reads it."""
MEASURE = """
import io, json, sys
from pathlib import Path
from PIL import Image
from benchmarks.measuring.memory import peak_memory
from dpn_rt.model.vision.clip.preprocessing import ClipPreprocessor
from dpn_rt.prompts.image import MAX_PIXELS, decode_image, load_image
from tests.engine.models import VISION

folder = Path(sys.argv[1])
prepare = ClipPreprocessor(folder, VISION, pads=False, max_pixels=MAX_PIXELS)
prepare(Image.new("RGB", (99, 99)))
found = {}
for path in folder.glob("*.image"):
    file = path.read_bytes()
    with peak_memory() as memory:
        prepare(load_image(decode_image(io.BytesIO(file), "image 0"), name="image 0"))
    found[path.stem] = memory.extra
print(json.dumps(found))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason=NOT_LINUX)
def test_peak(tmp_path: Path) -> None:
    settings = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 56}, "crop_size": 56}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    most = {}
    for mode, (forms, image) in BYTES_PER_PIXEL.items():
        for form, count in forms.items():
            name = f"{form} {mode}"
            (tmp_path / f"{name}.image").write_bytes(saved(image, form, mode))
            most[name] = count * SIDE**2 + SLACK
    result = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found: dict[str, int] = json.loads(result.stdout)
    assert set(found) == set(most)
    assert {name: size for name, size in found.items() if size > most[name]} == {}, most


def saved(image: Image.Image, form: str, mode: str) -> bytes:
    options: dict[str, Any] = {"transparency": (1, 2, 3)} if "transparent" in mode else {}
    options |= {"compression": "tiff_lzw"} if form == "TIFF" and mode != "F" else {}
    options |= {"method": 0} if form == "WEBP" else {}
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()
