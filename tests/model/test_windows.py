from __future__ import annotations

from itertools import accumulate

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpn_rt.model.layout import Layout
from dpn_rt.model.stage_batch import StageBatch
from dpn_rt.model.windows import first_keys, last_row_first_keys
from tests.engine.models import MODEL, with_decoder

UNWRITTEN = -(2**31)


class Cache:
    """Sequences whose rows have rising positions with gaps, in shuffled blocks."""

    def __init__(self, random: np.random.Generator, lengths: list[int], block_size: int) -> None:
        self.random, self.lengths, self.block_size = random, lengths, block_size
        steps = [random.integers(1, 4, length) * random.choice([1, 1, 9], length) for length in lengths]
        self.positions = [np.cumsum(step) - step[0] if len(step) else step for step in steps]
        width = max(1, -(-max(lengths, default=0) // block_size)) + 1
        num_blocks = len(lengths) * width + 1
        self.tables = random.permutation(num_blocks)[: len(lengths) * width].reshape(len(lengths), width)
        used = np.arange(width) * block_size < np.array(lengths)[:, None]
        self.tables = np.where(used, self.tables, -1).astype(np.int32)
        self.key_positions = torch.full((num_blocks, block_size), UNWRITTEN, dtype=torch.int32)

    def batch(self, first: list[int], end: list[int], *, is_decode: bool = False) -> StageBatch:
        """Rows `first` to `end` of every sequence; all before them are in the cache."""
        rows = [(sequence, row) for sequence, (a, b) in enumerate(zip(first, end, strict=True)) for row in range(a, b)]
        counts = [b - a for a, b in zip(first, end, strict=True)]
        return StageBatch(
            cu_seqlens=int32([0, *accumulate(counts)]),
            positions=int32([self.positions[sequence][row] for sequence, row in rows]),
            cache_rows=int32([row for _, row in rows]),
            context_lens=int32(end),
            block_tables=torch.from_numpy(np.stack([self.tables, np.full_like(self.tables, -1)])),
            last_rows=None if is_decode else int32([0]).long(),
        )

    def expected(self, first: list[int], end: list[int], window: int) -> list[int]:
        found = []
        for positions, a, b in zip(self.positions, first, end, strict=True):
            for row in range(a, b):
                found.append(int(np.flatnonzero(positions > positions[row] - window)[0]))
        return found


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@settings(deadline=None, max_examples=150)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    block_size=st.sampled_from([1, 3, 16]),
    windows=st.lists(st.integers(1, 90), min_size=1, max_size=3, unique=True),
    shares=st.lists(st.floats(0, 1), min_size=0, max_size=3),
    seed=st.integers(0, 2**31),
)
def test_windows_of_chunks(
    lengths: list[int], block_size: int, windows: list[int], shares: list[float], seed: int
) -> None:
    """Whatever chunks the rows come in, and whatever unused blocks hold."""
    cache = Cache(np.random.default_rng(seed), lengths, block_size)
    ends = [[int(share * length) for length in lengths] for share in sorted(shares)]
    first = [0] * len(lengths)
    for end in [*ends, lengths]:
        found = first_keys(cache.batch(first, end), cache.key_positions, windows)
        for window in windows:
            assert found[window].dtype == torch.int32
            assert found[window].tolist() == cache.expected(first, end, window)
        first = end
    written = int((cache.key_positions != UNWRITTEN).sum())
    assert written == sum(lengths), "positions of the batch's rows, and no others"


@settings(deadline=None, max_examples=50)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=6), window=st.integers(1, 100), seed=st.integers(0, 99)
)
def test_windows_of_one_new_row_each(lengths: list[int], window: int, seed: int) -> None:
    cache = Cache(np.random.default_rng(seed), lengths, 4)
    before = [length - 1 for length in lengths]
    first_keys(cache.batch([0] * len(lengths), before), cache.key_positions, [1])
    found = first_keys(cache.batch(before, lengths, is_decode=True), cache.key_positions, [window])[window]
    assert found.tolist() == cache.expected(before, lengths, window)


@settings(deadline=None, max_examples=150)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 30)), min_size=1, max_size=5),
    window=st.integers(1, 80),
    seed=st.integers(0, 99),
)
def test_windows_of_last_rows(lengths: list[tuple[int, int]], window: int, seed: int) -> None:
    """Of layouts with cached rows before the computed ones, which keep their positions or count on."""
    random = np.random.default_rng(seed)
    cached, computed = (np.array(each, dtype=np.int32) for each in zip(*lengths, strict=True))
    layout = Layout.of_prompts([]).with_kept_positions(np.empty(0, np.int32), np.zeros(0, np.int32))
    positions = [
        first + np.cumsum(random.integers(1, 9, count)) - 1 for first, count in zip(cached, computed, strict=True)
    ]
    for kept in (None, np.concatenate(positions).astype(np.int32)):
        layout = Layout(
            lengths=computed, first_cache_rows=cached, first_positions=cached,
            **{name: getattr(layout, name) for name in OTHER_FIELDS}, kept_positions=kept,
        )  # fmt: skip
        for sequence, found in enumerate(last_row_first_keys(layout, window)):
            own = layout.positions[layout.cu_seqlens[sequence] : layout.cu_seqlens[sequence + 1]]
            if len(own):
                known = np.concatenate([np.arange(cached[sequence]), own])
                assert found == np.flatnonzero(known > own[-1] - window)[0]


OTHER_FIELDS = [
    name for name in Layout.__dataclass_fields__
    if name not in ("lengths", "first_cache_rows", "first_positions", "kept_positions")
]  # fmt: skip


def test_windows_that_hide_nothing_are_left_out() -> None:
    config = with_decoder(MODEL, windows=(None, 20, 9, 20, 1, None, 33)).decoder
    assert config.for_length(512) == config
    assert config.for_length(33).windows == (None, 20, 9, 20, 1, None, None)
    assert config.for_length(9).windows == (None, None, None, None, 1, None, None)
    assert config.for_length(1).windows == ()
    assert [config.window(layer) for layer in range(7)] == list(config.windows)
    assert MODEL.decoder.window(3) is None and MODEL.decoder.for_length(1) == MODEL.decoder
