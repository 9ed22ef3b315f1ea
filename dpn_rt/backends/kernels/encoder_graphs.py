"""A vision encoder and its projector as one graph per number of crops."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from dpn_rt.device.device import Device, StaticInputs
from dpn_rt.model.vision.encoder import Crop, CropEncoder, EncodedImage, encode_images, stack_views
from dpn_rt.model.vision.visual_input import VisualInput


class EncoderGraphs:
    """A `VisionEncoder` on a device. It encodes up to `crops_per_call` crops at a time, sent in one transfer."""

    def __init__(self, encoder: CropEncoder, device: Device) -> None:
        """Records a graph for every number of crops. The largest comes first, so that the others fit in its memory."""
        self._encoder = encoder
        self._graphs = {count: EncoderGraph(encoder, device, count) for count in range(encoder.crops_per_call, 0, -1)}

    def encode(self, images: Sequence[VisualInput]) -> list[EncodedImage]:
        """Decoder rows of each image, on the device."""
        return encode_images(self._encoder, images, lambda crops: self._graphs[len(crops)].run(crops))


class EncoderGraph:
    """Encodes `count` crops at a time."""

    def __init__(self, encoder: CropEncoder, device: Device, count: int) -> None:
        self._encoder, self._count = encoder, count
        views = [np.zeros(shape, dtype=np.float32) for shape in encoder.config.view_shapes]
        self._inputs = StaticInputs(device, views * count)
        self._graph = device.record(self._step)

    def run(self, crops: Sequence[Crop]) -> list[Tensor]:
        """Decoder rows `[rows_per_crop, hidden_size]` of each crop, copied out of the graph's memory."""
        self._inputs.set([view.numpy() for crop in crops for view in crop])
        self._graph.replay()
        return [rows.clone() for rows in self._graph.outputs[0]]

    def _step(self) -> tuple[Tensor, ...]:
        views = self._inputs.tensors
        size = len(views) // self._count
        crops = [tuple(views[first : first + size]) for first in range(0, len(views), size)]
        return (self._encoder.forward(stack_views(crops)),)
