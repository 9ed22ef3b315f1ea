from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpn_rt import ops
from dpn_rt.errors import KernelArgumentError
from tests.ops.segment_cases import (
    Image,
    Sample,
    expected_rows,
    int32,
    new_random,
    ragged,
    random_image,
    row_arguments,
    text,
)


def rows_of(samples: list[Sample]) -> list[int]:
    expected = expected_rows(samples)
    out = torch.full((len(expected),), -1, dtype=torch.int64)
    assert ops.kept_rows(**row_arguments(samples), out=out) is out
    return out.tolist()


def test_ragged_images() -> None:
    samples = ragged(new_random())
    assert rows_of(samples) == expected_rows(samples)


def test_a_large_batch_in_parallel() -> None:
    samples = ragged(new_random()) * 12
    assert rows_of(samples) == expected_rows(samples)


@pytest.mark.parametrize("samples", [[], [text(0)], [text(2)], [Sample((Image(0, 0, ()),), 0)]], ids=str)
def test_smallest_batches(samples: list[Sample]) -> None:
    assert rows_of(samples) == expected_rows(samples)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_every_row_that_stays_is_there_once_and_in_order(data: st.DataObject, seed: int) -> None:
    generator, samples = np.random.default_rng(seed), []
    for _ in range(data.draw(st.integers(1, 5))):
        images = []
        for _ in range(data.draw(st.integers(0, 4))):
            rows = data.draw(st.integers(0, 40))
            images.append(random_image(generator, rows, data.draw(st.integers(0, rows)), data.draw(st.integers(0, 4))))
        samples.append(Sample(tuple(images), data.draw(st.integers(0, 5))))
    assert rows_of(samples) == expected_rows(samples)


def test_what_the_largest_scores_keep() -> None:
    """Scores to rows without leaving the device, as a reducer does it."""
    scores = torch.tensor([0.1, 0.4, 0.2, 0.3, 0.9, 0.8, 0.7])
    cu_images, cu_scores, cu_kept = int32([0, 1, 1, 2]), int32([0, 4, 7]), int32([0, 2, 3])
    kept = ops.segmented_top_k(scores, cu_scores, cu_kept)
    # 2 rows of text, 4 of an image and 1; 3 of text; 3 of an image.
    cu_seqlens, out_cu_seqlens = int32([0, 7, 10, 13]), int32([0, 5, 8, 9])
    rows = ops.kept_rows(
        cu_seqlens, cu_images, int32([2, 0]), int32([4, 3]), kept, cu_kept, out_cu_seqlens, num_tokens=13
    )
    assert rows[:9].tolist() == [0, 1, 3, 5, 6, 7, 8, 9, 10]
    assert (rows[9:] == 0).all()
    hidden = torch.rand(13, 5)
    assert torch.equal(hidden.index_select(0, rows)[4], hidden[6])


