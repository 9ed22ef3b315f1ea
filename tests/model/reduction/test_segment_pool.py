"""What pooling before the decoder sends to a device."""

from __future__ import annotations

import numpy as np
import torch

from dpn_rt.model.reduction.segment_pool import upload_to


def test_arrays_are_sent_in_one_transfer() -> None:
    arrays = [np.array([0, 7], dtype=np.int32), np.array([[2, 3], [4, 5]], dtype=np.int32), np.empty((0, 2), np.int32)]
    tensors = upload_to(torch.device("cpu"))(*arrays)
    for tensor, array in zip(tensors, arrays, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), array)
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1, "parts of one block"
