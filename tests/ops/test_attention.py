from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpn_rt import ops
from dpn_rt.errors import KernelArgumentError
from tests.ops.attention_reference import FLOOR, dtype_here, head_dim_here, offsets, require_head_dim, torch_attention
from tests.ops.conftest import ATTENTION_DTYPES, assert_close_to_reference, poisoned, random_rows

DTYPES = ATTENTION_DTYPES

# num_heads, num_kv_heads, head_dim
SHAPES = [(8, 1, 64), (4, 2, 128), (3, 1, 8)]
OTHER_SHAPES = [(4, 4, 64), (2, 2, 16), (6, 2, 80), (2, 1, 256), (5, 5, 40)]
# Lengths near multiples of the micro-kernel's 6 rows, 16 lanes, panels of 64 keys, tiles of 96 rows, 512 keys.
LENGTHS = [
    [1],
    [5, 0, 6, 7],
    [15, 16, 17],
    [31, 32, 33],
    [63, 64, 65],
    [95, 96, 97, 1],
    [511],
    [513, 3],
    [1030],
    [],
    [0],
    [2] * 20,
]
CASES = [*product(SHAPES, LENGTHS), *product(OTHER_SHAPES, [[1, 17, 70], [600]])]


def case_name(case: tuple[tuple[int, int, int], list[int]]) -> str:
    """The shape and the first lengths."""
    return f"{case[0]}-{case[1][:4]}"


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_packed_sequences(
    generator: torch.Generator, dtype: torch.dtype, case: tuple[tuple[int, int, int], list[int]], causal: bool
) -> None:
    (num_heads, num_kv_heads, head_dim), lengths = case
    require_head_dim(head_dim)
    q = random_rows(generator, (sum(lengths), num_heads, head_dim), dtype, 2.0)
    k, v = (random_rows(generator, (sum(lengths), num_kv_heads, head_dim), dtype) for _ in range(2))
    scale = head_dim**-0.5
    out = poisoned((sum(lengths), num_heads * head_dim), dtype)
    assert ops.attention(q, k, v, offsets(lengths), causal=causal, scale=scale, out=out) is out
    reference = torch_attention(q.double(), k.double(), v.double(), lengths, causal, scale)
    assert_close_to_reference(out, reference, torch_attention(q, k, v, lengths, causal, scale), FLOOR)


@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_rows_are_the_same_alone(generator: torch.Generator, dtype: torch.dtype, head_dim: int) -> None:
    # On a GPU of up to 144 multiprocessors 32 heads are enough for blocks of 128 rows together, and too few alone. On a
    # CPU of few threads, heads are packed in waves, which end between other heads together than alone.
    is_cuda = torch.get_default_device().type == "cuda"
    lengths, heads = [700, 513], 32 if is_cuda or head_dim > 64 else 5
    q, k, v = (random_rows(generator, (sum(lengths), heads, head_dim), dtype) for _ in range(3))
    together = ops.attention(q, k, v, offsets(lengths), causal=True, scale=head_dim**-0.5)
    for rows, length in zip((slice(0, 700), slice(700, None)), lengths, strict=True):
        alone = ops.attention(q[rows], k[rows], v[rows], offsets([length]), causal=True, scale=head_dim**-0.5)
        assert torch.equal(together[rows], alone)
    reference = torch_attention(q.double(), k.double(), v.double(), lengths, True, head_dim**-0.5)
    assert_close_to_reference(together, reference, torch_attention(q, k, v, lengths, True, head_dim**-0.5), FLOOR)


