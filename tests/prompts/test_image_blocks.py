"""Files that are read a few bytes at a time are refused before they are, and honest ones are not."""

from __future__ import annotations

import io
import os
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dpn_rt.errors import ImageError
from dpn_rt.prompts.image import load_image
from dpn_rt.prompts.image_blocks import MOST_BLOCKS, MOST_RUNS_BYTES, MOST_SCALED_BYTES, MOST_SKIPPED, MOST_TEXT_BYTES
from dpn_rt.prompts.image_metadata import MOST_PADDING, MOST_SCANS, MOST_WHOLE_BYTES, PIECE

MANY = MOST_BLOCKS + 1
PNG_DATA = zlib.compress(bytes(3 * 2 * 2 + 2))


def load(content: bytes) -> Image.Image:
    """As the server does."""
    from dpn_rt.prompts.image import decode_image

    return load_image(decode_image(io.BytesIO(content), "image 0"), name="image 0")


def saved(form: str, image: Image.Image | None = None, **options: Any) -> bytes:
    file = io.BytesIO()
    (image or Image.new("RGB", (16, 8), "red")).save(file, form, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(before: bytes = b"", after: bytes = b"") -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + before + chunk(b"IDAT", PNG_DATA) + after + chunk(b"IEND")


def gif(before: bytes) -> bytes:
    whole = saved("GIF", Image.new("P", (4, 4)))
    start = 13 + (3 << ((whole[10] & 7) + 1)) * (whole[10] >> 7)
    return whole[:start] + before + whole[start:]


def jpeg(before: bytes) -> bytes:
    whole = saved("JPEG")
    return whole[:2] + before + whole[2:]


def after_scan(after: bytes) -> bytes:
    return saved("JPEG")[:-2] + after + b"\xff\xd9"


def scans(count: int) -> bytes:
    whole = saved("JPEG", Image.effect_noise((16, 16), 50), progressive=True)
    last = whole.rindex(b"\xff\xda")
    return whole[:-2] + whole[last:-2] * count + whole[-2:]


def bmp(runs: bytes) -> bytes:
    fields = (54 + 1024 + len(runs), 0, 0, 54 + 1024, 40, 9, 9, 1, 8, 1, 0, 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHIIiiHHIIiiII", *fields) + bytes(1024) + runs


TABLE = b"\xff\xdb\0\x43\0" + b"\1" * 64
REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "PNG, empty data": (lambda: png(chunk(b"IDAT") * MANY), "more than 20000 blocks"),
    "PNG, private chunks": (lambda: png(chunk(b"prVt") * MOST_SKIPPED), "a PNG of more than 100000 chunks"),
    "PNG, names with digits": (lambda: png(chunk(b"aaa1") * MOST_SKIPPED), "chunks"),
    "PNG, after the data": (lambda: png(after=chunk(b"tEXt", b"a\0b") * MOST_SKIPPED), "chunks"),
    "JPEG, tables": (lambda: jpeg(TABLE * MANY), "more than 20000 blocks"),
    "JPEG, tables after a restart": (lambda: jpeg(b"\xff\xd0" + TABLE * MANY), "blocks"),
    "JPEG, tables after an end": (lambda: jpeg(b"\xff\xd9" + TABLE * MANY), "blocks"),
    "JPEG, comments": (lambda: jpeg(b"\xff\xfe\0\2" * MOST_SKIPPED), "a JPEG of more than 100000 blocks"),
    "JPEG, markers alone": (lambda: jpeg(b"\xff\xd0" * MANY), "blocks"),
    "JPEG, bytes between": (lambda: jpeg(b"\xff\0a" * MOST_SKIPPED), "blocks"),
    "JPEG, scans": (lambda: scans(MOST_SCANS), "a JPEG of more than 100 scans"),
    "JPEG, scans after a table": (
        lambda: scans(MOST_SCANS).replace(b"\xff\xda", b"\xff\xfe\0\4\xff\xd9\xff\xda"),
        "scans",
    ),
    "JPEG, empty blocks after a scan": (
        lambda: after_scan(b"\xff\xfe\0\2" * MOST_SKIPPED),
        "JPEG of more than 100000 blocks",
    ),
    "JPEG, bare markers after a scan": (lambda: after_scan(b"\xff\x01" * MOST_SKIPPED * 2), "more than 100000 blocks"),
    "JPEG, padding in a scan": (lambda: after_scan(b"\xff" * (MOST_PADDING + 1)), "more than 65536 bytes of padding"),
    "JPEG, padding far into a scan": (
        lambda: after_scan(bytes(PIECE - 700) + b"\xff" * (MOST_PADDING + 1) + b"\xfe"),
        "more than 65536 bytes of padding",
    ),
    "GIF, comments": (lambda: gif(b"!\xfe\1a\0" * MOST_SKIPPED), "a GIF of more than 100000 blocks"),
    "GIF, a comment in parts": (lambda: gif(b"!\xfe" + b"\1a" * MOST_SKIPPED + b"\0"), "a GIF of more than 100000"),
    "GIF, bytes between": (lambda: gif(b"\7" * MANY), "blocks"),
    "GIF, an extension without end": (lambda: gif(b"!\xf9" + b"\1a" * MANY), "blocks"),
    "BMP in runs": (lambda: bmp(b"\1\1" * (MOST_RUNS_BYTES // 2)), "a BMP in runs of 525366 bytes"),
    "BMP in steps": (lambda: bmp(b"\0\2\1\1" * (MOST_RUNS_BYTES // 4)), "a BMP in runs"),
    "PPM as text": (lambda: b"P3 300 300 255\n" + b"1 " * MOST_TEXT_BYTES, "a PPM as text"),
    "PGM as text": (lambda: b"P2 300 300 255\n" + b"#\n" * MOST_TEXT_BYTES, "a PPM as text"),
    "PBM as text": (lambda: b"P1 900 900\n" + b"1" * MOST_TEXT_BYTES, "a PPM as text"),
    "PPM, spaces": (lambda: b"P6" + b" " * 10**6, "a PPM whose header has more than 4096 bytes"),
    "PPM, comments": (lambda: b"P6 " + b"#\n" * (MOST_SKIPPED + 1), "a PPM of more than 100000 comments"),
    "PPM, an odd range": (lambda: b"P6 1200 1200 254\n" + bytes(MOST_SCALED_BYTES), "another range than 255 or 65535"),
    "PPM, four colours of 16 bits": (
        lambda: b"P0CMYK 900 800 65535\n" + bytes(MOST_SCALED_BYTES),
        "a PPM of Pillow's own kinds with 16 bits",
    ),
    "PPM, four colours of an odd range": (lambda: b"P0CMYK 900 800 9\n" + bytes(MOST_SCALED_BYTES), "another range"),
    "PPM, Pillow's own colours": (lambda: b"PyRGBA 900 800 9\n" + bytes(MOST_SCALED_BYTES), "another range"),
    "PGM, an odd range after a comment": (
        lambda: b"P5 1500 1500 25#\n4\n" + bytes(MOST_SCALED_BYTES),
        "another range",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_take_long(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(ImageError, match=f"^image 0: .*{message}.*: it would take too long to read$"):
        load(make())


HONEST: dict[str, Callable[[], bytes]] = {
    "PNG, small chunks": lambda: png(chunk(b"IDAT") * 1000),
    "JPEG, progressive": lambda: saved("JPEG", progressive=True),
    "JPEG, a marker before its tables": lambda: jpeg(b"\xff\xd0"),
    "JPEG, bytes between": lambda: jpeg(TABLE + b"\0\0\0"),
    "JPEG, restarts": lambda: saved("JPEG", Image.effect_noise((99, 99), 50), restart_marker_blocks=1),
    "JPEG, padding in a scan": lambda: after_scan(b"\xff" * 2000),
    "JPEG, a comment on the border of two pieces": lambda: after_scan(
        bytes(PIECE - len(saved("JPEG")) - 1) + b"\xff\xfe\0\4\xff\xd9"
    ),
    "JPEG, a film after it": lambda: saved("JPEG") + np.random.default_rng(0).bytes(10**7),
    "JPEG, erased memory after it": lambda: saved("JPEG") + b"\xff" * 10**6,
    "JPEG, bare markers after it": lambda: saved("JPEG") + b"\xff\x01" * MOST_SKIPPED * 2,
    "JPEG, another after it": lambda: saved("JPEG") * 300,
    "PPM in colours of 16 bits": lambda: b"P6 900 800 65535\n" + bytes(MOST_SCALED_BYTES + 2**18),
    "GIF, comments": lambda: gif(b"!\xfe\1a\0" * 1000),
    "GIF, many comments": lambda: gif(b"!\xfe\1a\0" * MANY),
    "GIF, a comment in many parts": lambda: gif(b"!\xfe" + b"\1a" * MANY + b"\0"),
    "GIF, extensions": lambda: gif(b"!\xff\x0bNETSCAPE2.0\3\1\0\0\0!\xf9\4\1\0\0\0\0\7!\1\2ab\0"),
    "GIF, frames": lambda: saved(
        "GIF", save_all=True, append_images=[Image.new("RGB", (16, 8), (i % 256, i // 256, 0)) for i in range(500)]
    ),
    "BMP in runs": lambda: bmp(b"\x09\1\0\0" * 9 + b"\0\1"),
    "BMP": lambda: saved("BMP", Image.new("RGB", (999, 999))),
    "PPM": lambda: saved("PPM", Image.new("RGB", (2000, 2000))),
    "PGM of 16 bits": lambda: saved("PPM", Image.new("I;16", (2000, 2000))),
    "PPM as text": lambda: b"P3 # a comment\n2 1 255\n1 2 3 4 5 6\n",
    "PPM, a short comment": lambda: b"P6 # a comment\n2 1\n255\n123456",
    "PBM": lambda: b"P4 8 1\n\x00",
    "PFM": lambda: b"Pf\n2 1\n-1.0\n" + bytes(8),
}


@pytest.mark.parametrize(
    ("form", "message"),
    [("JPEG", "a JPEG of more than 268435456 bytes of pixels"), ("WEBP", "a WebP of 269484032 bytes")],
)
def test_files_that_are_read_as_a_whole(form: str, message: str, tmp_path: Path) -> None:
    """They are files with holes, and a file may grow while it is read."""
    path = tmp_path / "large"
    path.write_bytes(saved(form)[:-2])
    os.truncate(path, MOST_WHOLE_BYTES + 2**20)
    with pytest.raises(ImageError, match=message):
        load_image(path)


@pytest.mark.parametrize("form", ["JPEG", "WEBP", "PNG", "GIF", "TIFF", "BMP", "PPM"])
def test_files_that_grow_while_they_are_read(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_late(file: Any, formats: Any) -> Image.Image:
        os.truncate(path, 2**27)
        return original(file, formats=formats)

    original = Image.open
    path = tmp_path / "growing"
    path.write_bytes(saved(form))
    size = load_image(path).size
    monkeypatch.setattr("dpn_rt.prompts.image.Image.open", open_late)
    tracemalloc.start()
    assert load_image(path).size == size
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


@pytest.mark.parametrize("name", HONEST)
def test_files_that_do_not(name: str) -> None:
    content = HONEST[name]()
    expected = Image.open(io.BytesIO(content)).convert("RGB")
    if name != "PGM of 16 bits":
        np.testing.assert_array_equal(np.asarray(load(content)), np.asarray(expected))
    assert load(content).size == expected.size
