"""Transfers to a device, which the host does not wait for, and one from a device, which it waits for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dpn_rt.device.packing import Array, Packing


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on `device` of a tensor of the host; the tensor itself where the device is the CPU."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Array:
    """The values of a tensor, once they are computed and have arrived; not copied where they are on the host."""
    return tensor.numpy(force=True)


def upload(device: torch.device, *arrays: Array, staging: Callable[[int], Tensor] | None = None) -> list[Tensor]:
    """Copies of arrays on a device, sent in one transfer.

    Args:
        device: that receives them.
        arrays: of any shapes and dtypes.
        staging: allocates `[num_bytes]` uint8 of the host's memory to send from; None: pinned memory for a GPU, else
            ordinary memory.

    Returns:
        One tensor per array, with its shape and dtype.
    """
    packing = Packing.of(arrays)
    if staging is None:
        block = torch.empty(packing.num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda", device="cpu")
    else:
        block = staging(packing.num_bytes)
    packing.fill(block, arrays)
    return packing.views(block.to(device, non_blocking=True))
