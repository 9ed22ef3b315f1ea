"""A vision encoder that all ranks share."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dpn_rt.backends.parallel.parallel_executor import ParallelExecutor
from dpn_rt.device.device import Device
from dpn_rt.device.transfer import to_device
from dpn_rt.model.vision.encoder import Crop, CropEncoder, EncodedImage, encode_images, stack_views
from dpn_rt.model.vision.visual_input import VisualInput


class ParallelEncoder:
    """A `VisionEncoder` on all ranks: rank 0 sends crops, and all compute them together."""

    def __init__(self, encoder: CropEncoder, executor: ParallelExecutor, device: Device) -> None:
        """
        Args:
            encoder: rank 0's part.
            executor: of all ranks.
            device: of rank 0.
        """
        self._encoder, self._executor, self._device = encoder, executor, device.torch_device

    def encode(self, images: Sequence[VisualInput]) -> list[EncodedImage]:
        """Decoder rows of each image, on rank 0's device."""
        return encode_images(self._encoder, images, self._run)

    def _run(self, crops: Sequence[Crop]) -> Sequence[Tensor]:
        views = [to_device(view, self._device) for view in stack_views(crops)]
        return self._executor.encode(*views).unbind(0)
