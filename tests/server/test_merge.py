"""Several streams merged into one: order, errors, and a reader that leaves early."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from dpn_rt.server.merge import merge


class Source:
    """Counts to `count`, a little later each time."""

    def __init__(self, count: int, fails: bool = False) -> None:
        self.count, self.fails, self.is_closed = count, fails, False

    async def stream(self) -> AsyncGenerator[int, None]:
        try:
            for number in range(self.count):
                await asyncio.sleep(0.001)
                yield number
            if self.fails:
                raise ValueError("no such luck")
        finally:
            self.is_closed = True


async def collect(sources: list[Source], most: int | None = None) -> list[tuple[int, int]]:
    items: list[tuple[int, int]] = []
    async with aclosing(merge([source.stream() for source in sources])) as merged:
        async for item in merged:
            items.append(item)
            if len(items) == most:
                break
    return items


@pytest.mark.parametrize("counts", [[0], [3], [0, 0], [1, 4], [5, 0, 5]])
def test_all_items_come_in_the_order_of_their_stream(counts: list[int]) -> None:
    sources = [Source(count) for count in counts]
    items = asyncio.run(collect(sources))
    assert [[n for s, n in items if s == i] for i in range(len(counts))] == [list(range(c)) for c in counts]
    assert all(source.is_closed for source in sources)


def test_streams_run_together() -> None:
    numbers = [stream for stream, _ in asyncio.run(collect([Source(9), Source(9)]))]
    assert numbers.index(1) < 3


@pytest.mark.parametrize("count", [1, 2])
def test_an_error_ends_all(count: int) -> None:
    sources = [Source(2, fails=True), Source(10**9)][:count]
    with pytest.raises(ValueError, match="no such luck"):
        asyncio.run(collect(sources))
    assert all(source.is_closed for source in sources)


@pytest.mark.parametrize("count", [1, 3])
def test_leaving_early_closes_all(count: int) -> None:
    sources = [Source(10**9) for _ in range(count)]
    assert len(asyncio.run(collect(sources, most=4))) == 4
    assert all(source.is_closed for source in sources)
