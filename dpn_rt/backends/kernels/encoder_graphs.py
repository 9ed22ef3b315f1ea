"""Vision tower and projector as one graph per number of images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dpn_rt.device.device import Device, StaticInputs
from dpn_rt.model.vision.clip import IMAGES_PER_CALL, ClipConfig, ImageEncoder


class EncoderGraphs:
    """An `Encoder` whose images go to the device in one transfer for up to `IMAGES_PER_CALL` of them."""

    def __init__(self, encoder: ImageEncoder, config: ClipConfig, device: Device) -> None:
        """Records all numbers of images; the largest first, in whose memory the others fit."""
        self._graphs = {count: EncoderGraph(encoder, config, device, count) for count in range(IMAGES_PER_CALL, 0, -1)}

    def encode(self, pixel_values: Sequence[Tensor]) -> list[Tensor]:
        """Decoder rows `[num_visual_tokens, hidden_size]` of each image `[3, image_size, image_size]` on the CPU."""
        rows: list[Tensor] = []
        for first in range(0, len(pixel_values), IMAGES_PER_CALL):
            part = pixel_values[first : first + IMAGES_PER_CALL]
            rows += self._graphs[len(part)].run(part)
        return rows


class EncoderGraph:
    """`count` images at a time."""

    def __init__(self, encoder: ImageEncoder, config: ClipConfig, device: Device, count: int) -> None:
        self._encoder = encoder
        shape = (3, config.image_size, config.image_size)
        self._inputs = StaticInputs(device, [np.zeros(shape, dtype=np.float32)] * count)
        self._graph = device.record(self._step)

    def run(self, pixel_values: Sequence[Tensor]) -> list[Tensor]:
        """Decoder rows of each image, in memory of their own."""
        self._inputs.set([pixels.numpy() for pixels in pixel_values])
        self._graph.replay()
        return [rows.clone() for rows in self._graph.outputs[0]]

    def _step(self) -> tuple[Tensor, ...]:
        return (self._encoder.forward(torch.stack(self._inputs.tensors)),)
