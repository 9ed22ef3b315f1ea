"""Images from files and libraries -> 8-bit RGB, checked before anything large is decoded."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import BinaryIO

from PIL import ExifTags, Image, ImageOps

from dpn_rt.errors import ImageError
from dpn_rt.prompts.data_url import is_data_url, is_encoded, shorten
from dpn_rt.prompts.gray import eight_bits, gray_range, is_wide_gray
from dpn_rt.prompts.image_blocks import TooManyBlocksError, check_blocks
from dpn_rt.prompts.image_metadata import without_metadata
from dpn_rt.schema.files import is_there, open_file

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Formats that are read, header first. Pillow's readers of other formats decode at once or run programs."""

TIFF_COMPRESSIONS = ("raw", "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "packbits", "jpeg")
"""As Pillow names them. libtiff writes a line to standard error for each row of a damaged fax, and more seldom ones are
little tried."""

MAX_PIXELS = 89_478_485
"""Largest number of pixels, in the file and after padding: Pillow's bound for suspicious images, 256 MiB of RGB."""

MAX_WEBP_PIXELS = 2**24
"""Of a WebP, such as 4096 x 4096. It is decoded as a whole, at sixteen bytes a pixel and more, and Python's lock is
kept while the picture is handed over: larger ones would take more than 300 MB and a second."""


def load_image(
    source: Image.Image | str | os.PathLike[str], max_pixels: int = MAX_PIXELS, name: str = "image 0"
) -> Image.Image:
    """An upright 8-bit RGB image. It may be the one that is given.

    EXIF rotation is applied and other metadata are skipped. Gray samples of more than 8 bits are scaled by the range of
    their format (`dpn_rt.prompts.gray`). Alpha is dropped, not blended, and so is a colour that counts as transparent:
    LLaVA does the same, and models are trained on the resulting colours.

    Args:
        source: a PIL image (not modified) or the path of a file. The frame of an animation is the current or first one.
        max_pixels: checked from the file's header, before decoding.
        name: of an image without a file name in messages.

    Raises:
        ImageError: it is not a file, not an image, truncated, of zero size, or larger than `max_pixels`.
    """
    if isinstance(source, Image.Image):
        file_name = str(getattr(source, "filename", ""))
        return _to_rgb(source, f"image {file_name!r:.200}" if file_name else name, max_pixels)
    if not isinstance(source, str | os.PathLike):
        raise ImageError(f"{name}: expected a PIL image or a path, got {type(source).__name__}")
    name = f"image {os.fspath(source)!r:.200}"
    # Reading a device or pipe would block, and URLs are never fetched.
    is_named = bool(os.fspath(source))  # Path("") is this directory
    if not is_named or (not _is_file(source) and not is_there(Path(source))):
        raise ImageError(_no_file(os.fspath(source)))
    with open_file(Path(source), ImageError) as file, decode_image(file, name, max_pixels) as image:
        return _to_rgb(image, name, max_pixels)


def decode_image(file: BinaryIO, name: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A PIL image of which only the header has been read. The file must stay open until it is loaded.

    Args:
        name: of the image in messages.

    Raises:
        ImageError: it is not an image, far too large, or made to take long.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            pixels = without_metadata(file)
            check_blocks(pixels)
            pixels.seek(0)
            image = Image.open(pixels, formats=FORMATS)
    except TooManyBlocksError as error:
        raise ImageError(f"{name}: {error}: it would take too long to read") from error
    except Image.DecompressionBombError as error:
        bound = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise ImageError(f"{name}: more than {bound} pixels, expected at most {max_pixels}") from error
    except Exception as error:  # Pillow's readers raise OSError, SyntaxError, struct.error and others on bad files
        raise ImageError(f"{name}: not an image that can be read, expected one of {', '.join(FORMATS)}") from error
    compression = image.info.get("compression", "raw") if image.format == "TIFF" else "raw"
    if compression not in TIFF_COMPRESSIONS:
        raise ImageError(f"{name}: TIFF compressed as {compression!r:.40}, expected {', '.join(TIFF_COMPRESSIONS)}")
    if image.format == "PPM" and image.tile[0][0] == "ppm" and image.tile[0][3] == ("RGB", 65535):
        _, box, offset, _ = image.tile[0]
        # Pillow would read the samples one by one, in Python.
        image.tile = [("raw", box, offset, ("RGB;16B", 0, 1))]  # type: ignore[list-item]
    width, height = image.size
    if image.format == "WEBP" and width * height > MAX_WEBP_PIXELS:
        wanted = f"expected at most {MAX_WEBP_PIXELS}; save it as JPEG or PNG"
        raise ImageError(f"{name}: a WebP of {width} x {height} = {width * height} pixels, {wanted}")
    return image


def _no_file(path: str) -> str:
    """The message for what is no file. It may be the data of an image, which are not repeated."""
    is_data = is_data_url(path) or is_encoded(path)
    name = f"image {shorten(path) if is_data else f'{path!r:.200}'}"
    hint = ""
    if is_data:
        hint = '; data: {"type": "image_url", "image_url": "data:image/png;base64,..."}'
    elif "://" in path:
        hint = "; URLs are not fetched here"
    return f"{name}: no such file (expected a PIL image or the path of an image file{hint})"


def _is_file(source: str | os.PathLike[str]) -> bool:
    try:
        return Path(source).is_file()
    except OSError:  # longer than a name may be, as a data URL is
        return False


def _to_rgb(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    width, height = image.size
    if width <= 0 or height <= 0:
        raise ImageError(f"{name}: {width} x {height} pixels, expected at least 1 x 1")
    if width * height > max_pixels:
        raise ImageError(f"{name}: {width} x {height} = {width * height} pixels, expected at most {max_pixels}")
    try:
        image.load()
        return _eight_bit_rgb(image, name)
    except ImageError:
        raise
    except Exception as error:  # as in `decode_image`: decoders raise anything on bad files
        is_closed = str(error) == "Operation on closed image"
        fault = "closed, expected an open image" if is_closed else "truncated or damaged"
        raise ImageError(f"{name}: {fault}") from error


def _upright(image: Image.Image) -> Image.Image:
    """The image itself where it is upright: a copy could take a third of a gigabyte."""
    try:
        is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(image) if is_turned else image
    except Exception:  # damaged EXIF data does not make the image unreadable
        return image


def _eight_bit_rgb(image: Image.Image, name: str) -> Image.Image:
    """May be the image itself."""
    upright = _upright(image)
    if is_wide_gray(image):
        return eight_bits(upright, gray_range(image), name).convert("RGB")
    if upright.mode in ("RGBa", "La"):
        upright = upright.convert({"RGBa": "RGBA", "La": "LA"}[upright.mode])
    if upright.mode == "RGB" and "transparency" not in upright.info and upright.format != "WEBP":
        return upright
    # A copy where it is RGB already: a WebP keeps its decoder, with two pictures of the size of the image.
    rgb = upright.convert("RGB")
    rgb.info.pop("transparency", None)  # by this transformers would blend one colour with white
    return rgb