def test_views_of_one_fused_buffer(generator: torch.Generator, dtype: torch.dtype) -> None:
    qkv = random_rows(generator, (70, 4 * 32 + 2 * 2 * 32), dtype)
    q, k, v = (x.view(70, -1, 32) for x in qkv.split([128, 64, 64], dim=1))
    expected = ops.attention(*(x.contiguous() for x in (q, k, v)), offsets([30, 40]), causal=True, scale=0.2)
    assert torch.equal(ops.attention(q, k, v, offsets([30, 40]), causal=True, scale=0.2), expected)
    # Heads before tokens, and one key for all tokens (stride 0).
    by_head = q.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(ops.attention(by_head, k, v, offsets([30, 40]), causal=True, scale=0.2), expected)
    same = ops.attention(q, k[:1].expand(70, 2, 32), v, offsets([70]), causal=False, scale=0.2)
    torch.testing.assert_close(same.view(70, 4, 32)[0, 0], v[:, 0].float().mean(0).to(dtype), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("bad", ["q", "k", "v"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_stays_in_its_sequence(generator: torch.Generator, dtype: torch.dtype, bad: str, value: float) -> None:
    tensors = {name: random_rows(generator, (100, 2, 64), dtype) for name in "qkv"}
    lengths = [33, 34, 33]
    clean = ops.attention(**tensors, cu_seqlens=offsets(lengths), causal=True, scale=0.1)
    tensors[bad][50] = value
    out = ops.attention(**tensors, cu_seqlens=offsets(lengths), causal=True, scale=0.1)
    assert torch.equal(out[:33], clean[:33])
    assert torch.equal(out[67:], clean[67:])
    assert not out[50].isfinite().all()


@pytest.mark.cpu_only
@pytest.mark.parametrize("head_dim", [8, 40, 64, 128])
@pytest.mark.parametrize("length", [1, 17, 33, 70])
def test_working_memory_of_earlier_calls_does_not_matter(
    generator: torch.Generator, dtype: torch.dtype, head_dim: int, length: int
) -> None:
    q, k, v = (random_rows(generator, (length, 2, head_dim), dtype) for _ in range(3))
    clean = ops.attention(q, k, v, offsets([length]), causal=True, scale=0.2)
    for value in (float("nan"), float("inf")):
        bad = torch.full((600, 2, 128), value, dtype=dtype)
        ops.attention(bad, bad, bad, offsets([600]), causal=False, scale=0.2)
        assert torch.equal(ops.attention(q, k, v, offsets([length]), causal=True, scale=0.2), clean)
    assert clean.isfinite().all()


def test_large_scores_do_not_overflow(generator: torch.Generator, dtype: torch.dtype) -> None:
    q, k, v = (random_rows(generator, (600, 1, 64), dtype, scale) for scale in (100.0, 100.0, 1.0))
    out = ops.attention(q, k, v, offsets([600]), causal=True, scale=1.0)
    assert out.isfinite().all()
    # Scores are about 100,000 and round to hundredths. A row has one right answer if one key's score exceeds all others
    # by much more than that.
    scores = (q[:, 0].double() @ k[:, 0].double().T).masked_fill(torch.ones(600, 600).triu(1).bool(), float("-inf"))
    best, second = scores.topk(2).values.unbind(1)
    clear = best - second > 30
    assert clear.sum() > 500
    reference = torch_attention(q.double(), k.double(), v.double(), [600], True, 1.0)
    same_precision = torch_attention(q, k, v, [600], True, 1.0)
    assert_close_to_reference(out[clear], reference[clear], same_precision[clear], FLOOR)


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 130), min_size=1, max_size=5),
    heads=st.sampled_from([(1, 1), (4, 1), (6, 3), (9, 1)]),
    head_dim=st.sampled_from([8, 24, 64, 72, 128]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    causal=st.booleans(),
)
def test_a_batch_gives_each_sequence_what_it_gets_alone(
    lengths: list[int], heads: tuple[int, int], head_dim: int, dtype: torch.dtype, causal: bool
) -> None:
    num_tokens, head_dim, dtype = sum(lengths), head_dim_here(head_dim), dtype_here(dtype)
    q = torch.randn(num_tokens, heads[0], head_dim).to(dtype)
    k, v = (torch.randn(num_tokens, heads[1], head_dim).to(dtype) for _ in range(2))
    out = poisoned((num_tokens, heads[0] * head_dim), dtype)
    ops.attention(q, k, v, offsets(lengths), causal=causal, scale=head_dim**-0.5, out=out)
    parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    alone = [ops.attention(*part, offsets([part[0].shape[0]]), causal=causal, scale=head_dim**-0.5) for part in parts]
    assert torch.equal(out, torch.cat(alone))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [[33, 100, 1], [0, 5, 0], []], ids=str)
