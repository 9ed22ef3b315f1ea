"""Images of every kind of file and mode become upright 8-bit RGB, or an error that names the file."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dpn_rt.errors import ImageError
from dpn_rt.prompts import image
from dpn_rt.prompts.image import FORMATS, TIFF_COMPRESSIONS, decode_image, load_image


def random_rgb(width: int = 13, height: int = 7) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("as_text", [True, False])
def test_a_file_and_the_image_itself(tmp_path: Path, as_text: bool) -> None:
    image, path = random_rgb(), tmp_path / "image.png"
    image.save(path)
    loaded = load_image(str(path) if as_text else path)
    np.testing.assert_array_equal(pixels(loaded), pixels(image))
    np.testing.assert_array_equal(pixels(load_image(image)), pixels(image))
    with Image.open(path) as unread:
        np.testing.assert_array_equal(pixels(load_image(unread)), pixels(image))


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr", "RGBA", "LA", "HSV", "PA", "RGBX", "RGBa", "La"])
def test_modes_convert_as_pillow_does(mode: str) -> None:
    via = {"PA": "P", "RGBa": "RGBA", "La": "LA"}.get(mode)
    image = random_rgb().convert(via).convert(mode) if via else random_rgb().convert(mode)
    expected = (image.convert(via) if via and mode != "PA" else image).convert("RGB")
    np.testing.assert_array_equal(pixels(load_image(image)), pixels(expected))


def test_alpha_is_dropped_not_blended(tmp_path: Path) -> None:
    image = random_rgb().convert("RGBA")
    image.putalpha(0)
    image.save(tmp_path / "alpha.png")
    np.testing.assert_array_equal(pixels(load_image(tmp_path / "alpha.png")), pixels(random_rgb()))


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_sixteen_bits_are_scaled_not_clipped(mode: str, tmp_path: Path) -> None:
    values = np.array([[0, 128, 129, 257, 1000], [32768, 40000, 65000, 65407, 65535]])
    expected = np.rint(values / 257).astype(np.uint8)
    dtype = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode]
    image = Image.frombytes(mode, (5, 2), values.astype(dtype).tobytes())
    np.testing.assert_array_equal(pixels(load_image(image))[:, :, 1], expected)
    if mode == "I;16":
        image.save(tmp_path / "deep.png")
        np.testing.assert_array_equal(pixels(load_image(tmp_path / "deep.png"))[:, :, 0], expected)


def test_float_gray() -> None:
    unit = Image.fromarray(np.array([[0, 0.5, 1]], dtype=np.float32))
    assert pixels(load_image(unit))[0, :, 0].tolist() == [0, 128, 255]
    for wrong in (-1.0, 1e6, np.nan):
        with pytest.raises(ImageError, match="gray values"):
            load_image(Image.fromarray(np.array([[0, wrong]], dtype=np.float32)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation: int, tmp_path: Path) -> None:
    upright = random_rgb(16, 8)
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(pixels(load_image(tmp_path / "turned.png")), pixels(upright))


def test_an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("P", (4, 4), colour) for colour in (1, 2, 3)]
    for frame in frames:
        frame.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert pixels(load_image(tmp_path / "moving.gif"))[0, 0].tolist() == [255, 0, 0]


def test_a_given_image_is_not_modified() -> None:
    image = random_rgb().convert("RGBA")
    before = image.tobytes()
    load_image(image)
    assert (image.mode, image.tobytes()) == ("RGBA", before)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_files(kind: str, share: float, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    random_rgb(64, 64).save(buffer, kind)
    path = tmp_path / "cut"
    path.write_bytes(buffer.getvalue()[: int(len(buffer.getvalue()) * share)])
    try:
        load_image(path)
    except ImageError as error:
        assert "cut" in str(error)
    else:
        assert kind == "GIF", "only a GIF may have all pixels before its last bytes"


@pytest.mark.parametrize(
    "content", [b"", b"hello, this is no image", b"\x89PNG\r\n\x1a\n", b"GIF89a\0\0\0\0", b"\xff\xd8\xff"]
)
def test_not_an_image(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "text.png"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"text\.png"):
        load_image(path)


BAD_FILES = {
    "text": b"hello, this is no image",
    "nothing": b"",
    "cut PNG": b"\x89PNG\r\n\x1a\n",
    "cut JPEG": b"\xff\xd8\xff",
    "TIFF without tags": b"II*\0\x08\0\0\0\0\0\0\0\0\0",
    "PGM with a long number": b"P5 " + b"1" * 50,
    "PGM without pixels": b"P5 30 20 255\n123",
    "BMP of an unknown kind": b"BM" + bytes(10) + b"\x63" + bytes(60),
    "WebP": b"RIFF\x10\0\0\0WEBPVP8 ",
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_messages_have_no_words_of_libraries(name: str, tmp_path: Path) -> None:
    """No text of an exception, no object's repr, no address; the image's own name, and what would be right."""
    (tmp_path / "a.png").write_bytes(BAD_FILES[name])
    unreadable = f"not an image that can be read, expected one of {', '.join(FORMATS)}"
    allowed = (unreadable, "truncated or damaged")
    with pytest.raises(ImageError) as caught:
        load_image(tmp_path / "a.png")
    assert str(caught.value) in [f"image '{tmp_path / 'a.png'}': {text}" for text in allowed]
    with pytest.raises(ImageError) as caught:
        load_image(decode_image(io.BytesIO(BAD_FILES[name]), "image 3"), name="image 3")
    assert str(caught.value) in [f"image 3: {text}" for text in allowed]


@pytest.mark.parametrize("compression", ["group3", "group4", "tiff_ccitt"])
def test_faxes_are_refused(compression: str) -> None:
    """libtiff would write a line to standard error for each row of a damaged one."""
    buffer = io.BytesIO()
    random_rgb(64, 64).convert("1").save(buffer, "TIFF", compression=compression)
    with pytest.raises(ImageError, match=f"^image 0: TIFF compressed as '{compression}', expected raw, tiff_lzw, "):
        decode_image(buffer, "image 0")


@pytest.mark.parametrize("compression", TIFF_COMPRESSIONS)
def test_other_tiffs_are_read(compression: str) -> None:
    buffer = io.BytesIO()
    image = random_rgb()
    image.save(buffer, "TIFF", compression=compression)
    loaded = load_image(decode_image(buffer, "image 0"))
    assert loaded.size == image.size
    if compression != "jpeg":
        np.testing.assert_array_equal(pixels(loaded), pixels(image))


def test_a_picture_far_too_large_is_refused_in_our_words(tmp_path: Path) -> None:
    (tmp_path / "a.pgm").write_bytes(b"P5 90000 90000 255\n")
    with pytest.raises(ImageError) as caught:
        load_image(tmp_path / "a.pgm", max_pixels=1000)
    assert str(caught.value) == f"image '{tmp_path / 'a.pgm'}': more than 178956970 pixels, expected at most 1000"


def test_an_image_that_is_closed_is_not_called_damaged() -> None:
    image = Image.new("RGB", (4, 4))
    image.close()
    with pytest.raises(ImageError, match="image 0: closed, expected an open image"):
        load_image(image)


def test_an_image_without_a_file_name_has_its_place_for_a_name() -> None:
    buffer = io.BytesIO()
    random_rgb(64, 64).save(buffer, "PNG")
    cut = buffer.getvalue()[: len(buffer.getvalue()) // 2]
    for name in ("image 0", "image 2"):
        with pytest.raises(ImageError, match=f"^{name}: truncated or damaged$"):
            load_image(Image.open(io.BytesIO(cut)), name=name)
        with pytest.raises(ImageError, match=f"^{name}: 13 x 7 = 91 pixels"):
            load_image(random_rgb(), max_pixels=90, name=name)
        with pytest.raises(ImageError, match=f"^{name}: expected a PIL image or a path, got bytes"):
            load_image(cut, name=name)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["ICO", "EPS"])
def test_formats_that_decode_before_their_size_is_known(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"image.{kind.lower()}"
    Image.new("RGB", (64, 64)).save(path, kind)
    with pytest.raises(ImageError, match="expected one of PNG, JPEG"):
        load_image(path)


def test_not_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link.png").symlink_to("missing.png")
    for source in (tmp_path / "missing.png", "https://example.com/cat.png", "data:," + "A" * 9999, "a" * 9999, "a\0"):
        with pytest.raises(ImageError, match="no such file"):
            load_image(source)
    with pytest.raises(ImageError, match="'https://example.com/cat.png': no such file .*; URLs are not fetched here"):
        load_image("https://example.com/cat.png")
    with pytest.raises(ImageError, match="image '': no such file"):
        load_image("")
    for name, kind in ((".", "a directory"), ("pipe", "a pipe"), ("link.png", "a link to missing.png, which does not")):
        with pytest.raises(ImageError, match=f"{tmp_path / name}: {kind}"):
            load_image(tmp_path / name)
    with pytest.raises(ImageError, match="image 0: expected a PIL image or a path, got int"):
        load_image(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
def test_zero_size(size: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match="expected at least 1 x 1"):
        load_image(Image.new("RGB", size))


def test_the_pixel_limit_is_checked_before_decoding(tmp_path: Path) -> None:
    # 20000 x 20000 in the header and hardly any data after it: decoding would say "truncated".
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    for side in (9_500, 20_000):
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        path = tmp_path / "bomb.png"
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")))
        with pytest.raises(ImageError, match=r"expected at most \d+"):
            load_image(path)
    with pytest.raises(ImageError, match="13 x 7 = 91 pixels, expected at most 90"):
        load_image(random_rgb(), max_pixels=90)


def test_a_ppm_of_sixteen_bits_keeps_the_upper_eight(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 2**16, (7, 13, 3), dtype=np.uint16)
    path = tmp_path / "deep.ppm"
    path.write_bytes(b"P6\n# a comment\n13 7\n65535\n" + values.astype(">u2").tobytes())
    np.testing.assert_array_equal(pixels(load_image(path)), (values >> 8).astype(np.uint8))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ImageError, match="truncated or damaged"):
        load_image(path)


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("lossless", [False, True])
def test_a_webp_has_a_limit_of_its_own(
    frames: int, lossless: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert image.MAX_WEBP_PIXELS == 4096 * 4096
    monkeypatch.setattr(image, "MAX_WEBP_PIXELS", 64 * 48)
    for height in (48, 49):
        pictures = [Image.new("RGB", (64, height), colour) for colour in ("red", "blue")[:frames]]
        options: dict[str, Any] = {"save_all": True, "append_images": pictures[1:]} if frames > 1 else {}
        pictures[0].save(tmp_path / f"{height}.webp", lossless=lossless, **options)
    assert load_image(tmp_path / "48.webp").size == (64, 48)
    with pytest.raises(ImageError, match="a WebP of 64 x 49 = 3136 pixels, expected at most 3072; save it"):
        load_image(tmp_path / "49.webp")
