"""Metadata of any kind and size change no pixel and refuse no picture, and what turns a picture is still found."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin, TiffTags

from dpn_rt.errors import ImageError
from dpn_rt.prompts.image import decode_image, load_image

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
BIG = b"a" * (2 << 20)
XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def encoded(kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, kind, **options)
    return buffer.getvalue()


PNG, JPEG = encoded("PNG"), encoded("JPEG", quality=95)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def block(code: int, data: bytes) -> bytes:
    return bytes([0xFF, code]) + struct.pack(">H", len(data) + 2) + data


def with_chunks(chunks: bytes, at_end: bool = False) -> bytes:
    position = len(PNG) - 12 if at_end else 33
    return PNG[:position] + chunks + PNG[position:]


def with_blocks(blocks: bytes, jpeg: bytes = JPEG, after_jfif: bool = False) -> bytes:
    position = 2 + 18 * after_jfif
    return jpeg[:position] + blocks + jpeg[position:]


def exif(orientation: int, padding: int = 0) -> bytes:
    return struct.pack("<2sHIHHHIHHI", b"II", 42, 8, 1, 0x112, 3, 1, orientation, 0, 0) + bytes(padding)


def loaded(data: bytes) -> np.ndarray:
    return np.asarray(load_image(decode_image(io.BytesIO(data), "image 0")))


CHUNKS = {
    "zTXt": chunk(b"zTXt", b"k\0\0" + zlib.compress(BIG)),
    "compressed iTXt": chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(BIG)),
    "iTXt": chunk(b"iTXt", b"k\0\0\0\0\0" + BIG),
    "tEXt": chunk(b"tEXt", b"k\0" + BIG),
    "XMP": chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + BIG),
    "compressed XMP": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(BIG)),
    "many compressed XMP": 200 * chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b"a" * 900_000)),
    "ICC": chunk(b"iCCP", b"p\0\0" + zlib.compress(BIG)),
    "EXIF": chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\0" + BIG),
    "private": chunk(b"prIv", BIG),
    "many texts": 100 * chunk(b"tEXt", b"k\0" + b"a" * 900_000),
    "a bomb": chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(bytes(100 << 20), 9)),
    "unknown compression": chunk(b"zTXt", b"Raw profile type exif\0\7abc"),
    "damaged compression": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0abc"),
    "wrong checksum": chunk(b"tEXt", b"k\0abc")[:-4] + b"0000",
    "wrong checksum of EXIF": chunk(b"eXIf", exif(6))[:-4] + b"0000",
    "damaged EXIF": chunk(b"eXIf", b"\xff\xff\xff"),
    "short gamma": chunk(b"gAMA", b""),
    "short size": chunk(b"pHYs", b"12"),
    "animation": chunk(b"acTL", struct.pack(">II", 5, 0)) + chunk(b"fcTL", bytes(26)),
}


@pytest.mark.parametrize("at_end", [False, True], ids=["before the pixels", "after the pixels"])
@pytest.mark.parametrize("name", CHUNKS)
def test_chunks_of_a_png(name: str, at_end: bool) -> None:
    np.testing.assert_array_equal(loaded(with_chunks(CHUNKS[name], at_end)), PIXELS)


def test_a_path_and_what_follows_the_end(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(with_chunks(CHUNKS["zTXt"]) + b"PK\3\4 another file")
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "a.png")), PIXELS)


BLOCKS = {
    **{f"APP{n}": 300 * block(0xE0 + n, b"x" * 65_000) for n in range(16)},
    "comments": 300 * block(0xFE, b"x" * 65_000),
    "ICC": b"".join(block(0xE2, b"ICC_PROFILE\0" + bytes([i % 256, 255]) + b"x" * 65_000) for i in range(300)),
    "EXIF": 300 * block(0xE1, b"Exif\0\0" + exif(1, 60_000)),
    "XMP": 300 * block(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + b"x" * 60_000),
    "extended XMP": 300 * block(0xE1, b"http://ns.adobe.com/xmp/extension/\0" + b"x" * 60_000),
    "Photoshop": 300 * block(0xED, b"Photoshop 3.0\0" + b"x" * 60_000),
    "damaged Photoshop": block(0xED, b"Photoshop 3.0\x008BIM\x04"),
    "several pictures": block(0xE2, b"MPF\0" + b"\xff" * 60_000),
    "empty blocks": 50_000 * block(0xE5, b""),
    "short Adobe": block(0xEE, b"Adobe"),
    "short JFIF": block(0xE0, b"JFIF"),
    "padding": b"\xff" * 100_000,
}


@pytest.mark.parametrize("after_jfif", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_a_jpeg(name: str, after_jfif: bool) -> None:
    expected = np.asarray(Image.open(io.BytesIO(JPEG)))
    np.testing.assert_array_equal(loaded(with_blocks(BLOCKS[name], after_jfif=after_jfif)), expected)


@pytest.mark.parametrize("options", [{"progressive": True}, {"keep_rgb": True}, {"restart_marker_rows": 1}])
def test_kinds_of_jpeg(options: dict[str, object]) -> None:
    jpeg = encoded("JPEG", quality=90, **options)
    expected = np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))
    np.testing.assert_array_equal(loaded(with_blocks(BLOCKS["APP5"], jpeg)), expected)


@pytest.mark.parametrize("mode", ["CMYK", "L"])
def test_colour_spaces_of_jpeg(mode: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).convert(mode).save(buffer, "JPEG", quality=95)
    expected = np.asarray(Image.open(io.BytesIO(buffer.getvalue())).convert("RGB"))
    np.testing.assert_array_equal(loaded(with_blocks(BLOCKS["EXIF"], buffer.getvalue())), expected)


PPM_PIXELS = {
    "P1": b"1 0 1 1 0 1", "P2": b"1 2 3 4 5 6", "P3": b"1 2 3 4 5 6 7 8 9 1 2 3 4 5 6 7 8 9", "P4": b"\xa0\x40",
    "P5": b"ab#d\ne", "P6": b"##\n 12 \nabcdefghijk", "Pf": np.linspace(0, 1, 6, dtype="<f4").tobytes(),
}  # fmt: skip


def ppm(kind: str, *between: bytes, last: bytes = b"255") -> bytes:
    """A picture of 3 x 2 pixels, with something before each number of its header."""
    numbers = [b"3", b"2", *({"P1": [], "P4": [], "Pf": [b"-1.0"]}.get(kind, [last]))]
    header = b"".join(space + number for space, number in zip(between, numbers, strict=False))
    return kind.encode() + header + b"\n" + PPM_PIXELS[kind]


@pytest.mark.parametrize("kind", PPM_PIXELS)
@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"])
def test_comments_of_a_ppm(kind: str, end: bytes) -> None:
    expected = loaded(ppm(kind, b"\n", b" ", b"\n"))
    for size in (4, 5000, 3 << 20):
        comment = b"# 7 8 9" + b" 1#" * (size // 3) + end
        np.testing.assert_array_equal(loaded(ppm(kind, b"\n" + comment, b" ", b"\n")), expected)
        np.testing.assert_array_equal(loaded(ppm(kind, b"\n" + 2 * comment, b" " + comment, b" " + comment)), expected)
    many = b"\n" + b"# comment" * 3 + end
    np.testing.assert_array_equal(loaded(ppm(kind, many * 1000, b" " + many * 300, b"\t" + many)), expected)


def test_comments_within_a_number_of_a_ppm() -> None:
    """As Pillow and netpbm read them: they end no number."""
    expected = Image.open(io.BytesIO(ppm("P5", b"\n", b" ", b"\n", last=b"2#a\n5#b\n5")))
    np.testing.assert_array_equal(
        loaded(ppm("P5", b"\n", b" ", b"\n", last=b"2#" + BIG + b"\n5#b\n5"))[..., 0], expected
    )


def test_a_ppm_that_is_a_comment_alone() -> None:
    with pytest.raises(ImageError, match="image 0: not an image that can be read"):
        loaded(b"P6 #" + b"1 " * 10**6)


MEGABYTES = [2, 5]


@pytest.mark.parametrize("megabytes", MEGABYTES)
@pytest.mark.parametrize("kind", ["exif", "xmp", "icc_profile"])
def test_metadata_of_a_webp(kind: str, megabytes: int) -> None:
    data = bytes(range(256)) * (megabytes << 12)
    given = b"Exif\0\0" + exif(1) + data if kind == "exif" else data
    expected = loaded(encoded("WEBP", lossless=True))
    file = encoded("WEBP", lossless=True, **{kind: given})
    assert len(file) > megabytes << 20
    np.testing.assert_array_equal(loaded(file), expected)
    np.testing.assert_array_equal(expected, PIXELS)


@pytest.mark.parametrize("megabytes", MEGABYTES)
@pytest.mark.parametrize("kind", [b"\xfe", b"\xff\x0bXMP DataXMP", b"\xff\x0bICCRGBG1012", b"\1\x0c" + bytes(12)])
def test_metadata_of_a_gif(kind: bytes, megabytes: int) -> None:
    gif = encoded("GIF")
    start = 13 + (3 << ((gif[10] & 7) + 1)) * (gif[10] >> 7)
    count = (megabytes << 20) // 255 + 1
    for block in (kind + (b"\xff" + b",;!" * 85) * count, kind + (b"\xff" + b"\0" * 255) * count):
        np.testing.assert_array_equal(loaded(gif[:start] + b"!" + block + b"\0" + gif[start:]), loaded(gif))
    commented = encoded("GIF", comment=b"a" * (megabytes << 20))
    assert len(commented) > megabytes << 20
    np.testing.assert_array_equal(loaded(commented), loaded(gif))


@pytest.mark.parametrize("megabytes", MEGABYTES)
@pytest.mark.parametrize("tag", [270, 700, 34675, 34377, 50000], ids=["text", "XMP", "ICC", "Photoshop", "private"])
def test_metadata_of_a_tiff(tag: int, megabytes: int) -> None:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags.tagtype[tag] = TiffTags.ASCII if tag == 270 else TiffTags.UNDEFINED
    tags[tag] = "a" * (megabytes << 20) if tag == 270 else b"a" * (megabytes << 20)
    file = encoded("TIFF", tiffinfo=tags)
    assert len(file) > megabytes << 20
    np.testing.assert_array_equal(loaded(file), PIXELS)


TURNED = {
    "PNG, EXIF": with_chunks(CHUNKS["zTXt"] + chunk(b"eXIf", exif(6)) + CHUNKS["ICC"]),
    "PNG, EXIF at its end": with_chunks(CHUNKS["EXIF"] + chunk(b"eXIf", exif(6)), at_end=True),
    "PNG, XMP": with_chunks(CHUNKS["many texts"] + chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)),
    "PNG, compressed XMP": with_chunks(chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP))),
    "PNG, EXIF as text": with_chunks(
        chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n  28\n" + exif(6).hex().encode()))
    ),
    "JPEG, EXIF": with_blocks(BLOCKS["APP7"] + block(0xE1, b"Exif\0\0" + exif(6)) + BLOCKS["ICC"]),
    "JPEG, XMP": with_blocks(BLOCKS["Photoshop"] + block(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP)),
}


@pytest.mark.parametrize("name", TURNED)
def test_what_turns_a_picture_is_found_among_other_metadata(name: str) -> None:
    expected = PIXELS if name.startswith("PNG") else np.asarray(Image.open(io.BytesIO(JPEG)))
    np.testing.assert_array_equal(loaded(TURNED[name]), np.rot90(expected, -1))


def test_transparency_and_palette_stay() -> None:
    buffer = io.BytesIO()
    image = Image.fromarray(PIXELS).quantize(16)
    image.save(buffer, "PNG", transparency=3)
    assert b"tRNS" in buffer.getvalue() and b"PLTE" in buffer.getvalue()
    with decode_image(io.BytesIO(buffer.getvalue()), "image 0") as opened:
        assert opened.info["transparency"] == 3
        np.testing.assert_array_equal(np.asarray(load_image(opened)), np.asarray(image.convert("RGB")))


def alternating_png() -> bytes:
    return with_chunks((chunk(b"PLTE", bytes(3)) + chunk(b"tEXt", b"k\0v")) * 20_000)


def alternating_jpeg() -> bytes:
    return with_blocks((block(0xDB, b"") + block(0xE5, b"")) * 20_000)


@pytest.mark.parametrize("make", [alternating_png, alternating_jpeg])
def test_a_file_that_is_made_to_cost_memory_is_refused(make: Callable[[], bytes]) -> None:
    with pytest.raises(ImageError, match="image 0: .*: it would take too long to read"):
        loaded(make())


@pytest.mark.parametrize(
    "data",
    [
        with_chunks(CHUNKS["many texts"]),
        with_blocks(BLOCKS["EXIF"]),
        ppm("P6", b"\n#" + b"a" * (20 << 20) + b"\n", b" ", b"\n"),
        encoded("GIF", comment=b"a" * (20 << 20)),
    ],
    ids=["PNG", "JPEG", "PPM", "GIF"],
)
def test_skipped_metadata_are_not_held_in_memory(data: bytes) -> None:
    file = io.BytesIO(data)
    tracemalloc.start()
    try:
        load_image(decode_image(file, "image 0"))
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