def test_rows_behind_the_last_sequence_are_left_alone(
    generator: torch.Generator, dtype: torch.dtype, lengths: list[int], causal: bool
) -> None:
    q, k, v = (random_rows(generator, (sum(lengths), 2, 64), dtype) for _ in range(3))
    plain = ops.attention(q, k, v, offsets(lengths), causal=causal, scale=0.1)
    longer = [torch.cat([x, poisoned((70, 2, 64), dtype)]) for x in (q, k, v)]
    out = poisoned((len(q) + 70, 128), dtype)
    ops.attention(*longer, offsets(lengths), causal=causal, scale=0.1, out=out)
    assert torch.equal(out[:-70], plain) and out[-70:].isnan().all()


@pytest.mark.cpu_only
def test_bad_arguments_are_refused_by_name() -> None:
    q, k, v, cu = torch.zeros(6, 4, 16), torch.zeros(6, 2, 16), torch.zeros(6, 2, 16), offsets([2, 4])
    wide = torch.zeros(6, 4, 32)
    out = torch.zeros(6, 64)
    cases = [
        ({"q": q.double()}, "q has dtype .*, expected float32 or bfloat16"),
        ({"q": q[0]}, r"q has shape \[4, 16\], expected \[num_tokens, num_heads, head_dim\]"),
        ({"q": torch.zeros(6)}, r"q has shape \[6\]"),
        ({"q": torch.zeros(())}, r"q has shape \[\]"),
        ({"q": wide[:, :, ::2]}, "q has stride 2 in its last dimension"),
        ({"q": q.to("meta")}, "q is on "),
        ({"q": q[:, :3]}, "num_heads is 3, expected a multiple of num_kv_heads=2"),
        ({"q": q[:, :0], "out": torch.zeros(6, 0)}, "num_heads is 0"),
        ({"k": k.bfloat16()}, "k has dtype bfloat16, expected float32"),
        ({"k": k[:5]}, r"k has shape \[5, 2, 16\], expected \[num_tokens=6"),
        ({"k": k[:, :0], "v": v[:, :0]}, "num_kv_heads is 0"),
        ({"v": v[:, :1]}, r"v has shape \[6, 1, 16\], expected \[num_tokens=6, num_kv_heads=2, head_dim=16\]"),
        ({"v": v[:, :, :8]}, r"v has shape \[6, 2, 8\]"),
        (
            {"q": q[..., :12], "k": k[..., :12], "v": v[..., :12]},
            "head_dim is 12, expected a multiple of 8 from 8 to 256",
        ),
        ({"q": q.repeat(1, 1, 17), "k": k.repeat(1, 1, 17), "v": v.repeat(1, 1, 17)}, "head_dim is 272"),
        ({"cu_seqlens": cu.long()}, "cu_seqlens has dtype int64, expected int32"),
        ({"cu_seqlens": cu[:0]}, "cu_seqlens is empty"),
        ({"cu_seqlens": offsets([2, 5])}, r"cu_seqlens\[2\] is 7, expected at most num_tokens=6"),
        ({"cu_seqlens": torch.tensor([0, 7, 6], dtype=torch.int32)}, r"cu_seqlens\[2\] is 6, expected at least 7"),
        ({"cu_seqlens": torch.tensor([1, 6], dtype=torch.int32)}, r"cu_seqlens\[0\] is 1"),
        ({"scale": 0.0}, "scale is 0.0*, expected a positive finite number"),
        ({"scale": float("nan")}, "scale is -?nan"),
        ({"out": out[:, :32]}, r"out has shape \[6, 32\]"),
        ({"out": out.bfloat16()}, "out has dtype bfloat16"),
        ({"out": torch.zeros(6, 128)[:, ::2]}, "out has stride 2"),
        ({"out": q.view(6, 64)}, "out shares memory with q"),
        ({"q": out.view(6, 4, 16)[:, :2], "out": out[:, :32].clone(), "v": out.view(6, 4, 16)[:, 2:]}, None),
    ]
    for change, message in cases:
        arguments = {"q": q, "k": k, "v": v, "cu_seqlens": cu, "scale": 1.0} | change
        if message is None:
            ops.attention(**arguments, causal=True)
            continue
        with pytest.raises(KernelArgumentError, match=f"attention: {message}"):
            ops.attention(**arguments, causal=True)
