"""Images to views: what every encoder's preprocessor offers, and the steps that they share."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from dpn_rt.errors import EngineError, ImageError
from dpn_rt.model.vision.image_settings import check_image_settings
from dpn_rt.model.vision.visual_input import VisualInput
from dpn_rt.schema.files import SETTINGS_BYTES, is_there, read_file
from dpn_rt.schema.json_text import read_json
from dpn_rt.schema.packages import import_large

SETTINGS = "preprocessor_config.json"
OTHERS = ("processor_config.json", "config.json", "tokenizer_config.json")
CLIP_MEAN_COLOUR = (122, 116, 104)
"""CLIP's mean colour. LLaVA pads images with it, whatever the encoder."""


class Preprocessor(Protocol):
    """Makes images ready for one vision encoder. Safe to call from several threads."""

    def __call__(self, image: Image.Image, num_images: int = 1) -> VisualInput:
        """The views of an RGB image.

        Args:
            image: of any size.
            num_images: of its prompt: some models see an image among others in less detail.

        Raises:
            ImageError: the encoder cannot take it.
        """

    def picture(self, image: VisualInput) -> Image.Image:
        """The RGB picture that the encoder sees: resized, padded or cropped."""


def pad_to_square(image: Image.Image, max_pixels: int) -> Image.Image:
    """The RGB image in the middle of a square of CLIP's mean colour, at offset floor(difference / 2), as LLaVA pads.

    Raises:
        ImageError: the square would have more than `max_pixels` pixels.
    """
    width, height = image.size
    side = max(width, height)
    if width == height:
        return image
    if side * side > max_pixels:
        raise ImageError(
            f"image of {width} x {height}: {side * side} pixels when padded to a square, expected at most {max_pixels}"
        )
    square = Image.new("RGB", (side, side), CLIP_MEAN_COLOUR)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def picture_of(pixels: Tensor, settings: Any) -> Image.Image:
    """The RGB picture that pixel values show.

    Args:
        pixels: `[3, height, width]` float32.
        settings: the image processor that made them.
    """
    if settings.do_normalize:
        mean, std = (
            torch.tensor(values, device="cpu").view(3, 1, 1) for values in (settings.image_mean, settings.image_std)
        )
        pixels = pixels * std + mean
    if settings.do_rescale:
        pixels = pixels / settings.rescale_factor
    return Image.fromarray(pixels.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy(), "RGB")


def load_image_processor(directory: Path) -> Any:
    """The image processor of transformers that `preprocessor_config.json` names, on PIL and numpy.

    The variant on torchvision needs a package that may be missing.

    Args:
        directory: holds `preprocessor_config.json` (or `processor_config.json`).

    Raises:
        EngineError: it cannot be loaded.
    """
    settings = _read_settings(directory)
    if settings is not None:
        check_image_settings(settings, directory / SETTINGS)
    try:
        # From its own module: where there is no torchvision, the name that the package of transformers 5.4 to 5.19 has
        # for it can do nothing but ask for torchvision. The import takes seconds.
        loader: Any = import_large("transformers.models.auto.image_processing_auto").AutoImageProcessor
        # The keyword's name changed within transformers 5, together with this module.
        has_backends = find_spec("transformers.image_processing_backends") is not None
        choice: dict[str, Any] = {"backend": "pil"} if has_backends else {"use_fast": False}
        return loader.from_pretrained(directory, local_files_only=True, trust_remote_code=False, **choice)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and ImportError here
        reason = f"{SETTINGS} is missing" if settings is None else _reason(settings.get("image_processor_type"))
        raise EngineError(f"{directory}: cannot load the image processor: {reason}") from error


def _read_settings(directory: Path) -> dict[str, Any] | None:
    """The settings; None where the directory has no file of them. Other files that transformers looks into are checked
    as files, so that it finds no pipe."""
    for name in OTHERS:
        if is_there(directory / name):
            read_file(directory / name, EngineError, SETTINGS_BYTES)
    if not is_there(directory / SETTINGS):
        return None
    settings = read_json(directory / SETTINGS, EngineError, SETTINGS_BYTES)
    if not isinstance(settings, dict):
        raise EngineError(f"{directory}: cannot load the image processor: {SETTINGS} is not a JSON object")
    return settings


def _reason(kind: object) -> str:
    """Why transformers may have refused an image processor, in our words."""
    return (
        f"{SETTINGS} has image_processor_type={kind!r:.80}, expected one that transformers knows, such as "
        "'CLIPImageProcessor', and settings that it takes"
    )
