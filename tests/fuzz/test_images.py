"""Files of images: each becomes an RGB picture or an ImageError, within bounded memory."""

from __future__ import annotations

import io
import os
import random
import re
import tempfile
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from dpn_rt.errors import ImageError
from dpn_rt.prompts.image import TIFF_COMPRESSIONS, decode_image, load_image
from tests.fuzz.byte_mutations import mutate_bytes
from tests.fuzz.harness import Surface, assert_own_words, fuzz

MAX_PIXELS = 4_000_000
MOST_BYTES = 24 * MAX_PIXELS + (64 << 20)
"""Of memory for one image: six copies of four bytes a pixel, as an animated WebP takes, and something for the file."""
MOST_WRITTEN = 4096
"""Bytes on standard error for one image."""
TURNED = Image.Exif()
TURNED[0x0112] = 6


def test_every_file_is_a_picture_or_an_error() -> None:
    fuzz(Surface("images", seeds(), mutate, check))


def check(data: bytes) -> None:
    """As the server decodes the files that clients send (`Preparation._image`)."""
    before = reset_peak()
    with quiet():
        decode(data)
    grown = peak() - before
    assert grown < MOST_BYTES, f"{grown >> 20} MiB for one image"


def decode(data: bytes) -> None:
    try:
        image = load_image(decode_image(io.BytesIO(data), "image 0"), MAX_PIXELS, "image 0")
    except ImageError as error:
        assert_own_words(str(error), 300)
        assert str(error).startswith("image 0: "), error
    else:
        assert image.mode == "RGB" and 0 < image.width * image.height <= MAX_PIXELS
        assert len(image.tobytes()) == 3 * image.width * image.height


@contextmanager
def quiet() -> Iterator[None]:
    """That libraries write no flood to standard error, by themselves and past the server's log."""
    with tempfile.TemporaryFile() as written, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the server does (`set_up_logs`)
        own = os.dup(2)
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(own, 2)
            os.close(own)
        size = written.seek(0, os.SEEK_END)
        assert size < MOST_WRITTEN, f"{size} bytes on standard error: {written.seek(0) or written.read(200)!r}"


def reset_peak() -> int:
    """Resident bytes now, from where the peak is counted on."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def seeds() -> list[bytes]:
    """Small files of all formats and of their variants."""
    pixels = np.random.default_rng(0).integers(0, 256, (19, 23, 3), dtype=np.uint8)
    rgb = Image.fromarray(pixels)
    smooth = rgb.resize((64, 48))
    alpha = rgb.convert("RGBA")
    wide = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    frames = {"save_all": True, "append_images": [smooth.resize(rgb.size)], "duration": 50}
    palette = rgb.convert("P")
    return [
        *(written(rgb, "PNG", exif=exif) for exif in (None, TURNED)),
        *(written(image, "PNG") for image in (alpha, wide, rgb.convert("1"), rgb.convert("LA"))),
        written(palette, "PNG", transparency=3), written(rgb, "PNG", **frames),
        *(written(smooth, "JPEG", progressive=progressive, exif=TURNED) for progressive in (False, True)),
        written(smooth.convert("CMYK"), "JPEG"), written(smooth.convert("L"), "JPEG", restart_marker_blocks=2),
        *(written(image, "WEBP", lossless=lossless) for image in (smooth, alpha) for lossless in (False, True)),
        written(rgb, "WEBP", **frames), written(palette, "GIF"), written(palette, "GIF", **frames),
        *(written(rgb, "TIFF", compression=kind) for kind in TIFF_COMPRESSIONS),
        written(wide, "TIFF"), written(rgb.convert("1"), "TIFF", compression="group3"), written(rgb, "TIFF", **frames),
        written(rgb, "BMP"), written(palette, "BMP"), written(rgb, "PPM"), written(rgb.convert("1"), "PPM"),
        written(wide, "PPM"), b"P3\n2 2\n255\n" + b"1 2 3 " * 4,
    ]  # fmt: skip


def written(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **{name: value for name, value in options.items() if value is not None})
    return file.getvalue()


def mutate(data: bytes, rng: random.Random) -> bytes:
    """A PNG usually gets the checksums of its changed chunks, without which nothing beyond them would be read."""
    changed = mutate_bytes(data, rng)
    return with_checksums(changed) if changed.startswith(b"\x89PNG") and rng.random() < 0.8 else changed


def with_checksums(png: bytes) -> bytes:
    changed, start = bytearray(png), 8
    while start + 12 <= len(changed):
        end = start + 8 + int.from_bytes(changed[start : start + 4])
        if end + 4 > len(changed):
            break
        changed[end : end + 4] = zlib.crc32(changed[start + 4 : end]).to_bytes(4)
        start = end + 4
    return bytes(changed)
