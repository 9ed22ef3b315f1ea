"""Several asynchronous streams as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

Item = TypeVar("Item")


async def merge(streams: Sequence[AsyncGenerator[Item, None]]) -> AsyncGenerator[tuple[int, Item], None]:
    """Items of all streams as they come, each with the number of its stream. The streams run at the same time.

    The first error of any stream is raised and closes all others. Leaving early (`aclose`) closes them all.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for single in only:
                yield 0, single
        return
    items: asyncio.Queue[tuple[int, Item]] = asyncio.Queue(maxsize=1)  # a stream waits while its item is unread

    async def pass_on(number: int, stream: AsyncGenerator[Item, None]) -> None:
        async with aclosing(stream):
            async for item in stream:
                await items.put((number, item))

    tasks = [asyncio.ensure_future(pass_on(number, stream)) for number, stream in enumerate(streams)]
    all_done = asyncio.gather(*tasks)
    try:
        while True:
            item = asyncio.ensure_future(items.get())
            await asyncio.wait((item, all_done), return_when=asyncio.FIRST_COMPLETED)
            if item.done():
                yield item.result()
                continue
            item.cancel()
            all_done.result()
            if items.empty():
                return
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
