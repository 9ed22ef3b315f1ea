"""Gray samples of more than 8 bits are scaled by the range that the format fixes, whatever the picture holds."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dpn_rt.errors import ImageError
from dpn_rt.prompts.image import load_image

SAMPLES = {
    "dark": [0, 1, 3, 100, 255, 200],
    "middle": [0, 257, 258, 1000, 4095, 400],
    "bright": [0, 40_000, 65_000, 65_407, 65_535, 7],
}


def tiff(
    samples: Sequence[int] | bytes, bits: int, sample_format: int = 1, white_is_zero: bool = False, **tags: int
) -> bytes:
    """A little-endian TIFF of 3 x 2 gray samples."""
    kind = f"<{'i' if sample_format == 2 else 'u'}{bits // 8}"
    data = samples if isinstance(samples, bytes) else np.array(samples, kind).tobytes()
    entries = {
        256: 3, 257: 2, 258: bits, 259: 1, 262: 0 if white_is_zero else 1, 273: 0, 277: 1, 278: 2, 279: len(data),
        339: sample_format, **{int(tag[1:]): value for tag, value in tags.items()},
    }  # fmt: skip
    entries[273] = 8 + 2 + 12 * len(entries) + 4
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(entries.items()))
    return struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + directory + bytes(4) + data


def gray_of(path: Path) -> list[int]:
    loaded = np.asarray(load_image(path))
    with Image.open(path) as opened:
        np.testing.assert_array_equal(np.asarray(load_image(opened)), loaded)
    return loaded[:, :, 0].ravel().tolist()


def scaled(samples: Sequence[float], white: float) -> list[int]:
    return np.rint(np.array(samples, np.float64) * 255 / white).astype(int).tolist()


def write(path: Path, kind: str, samples: list[int]) -> Path:
    values = np.array(samples).reshape(2, 3)
    if kind == "PGM":
        path.write_bytes(b"P5 3 2 65535\n" + values.astype(">u2").tobytes())
    elif kind == "plain PGM":
        path.write_text("P2 3 2 65535\n" + " ".join(map(str, samples)))
    elif kind == "TIFF":
        path.write_bytes(tiff(samples, 16))
    elif kind == "TIFF, Motorola":
        Image.frombytes("I;16B", (3, 2), values.astype(">u2").tobytes()).save(path, "TIFF")
    else:
        Image.frombytes("I;16", (3, 2), values.astype("<u2").tobytes()).save(path, kind)
    return path


@pytest.mark.parametrize("content", SAMPLES)
@pytest.mark.parametrize("kind", ["PNG", "PGM", "plain PGM", "TIFF", "TIFF, Motorola"])
def test_sixteen_bits(kind: str, content: str, tmp_path: Path) -> None:
    assert gray_of(write(tmp_path / "gray", kind, SAMPLES[content])) == scaled(SAMPLES[content], 65535)


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B"])
def test_sixteen_bits_in_memory(mode: str) -> None:
    for samples in SAMPLES.values():
        values = np.array(samples).astype(">u2" if mode == "I;16B" else "<u2")
        image = Image.frombytes(mode, (3, 2), values.tobytes())
        assert np.asarray(load_image(image))[:, :, 0].ravel().tolist() == scaled(samples, 65535)


@pytest.mark.parametrize("kind", ["I", "I of a PGM", "int32", "uint16"])
@pytest.mark.parametrize("content", SAMPLES)
def test_images_in_memory_have_one_range(kind: str, content: str, tmp_path: Path) -> None:
    samples = SAMPLES[content]
    values = np.array(samples).reshape(2, 3)
    if kind == "I":
        image = Image.frombytes("I", (3, 2), values.astype("<i4").tobytes())
    elif kind == "I of a PGM":
        with Image.open(write(tmp_path / "a.pgm", "PGM", samples)) as opened:
            image = opened.copy()
    else:
        image = Image.fromarray(values.astype(kind))
    assert image.format is None
    assert np.asarray(load_image(image))[:, :, 0].ravel().tolist() == scaled(samples, 65535)


@pytest.mark.parametrize("brightest", [3, 200])
@pytest.mark.parametrize("change", [Image.Image.copy, lambda i: i.crop((0, 0, 3, 2)), lambda i: i.resize((3, 2))])
def test_a_copy_of_a_dark_pgm_is_as_dark_as_the_file(
    change: Callable[[Image.Image], Image.Image], brightest: int, tmp_path: Path
) -> None:
    path = tmp_path / "dark.pgm"
    path.write_bytes(b"P5 3 2 1000\n" + np.array([0, 1, 2, 3, brightest, 2], ">u2").tobytes())
    with Image.open(path) as opened:
        copy = change(opened)
    assert copy.format is None
    np.testing.assert_array_equal(np.asarray(load_image(copy)), np.asarray(load_image(path)))
    assert np.asarray(load_image(copy)).max() == round(brightest * 255 / 1000)


@pytest.mark.parametrize("wrong", [-1, 65536])
def test_values_in_memory_beyond_sixteen_bits_are_refused(wrong: int) -> None:
    with pytest.raises(ImageError, match=f"gray values from .*{wrong}.*, expected 0 to 65535"):
        load_image(Image.fromarray(np.array([[0, wrong]], np.int32)))


@pytest.mark.parametrize("maxval", [256, 1000, 4095, 65534])
def test_a_pgm_has_the_range_of_its_maxval(maxval: int, tmp_path: Path) -> None:
    samples = [0, 1, 5, 17, 100, 200]
    (tmp_path / "a.pgm").write_bytes(b"P5 3 2 %d\n" % maxval + np.array(samples, ">u2").tobytes())
    np.testing.assert_allclose(gray_of(tmp_path / "a.pgm"), scaled(samples, maxval), atol=1)


@pytest.mark.parametrize(
    ("bits", "sample_format", "white"), [(16, 1, 2**16 - 1), (16, 2, 2**15 - 1), (32, 1, 2**32 - 1), (32, 2, 2**31 - 1)]
)
def test_a_tiff_has_the_range_of_its_samples(bits: int, sample_format: int, white: int, tmp_path: Path) -> None:
    for part in (1, 3, 200):
        samples = [round(white / part * share) for share in (0, 0.1, 0.4, 0.5, 0.9, 1)]
        (tmp_path / "a.tif").write_bytes(tiff(samples, bits, sample_format))
        assert gray_of(tmp_path / "a.tif") == scaled(samples, white)


@pytest.mark.parametrize("brightest", [30, 4095])
def test_a_tiff_of_twelve_bits(brightest: int, tmp_path: Path) -> None:
    samples = [0, 1, 16, 100, 20, brightest]
    rows = ["".join(f"{value:012b}" for value in row).ljust(40, "0") for row in (samples[:3], samples[3:])]
    (tmp_path / "a.tif").write_bytes(tiff(b"".join(int(row, 2).to_bytes(5) for row in rows), 12))
    assert gray_of(tmp_path / "a.tif") == scaled(samples, 4095)


def test_a_tiff_whose_zero_is_white(tmp_path: Path) -> None:
    samples = SAMPLES["dark"]
    (tmp_path / "a.tif").write_bytes(tiff(samples, 16, white_is_zero=True))
    assert gray_of(tmp_path / "a.tif") == (255 - np.array(scaled(samples, 65535))).tolist()


def test_tags_that_describe_a_tiffs_content_do_not_count(tmp_path: Path) -> None:
    samples = SAMPLES["dark"]
    (tmp_path / "a.tif").write_bytes(tiff(samples, 16, _281=255, _341=255))
    assert gray_of(tmp_path / "a.tif") == scaled(samples, 65535)


def test_a_turned_picture_keeps_its_range(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    values = np.array(SAMPLES["dark"], "<u2")
    Image.frombytes("I;16", (3, 2), values.tobytes()).save(tmp_path / "a.png", exif=exif)
    assert gray_of(tmp_path / "a.png") == scaled(SAMPLES["dark"][::-1], 65535)
    (tmp_path / "a.tif").write_bytes(tiff(SAMPLES["dark"], 32, _274=3))
    assert gray_of(tmp_path / "a.tif") == [0] * 6


def test_samples_below_black_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(tiff([0, -5, 3, 100, 7, 9], 16, 2))
    with pytest.raises(ImageError, match="gray values from -5 to 100, expected 0 to 32767"):
        load_image(tmp_path / "a.tif")


@pytest.mark.parametrize(("largest", "white"), [(0.47, 1), (1, 1), (200, 255), (60_000, 65535)])
def test_floating_point_samples_have_no_fixed_range(largest: float, white: float, tmp_path: Path) -> None:
    samples = np.linspace(0, largest, 6, dtype=np.float32)
    Image.fromarray(samples.reshape(2, 3)).save(tmp_path / "a.tif")
    assert gray_of(tmp_path / "a.tif") == scaled(samples.tolist(), white)
