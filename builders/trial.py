"""Tries an engine's processor files before the weights are written, as the runtime will load and use them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from dpn_rt.builders.temporary_files import temporary_files
from dpn_rt.errors import CheckpointError, DpnError
from dpn_rt.format.config import ModelConfig
from dpn_rt.prompts.processor import Processor

TRIAL_SIZES = ((64, 64), (48, 80))
"""Width and height of the pictures that are tried. A processor may do for square ones alone."""


def try_processor(path: Path, files: Mapping[str, bytes], model: ModelConfig) -> None:
    """Load tokenizer and image processor from just these files, and process pictures.

    Args:
        path: of the checkpoint, for messages.
        files: content by name, as in an engine's `processor/`.
        model: the engine's.

    Raises:
        CheckpointError: something cannot be loaded, or the tower cannot take what the image processor makes.
    """
    with temporary_files(files) as directory:
        try:
            processor = Processor(directory if files else None, model)
            for size in TRIAL_SIZES if processor.takes_images else ():
                processor.image(Image.new("RGB", size, (200, 100, 50)))
        except DpnError as error:
            reason = str(error).replace(f"{directory}: ", "").replace(f"{directory}/", "")
            raise CheckpointError(f"{path}: an engine with these files would not work: {reason}") from error
        except Exception as error:  # of any kind: transformers checks some settings only when it uses them
            raise CheckpointError(
                f"{path}: an engine with these files would not work: the image processor fails on a picture, expected "
                "settings in preprocessor_config.json that transformers takes"
            ) from error