@pytest.mark.cpu_only
def test_bad_arguments_are_refused_by_name() -> None:
    # 2 rows, an image of 6, 1 row, an image of 3 and 1 row; then 3 rows of text.
    samples = [Sample((Image(2, 6, (0, 3, 5)), Image(1, 3, (1,))), 1), text(3)]
    good = row_arguments(samples)
    out = torch.full((11,), -1, dtype=torch.int64)
    arguments = {**good, "num_tokens": 16, "out": out}
    kept = good["kept"]
    memory = torch.zeros(22, dtype=torch.int32)
    cases: list[tuple[dict[str, object], str]] = [
        ({"cu_seqlens": int32([0, 13])}, r"cu_images has shape \[3\], expected \[num_seqs \+ 1=2\]"),
        ({"cu_seqlens": int32([])}, "cu_seqlens is empty, expected num_seqs \\+ 1 entries"),
        ({"cu_seqlens": int32([0, 17, 16])}, r"cu_seqlens\[2\] is 16, expected at least 17"),
        ({"cu_seqlens": int32([0, 11, 16])}, r"image_lengths\[1\] is 3 from row 9 on, but the sequence has 11 rows"),
        ({"cu_seqlens": torch.tensor([0, 13, 16])}, "cu_seqlens has dtype int64"),
        ({"num_tokens": 17}, r"cu_seqlens\[2\] is 16, expected num_tokens=17"),
        ({"cu_images": int32([0, 2, 1])}, r"cu_images\[2\] is 1, expected at least 2"),
        ({"cu_images": int32([0, 1, 1])}, r"cu_images\[2\] is 1, expected num_images=2"),
        ({"cu_images": int32([0, 1, 2])}, r"out_cu_seqlens gives sequence 0 8 rows, expected 10"),
        ({"cu_images": int32([0, 0, 2])}, r"out_cu_seqlens gives sequence 0 8 rows, expected 13"),
        ({"image_starts": int32([2])}, r"image_lengths has shape \[2\], expected \[num_images=1\]"),
        ({"image_starts": int32([-1, 9])}, r"image_lengths\[0\] is 6 from row -1 on"),
        ({"image_starts": int32([2, 11])}, r"image_lengths\[1\] is 3 from row 11 on, but the sequence has 13 rows"),
        (
            {"image_starts": int32([2, 7])},
            r"image_starts\[1\] is 7, expected at least 8, where the image before it ends",
        ),
        ({"image_starts": int32([9, 2])}, r"image_lengths\[0\] is 6 from row 9 on"),
        ({"image_starts": int32([2**31 - 1, 9])}, r"image_lengths\[0\] is 6 from row 2147483647 on"),
        ({"image_lengths": int32([-6, 3])}, r"image_lengths\[0\] is -6, expected at least 0"),
        ({"image_lengths": int32([6, 2**31 - 1])}, r"image_lengths\[1\] is 2147483647 from row 9 on"),
        ({"image_lengths": int32([5, 3])}, r"kept\[2\] is 5, expected 4 to 4: ascending rows of image 0"),
        ({"image_lengths": torch.tensor([6, 3])}, "image_lengths has dtype int64"),
        ({"kept": int32([0, 3, 6, 1])}, r"kept\[2\] is 6, expected 4 to 5: ascending rows of image 0"),
        ({"kept": int32([0, 3, 3, 1])}, r"kept\[2\] is 3, expected 4 to 5: ascending rows of image 0"),
        ({"kept": int32([3, 0, 5, 1])}, r"kept\[1\] is 0, expected 4 to 5"),
        ({"kept": int32([-1, 3, 5, 1])}, r"kept\[0\] is -1, expected 0 to 5"),
        ({"kept": int32([0, 3, 5, 3])}, r"kept\[3\] is 3, expected 0 to 2: ascending rows of image 1"),
        ({"kept": kept[:3]}, r"cu_kept\[2\] is 4, expected num_kept=3"),
        ({"kept": kept.long()}, "kept has dtype int64"),
        ({"cu_kept": int32([0, 4])}, r"cu_kept has shape \[2\], expected \[num_images \+ 1=3\]"),
        ({"cu_kept": int32([0, 5, 4])}, r"cu_kept\[2\] is 4, expected at least 5"),
        ({"cu_kept": int32([1, 3, 4])}, r"cu_kept\[0\] is 1, expected 0"),
        ({"out_cu_seqlens": int32([0, 9, 11])}, "out_cu_seqlens gives sequence 0 9 rows, expected 8 from what its"),
        ({"out_cu_seqlens": int32([0, 8, 12])}, r"out_cu_seqlens\[2\] is 12, expected num_out_tokens=11"),
        ({"out_cu_seqlens": int32([0, 8, 17]), "out": None}, "out_cu_seqlens ends at 17, expected at most 16"),
        ({"out_cu_seqlens": int32([0, 8, -1]), "out": None}, "out_cu_seqlens ends with -1"),
        ({"out_cu_seqlens": int32([]), "out": None}, "out_cu_seqlens is empty"),
        ({"out": out.int()}, "out has dtype int32, expected int64"),
        ({"out": out[:10]}, r"out_cu_seqlens\[2\] is 11, expected num_out_tokens=10"),
        ({"kept": memory[:4], "out": memory.view(torch.int64)}, "out shares memory with kept"),
    ]
    for change, message in cases:
        with pytest.raises(KernelArgumentError, match=f"kept_rows: {message}"):
            ops.kept_rows(**(arguments | change))  # type: ignore[arg-type]
    assert (out == -1).all()
