"""Transfers of arrays to a device: unchanged, in one block, and at fixed addresses for a graph."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dpn_rt.device.device import Known, PackedOutputs, StaticInputs
from dpn_rt.device.host import HostDevice
from dpn_rt.device.packing import ALIGNMENT, Packing
from tests.places import CountingDevice

DTYPES = [np.int32, np.int64, np.float32, np.float64]
SHAPES = [(), (1,), (3,), (0,), (2, 5), (0, 4), (2, 1, 3)]


def random_arrays() -> list[np.ndarray]:
    return [
        np.asarray(torch.randn(shape, dtype=torch.float64).numpy() * 1e4).astype(dtype)
        for dtype in DTYPES
        for shape in SHAPES
    ]


@pytest.mark.parametrize("device", [HostDevice(), CountingDevice()], ids=["host", "counting"])
def test_uploaded_arrays_are_what_they_were(device: HostDevice) -> None:
    arrays = random_arrays()
    tensors = device.upload(*arrays)
    device.upload(*random_arrays())
    for tensor, array in zip(tensors, arrays, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), array)
        assert tensor.is_contiguous() and torch.from_numpy(array.reshape(-1)).dtype == tensor.dtype


def test_arrays_that_are_no_blocks_of_memory() -> None:
    table = np.arange(60, dtype=np.int32).reshape(3, 4, 5)
    for array in (table[:, 1], table.T, table[:, :, ::2], np.broadcast_to(table[0, 0], (7, 5))):
        np.testing.assert_array_equal(HostDevice().upload(array)[0].numpy(), array)


def test_places_are_aligned_and_apart() -> None:
    packing = Packing.of(random_arrays())
    assert all(offset % ALIGNMENT == 0 for offset in packing.offsets)
    block = torch.zeros(packing.num_bytes, dtype=torch.uint8)
    for view in packing.views(block):
        view.view(-1).view(torch.uint8).add_(1)
    assert int(block.max()) == 1, "two arrays share a byte"


def test_nothing_to_upload() -> None:
    assert HostDevice().upload() == []


@pytest.mark.parametrize("device", [HostDevice(), CountingDevice()], ids=["host", "counting"])
def test_packed_outputs_come_in_one_transfer(device: HostDevice) -> None:
    arrays = random_arrays()
    before = device.readings if isinstance(device, CountingDevice) else 0
    outputs = PackedOutputs(device, [(array.shape, torch.from_numpy(array.reshape(-1)).dtype) for array in arrays])
    for tensor, array in zip(outputs.tensors, arrays, strict=True):
        tensor.copy_(torch.from_numpy(array))
    reading = outputs.read()
    if isinstance(device, CountingDevice):
        assert device.readings == before + 1
        for tensor in outputs.tensors:
            tensor.zero_()  # later work, which the transfer came before
    for found, array in zip(reading.wait(), arrays, strict=True):
        np.testing.assert_array_equal(found, array)
        assert found.dtype == array.dtype


def test_values_that_the_host_has_need_no_transfer() -> None:
    values = np.arange(5)
    assert Known(values).wait() is values


def test_static_inputs_stay_where_they_are() -> None:
    device = CountingDevice()
    inputs = StaticInputs(device, random_arrays())
    addresses = [tensor.data_ptr() for tensor in inputs.tensors]
    arrays = random_arrays()
    inputs.set(arrays)
    device.upload(*random_arrays())
    assert [tensor.data_ptr() for tensor in inputs.tensors] == addresses
    for tensor, array in zip(inputs.tensors, arrays, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), array)
    assert device.uploads == 3


@pytest.mark.parametrize("shape", [(2,), (4,), (3, 1), (1, 3)])
def test_static_inputs_of_another_shape(shape: tuple[int, ...]) -> None:
    inputs = StaticInputs(HostDevice(), [np.zeros(3, dtype=np.int32)])
    with pytest.raises(ValueError, match=r"shape \[.*\], its place \[3\]"):
        inputs.set([np.zeros(shape, dtype=np.int32)])
