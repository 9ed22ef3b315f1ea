from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpn_rt import ops
from dpn_rt.errors import KernelArgumentError
from tests.ops.conftest import assert_close_to_reference, poisoned, random_rows, seeded
from tests.ops.last_row_cases import (
    HEADS,
    OTHER_HEADS,
    RAGGED,
    SIZES,
    Batch,
    Heads,
    Prompt,
    Segment,
    int32,
    one_image,
    text,
)


def floor(batch: Batch, reference: Tensor) -> float:
    """Absolute allowance over the error of torch in float32, which may be exact by chance.

    A product of a query and a key is off by at most a few units in the last place of the sum of its terms' sizes, and
    a score by as much in proportion; no score is above 1.
    """
    q, k = batch.q.float().abs(), batch.k.float().abs()
    groups = q.shape[1] // k.shape[1]
    products = torch.einsum("qghd,kgd->qghk", q.unflatten(1, (-1, groups)), k)
    largest = products.max().item() if products.numel() else 0.0
    largest_score = reference.max().item() if batch.num_scores else 0.0
    return 1e-8 + 2**-23 * batch.scale * largest * largest_score


def packed(batch: Batch) -> Tensor:
    out = poisoned((batch.num_scores,), torch.float32)
    assert ops.last_row_scores(**batch.packed_arguments, scale=batch.scale, first_keys=batch.first_keys, out=out) is out
    return out


def paged(batch: Batch, block_size: int = 16) -> Tensor:
    out = poisoned((batch.num_scores,), torch.float32)
    arguments = batch.paged_arguments(block_size)
    options = {"scale": batch.scale, "first_keys": batch.first_keys, "out": out}
    assert ops.last_row_scores_paged(**arguments, **options) is out  # type: ignore[arg-type]
    return out


def check(batch: Batch, block_size: int = 16) -> None:
    reference, same_precision = batch.reference(torch.float64), batch.reference(torch.float32)
    allowed = floor(batch, reference)
    for out in (packed(batch), paged(batch, block_size)):
        assert_close_to_reference(out, reference, same_precision, allowed)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("rows", SIZES)
def test_one_image(generator: torch.Generator, dtype: torch.dtype, heads: Heads, rows: int) -> None:
    check(Batch([one_image(rows)], heads, dtype, generator))


@pytest.mark.parametrize("heads", [*HEADS, *OTHER_HEADS], ids=str)
@pytest.mark.parametrize("block_size", [1, 16, 19])
def test_any_number_of_images(generator: torch.Generator, dtype: torch.dtype, heads: Heads, block_size: int) -> None:
    check(Batch(RAGGED, heads, dtype, generator), block_size)


def test_many_sequences_in_several_waves(generator: torch.Generator, dtype: torch.dtype) -> None:
    prompts = [one_image(30_000), text(10), Prompt(((40_000, 100),), 3), *[one_image(20)] * 40, one_image(20_000)]
    check(Batch(prompts, Heads(32, 2, 16), dtype, generator))


def test_scores_of_all_rows_add_up_to_one(generator: torch.Generator, dtype: torch.dtype) -> None:
    batch = Batch([one_image(600, 0, 0)], Heads(8, 4, 64), dtype, generator)
    for out in (packed(batch), paged(batch)):
        assert abs(out.double().sum().item() - 1) < 1e-6


def test_large_scores_do_not_overflow(generator: torch.Generator, dtype: torch.dtype) -> None:
    batch = Batch([one_image(300), one_image(17)], Heads(4, 2, 64), dtype, generator)
    batch.q *= 40  # products up to a thousand: heads that look at one key
    reference, same_precision = batch.reference(torch.float64), batch.reference(torch.float32)
    allowed = floor(batch, reference)
    for out in (packed(batch), paged(batch)):
        assert_close_to_reference(out, reference, same_precision, allowed)


@pytest.mark.parametrize("heads", [Heads(8, 2, 16), Heads(3, 3, 64), Heads(17, 1, 32)], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99, 1.0])
def test_windows(generator: torch.Generator, dtype: torch.dtype, heads: Heads, share: float) -> None:
    prompts = [one_image(600), text(9), one_image(1), one_image(40, 1500, 900), Prompt(((5, 70), (5, 70)), 0)]
    batch = Batch(prompts, heads, dtype, generator)
    first_keys = [int(share * (length - 1)) for length in batch.lengths]
    batch.first_keys = int32(first_keys)
    check(batch, 19)
    for out in (packed(batch), paged(batch)):
        hidden = [
            segment.start + row < first_keys[segment.query] for segment in batch.segments for row in range(segment.rows)
        ]
        assert (out[torch.tensor(hidden)] == 0).all()


