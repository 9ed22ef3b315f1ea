"""From the host to a device, without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from dpn_rt.device.packing import Array, Packing


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of a tensor of the host, or the tensor itself where the device is the host."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def upload(device: torch.device, *arrays: Array) -> list[Tensor]:
    """Copies of arrays on a device, by one transfer."""
    packing = Packing.of(arrays)
    block = torch.empty(packing.num_bytes, dtype=torch.uint8)
    packing.fill(block, arrays)
    return packing.views(to_device(block, device))
