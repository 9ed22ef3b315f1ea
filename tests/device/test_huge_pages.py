"""Memory in huge pages, and tensors that are copied into it."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpn_rt.device import huge_pages
from dpn_rt.device.huge_pages import gather, has_huge_pages, huge_memory

DTYPES = [torch.uint8, torch.bfloat16, torch.float32, torch.float8_e4m3fn]


@given(
    shapes=st.lists(
        st.tuples(st.lists(st.integers(0, 9), max_size=3), st.sampled_from(DTYPES), st.booleans()), max_size=6
    )
)
def test_copies_are_aligned_and_equal(shapes: list[tuple[list[int], torch.dtype, bool]]) -> None:
    tensors = {}
    for i, (shape, dtype, strided) in enumerate(shapes):
        tensor = torch.randn(*shape, 2)[..., 0] if strided else torch.randn(shape)
        tensors[f"weight {i}"] = tensor.to(dtype)
    wanted = {name: tensor.clone() for name, tensor in tensors.items()}
    copies = gather(tensors, required=True)
    assert not tensors and list(copies) == list(wanted)
    for name, copy in copies.items():
        assert copy.shape == wanted[name].shape and copy.dtype == wanted[name].dtype and copy.is_contiguous()
        assert copy.data_ptr() % 64 == 0
        assert torch.equal(copy.float(), wanted[name].float())


def test_no_room() -> None:
    with pytest.raises(MemoryError, match=r"1,152,921,504,606,846,976 bytes"):
        huge_memory(1 << 60)
    large = torch.empty(1, dtype=torch.uint8).expand(1 << 60)
    tensors = {"large": large, "small": torch.ones(1)}
    with pytest.raises(MemoryError):
        gather(dict(tensors), required=True)
    assert gather(tensors, required=False) == tensors


def test_a_system_without_madvise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert not has_huge_pages()
    assert huge_memory(5).shape == (5,)
    with pytest.raises(MemoryError, match=r"1,152,921,504,606,846,976 bytes"):
        huge_memory(1 << 60)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("always [madvise] never\n", True), ("[always] madvise never\n", True), ("always madvise [never]\n", False)],
)
def test_what_the_system_gives(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, expected: bool) -> None:
    monkeypatch.setattr(huge_pages, "SETTING", tmp_path / "enabled")
    assert not has_huge_pages()
    (tmp_path / "enabled").write_text(text)
    assert has_huge_pages() == (expected and hasattr(mmap, "MADV_HUGEPAGE"))