def test_segments_in_any_order_and_overlapping(generator: torch.Generator, dtype: torch.dtype) -> None:
    batch = Batch([one_image(100), one_image(50), text(9)], Heads(4, 2, 64), dtype, generator)
    rows = [Segment(1, 20, 60), Segment(0, 0, 160), Segment(1, 0, 110), Segment(0, 30, 0), Segment(0, 159, 1)]
    batch.segments = [*rows, Segment(2, 9, 0)]
    check(batch)


def test_no_queries_and_no_segments(generator: torch.Generator, dtype: torch.dtype) -> None:
    for prompts in ([], [text(0)], [text(5), text(0)], [Prompt(((3, 0),), 2)]):
        batch = Batch(prompts, Heads(2, 1, 16), dtype, generator)
        assert packed(batch).shape == paged(batch).shape == (0,)


def test_strided_rows(generator: torch.Generator, dtype: torch.dtype) -> None:
    batch = Batch([one_image(60), one_image(33)], Heads(8, 2, 64), dtype, generator)
    expected = packed(batch), paged(batch)
    wide = random_rows(generator, (len(batch.q), 24, 64), dtype)
    wide[:, 8:16] = batch.q
    fused = random_rows(generator, (len(batch.k), 3, 5, 64), dtype)
    fused[:, 1, ::3] = batch.k
    batch.q, batch.k = wide[:, 8:16], fused[:, 1, ::3]
    assert torch.equal(packed(batch), expected[0])
    assert torch.equal(paged(batch), expected[1])


def test_nan_stays_in_its_sequence(generator: torch.Generator, dtype: torch.dtype) -> None:
    batch = Batch([one_image(100), one_image(150), one_image(20)], Heads(4, 2, 64), dtype, generator)
    batch.k[160 + 209, 1, 5] = float("nan")  # a row of text
    for out in (packed(batch), paged(batch)):
        assert out[100:250].isnan().all()
        assert out[:100].isfinite().all()
        assert out[250:].isfinite().all()


@pytest.mark.parametrize("head_dim", [16, 64])
def test_minus_infinity_gets_nothing(generator: torch.Generator, dtype: torch.dtype, head_dim: int) -> None:
    batch = Batch([Prompt(((64, 400),), 0)], Heads(4, 2, head_dim), dtype, generator)
    batch.q = batch.q.abs() + 0.5
    batch.k[130:330] = -float("inf")  # whole parts of the keys, and parts of others
    reference, same_precision = batch.reference(torch.float64), batch.reference(torch.float32)
    allowed = floor(batch, reference)
    for out in (packed(batch), paged(batch)):
        assert (out[130 - 64 : 330 - 64] == 0).all()
        assert_close_to_reference(out, reference, same_precision, allowed)


@pytest.mark.cpu_only
def test_keys_of_a_query_without_segment_are_not_read(generator: torch.Generator) -> None:
    batch = Batch([one_image(20), text(90)], Heads(2, 1, 16), torch.float32, generator)
    arguments = batch.paged_arguments(16)
    expected = ops.last_row_scores_paged(**arguments, scale=1.0)  # type: ignore[arg-type]
    assert isinstance(arguments["kv_lengths"], Tensor)
    arguments["kv_lengths"][1] = 0
    assert torch.equal(ops.last_row_scores_paged(**arguments, scale=1.0), expected)  # type: ignore[arg-type]


@pytest.mark.cpu_only
def test_without_out(generator: torch.Generator, dtype: torch.dtype) -> None:
    batch = Batch(RAGGED, Heads(4, 2, 16), dtype, generator)
    assert torch.equal(ops.last_row_scores(**batch.packed_arguments, scale=batch.scale), packed(batch))
    paged_arguments = batch.paged_arguments(16)
    out = ops.last_row_scores_paged(**paged_arguments, scale=batch.scale)  # type: ignore[arg-type]
    assert torch.equal(out, paged(batch))


prompt_strategy = st.builds(
    lambda images, after: Prompt(tuple(images), after),
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 90)), max_size=4), st.integers(0, 70),
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    prompts=st.lists(prompt_strategy, min_size=1, max_size=6),
    heads=st.sampled_from([*HEADS, *OTHER_HEADS]),
    block_size=st.sampled_from([1, 8, 16, 19, 32]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_batch_gives_each_sequence_what_it_gets_alone_in_any_order(
    seed: int, prompts: list[Prompt], heads: Heads, block_size: int, dtype: torch.dtype
) -> None:
    generator = seeded(seed)
    batch = Batch(prompts, heads, dtype, generator)
    rows = [sum(rows for _, rows in prompt.images) for prompt in prompts]
    together = packed(batch).split(rows)
    for b in torch.randperm(len(prompts), generator=generator).tolist():
        alone = Batch([prompts[b]], heads, dtype, generator)
        alone.q, alone.k = batch.q[b : b + 1], batch.k.split(batch.lengths)[b]
        for out in (packed(alone), paged(alone, block_size)):
            # How the keys are divided depends on the batch, and with it the order of additions.
            torch.testing.assert_close(out, together[b], atol=1e-7, rtol=1e-5)


@pytest.mark.cpu_only
def test_bad_packed_arguments_are_refused_by_name(generator: torch.Generator) -> None:
    batch = Batch([one_image(20, 2, 3), text(4)], Heads(4, 2, 16), torch.float32, generator)
    q, k = batch.q, batch.k
    arguments = {**batch.packed_arguments, "scale": 1.0, "out": poisoned((20,), torch.float32)}
    cases: list[tuple[dict[str, object], str]] = [
        ({"q": q.double()}, "q has dtype .*, expected float32 or bfloat16"),
        ({"q": q.half()}, "q has dtype float16"),
        ({"q": q[0]}, r"q has shape \[4, 16\], expected \[num_queries, num_heads, head_dim\]"),
        ({"q": q[:1]}, r"cu_seqlens has shape \[3\], expected \[num_queries \+ 1=2\]"),
        ({"q": torch.zeros(2, 4, 32)[:, :, ::2]}, "q has stride 2 in its last dimension"),
        ({"q": q[:, :3]}, "num_heads is 3, expected a multiple of num_kv_heads=2"),
        ({"q": q[..., :8]}, r"k has shape \[29, 2, 16\], expected .*head_dim=8"),
        ({"q": q[..., :4], "k": k[..., :4]}, "head_dim is 4, expected a multiple of 8"),
        ({"q": None}, "q is of type NoneType"),
        ({"k": k.bfloat16()}, "k has dtype bfloat16, expected float32"),
        ({"k": k[0]}, r"k has shape \[2, 16\]"),
        ({"k": k[:, :0]}, "num_kv_heads is 0"),
        ({"k": k[:-1]}, r"cu_seqlens\[2\] is 29, expected num_tokens=28"),
        ({"cu_seqlens": int32([0, 30, 29])}, r"cu_seqlens\[2\] is 29, expected at least 30"),
        ({"cu_seqlens": int32([1, 25, 29])}, r"cu_seqlens\[0\] is 1, expected 0"),
        ({"cu_seqlens": torch.tensor([0, 25, 29])}, "cu_seqlens has dtype int64"),
        (
            {"cu_seqlens": int32([0, 21, 29])},
            r"segment_starts\[0\] is 2 with 20 scores, but query 0 sees 21 keys",
        ),
        *segment_cases(),
        ({"scale": 0.0}, "scale is 0"),
        ({"scale": float("nan")}, "scale is -?nan"),
        ({"out": torch.zeros(21)}, r"cu_scores\[1\] is 20, expected num_scores=21"),
        ({"out": torch.zeros(20, 1)}, r"out has shape \[20, 1\]"),
        ({"out": torch.zeros(20).bfloat16()}, "out has dtype bfloat16, expected float32"),
        ({"out": k.flatten()[:20]}, "out shares memory with k"),
        ({"out": q.flatten()[:20]}, "out shares memory with q"),
    ]
    for change, message in cases:
        with pytest.raises(KernelArgumentError, match=f"last_row_scores: {message}"):
            ops.last_row_scores(**(arguments | change))  # type: ignore[arg-type]
    assert arguments["out"].isnan().all()  # type: ignore[union-attr]


def segment_cases() -> list[tuple[dict[str, object], str]]:
    """What is wrong with the segments of two queries that see 25 and 4 keys; the first has 20 rows from row 2 on."""
    return [
        ({"segment_queries": int32([2])}, r"segment_queries\[0\] is 2, expected 0 to 1"),
        ({"segment_queries": int32([-1])}, r"segment_queries\[0\] is -1, expected 0 to 1"),
        ({"segment_queries": int32([1])}, r"segment_starts\[0\] is 2 with 20 scores, but query 1 sees 4 keys"),
        ({"segment_queries": torch.tensor([0])}, "segment_queries has dtype int64"),
        ({"segment_queries": int32([0, 0])}, r"segment_starts has shape \[1\], expected \[num_segments=2\]"),
        ({"segment_starts": int32([-1])}, r"segment_starts\[0\] is -1 with 20 scores"),
        ({"segment_starts": int32([6])}, r"segment_starts\[0\] is 6 with 20 scores, but query 0 sees 25 keys"),
        ({"segment_starts": int32([2**31 - 1])}, r"segment_starts\[0\] is 2147483647 with 20 scores"),
        ({"cu_scores": int32([0, 19])}, r"cu_scores\[1\] is 19, expected num_scores=20"),
        ({"cu_scores": int32([0, 24]), "out": None}, r"segment_starts\[0\] is 2 with 24 scores, but query 0 sees 25"),
        ({"cu_scores": int32([1, 20])}, r"cu_scores\[0\] is 1, expected 0"),
        ({"cu_scores": int32([0])}, r"cu_scores has shape \[1\], expected \[num_segments \+ 1=2\]"),
        ({"cu_scores": int32([]), "out": None}, "cu_scores is empty, expected at least 1 entry"),
        ({"cu_scores": int32([0, 2**31 - 1]), "out": None}, "cu_scores ends at 2147483647, expected at most "),
        ({"cu_scores": int32([0, -5]), "out": None}, "cu_scores ends with -5, expected at least 0"),
        ({"first_keys": int32([0])}, r"first_keys has shape \[1\], expected \[num_queries=2\]"),
        ({"first_keys": torch.tensor([0, 0])}, "first_keys has dtype int64, expected int32"),
        ({"first_keys": int32([25, 0])}, r"first_keys\[0\] is 25, expected 0 to 24"),
        ({"first_keys": int32([0, -1])}, r"first_keys\[1\] is -1, expected 0 to 3"),
    ]


@pytest.mark.cpu_only
def test_bad_paged_arguments_are_refused_by_name(generator: torch.Generator) -> None:
    batch = Batch([one_image(20, 2, 3), text(4)], Heads(4, 2, 16), torch.float32, generator)
    q, good = batch.q, batch.paged_arguments(8)
    blocks, block_table, kv_lengths = good["blocks"], good["block_table"], good["kv_lengths"]
    assert isinstance(blocks, Tensor)
    assert isinstance(block_table, Tensor)
    assert isinstance(kv_lengths, Tensor)
    arguments = {**good, "scale": 1.0, "out": poisoned((20,), torch.float32)}
    cases: list[tuple[dict[str, object], str]] = [
        ({"q": q.half()}, "q has dtype float16"),
        ({"q": q[:1]}, r"block_table has shape \[2, 5\], expected \[num_queries=1"),
        ({"q": q[:, :3]}, "num_heads is 3, expected a multiple of num_kv_heads=2"),
        ({"q": q[..., :8]}, "blocks has shape .*head_dim=8"),
        ({"blocks": blocks.bfloat16()}, "blocks has dtype bfloat16, expected float32"),
        ({"blocks": blocks[0]}, r"blocks has shape \[2, 2, 2, 8, 16\]"),
        ({"blocks": blocks[:, :, :1]}, r"blocks has shape \[8, 2, 1, 2, 8, 16\], expected .*2=2"),
        ({"blocks": blocks.transpose(3, 4)}, r"blocks of shape .* has stride 128 in dimension 4"),
        ({"blocks": blocks.to("meta")}, "blocks is on "),
        ({"layer_in_block": 2}, "layer_in_block is 2, expected 0 to 1"),
        ({"layer_in_block": -1}, "layer_in_block is -1"),
        ({"block_table": block_table.long()}, "block_table has dtype int64"),
        ({"block_table": torch.full_like(block_table, 8)}, r"block_table\[0, 0\] is 8, expected 0 to 7"),
        ({"kv_lengths": int32([25, 9])}, r"block_table\[1, 1\] is -1, expected 0 to 7"),
        ({"kv_lengths": int32([41, 4])}, "kv_lengths has the entry 41 at flat index 0, expected 0 to 40"),
        ({"kv_lengths": int32([-1, 4])}, "kv_lengths has the entry -1"),
        ({"kv_lengths": int32([21, 4])}, r"segment_starts\[0\] is 2 with 20 scores, but query 0 sees 21 keys"),
        ({"kv_lengths": kv_lengths[:1]}, r"kv_lengths has shape \[1\]"),
        ({"kv_lengths": kv_lengths.long()}, "kv_lengths has dtype int64"),
        *segment_cases(),
        ({"scale": -1.0}, "scale is -1"),
        ({"out": torch.zeros(19)}, r"cu_scores\[1\] is 20, expected num_scores=19"),
        ({"out": blocks.flatten()[:20]}, "out shares memory with blocks"),
        ({"out": q.flatten()[:20]}, "out shares memory with q"),
    ]
    for change, message in cases:
        with pytest.raises(KernelArgumentError, match=f"last_row_scores_paged: {message}"):
            ops.last_row_scores_paged(**(arguments | change))  # type: ignore[arg-type]
    assert arguments["out"].isnan().all()  # type: ignore[union-attr]
