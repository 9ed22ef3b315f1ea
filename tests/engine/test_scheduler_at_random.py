"""Any order of requests, steps and aborts: every sequence ends, and no block is lost."""

from __future__ import annotations

import dataclasses
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from dpn_rt.engine.scheduler import Batch, Scheduler
from dpn_rt.engine.sequence import Sequence
from dpn_rt.settings import EngineSettings
from tests.engine.scheduling import (
    SETTINGS,
    FakeAllocator,
    blocks_of_rows,
    fill,
    make,
    sequence,
)


@dataclasses.dataclass
class Loop:
    """Uses the scheduler as an engine does, and queues a step ahead where the scheduler gives one."""

    scheduler: Scheduler
    cache: FakeAllocator
    settings: EngineSettings
    siblings: dict[str, list[Sequence]] = dataclasses.field(default_factory=dict)
    live: list[Sequence] = dataclasses.field(default_factory=list)
    ahead: Batch | None = None

    def add(self, first: Sequence, siblings: list[Sequence]) -> None:
        self.siblings[first.request_id] = siblings
        self.live += [first, *siblings]
        self.scheduler.add(first, siblings)

    def remove(self, each: Sequence) -> None:
        self.scheduler.remove(each)
        self.live.remove(each)

    def abort(self, request_id: str) -> None:
        for each in [each for each in self.live if each.request_id == request_id]:
            self.remove(each)
        self.siblings.pop(request_id, None)
        self.check()

    def step(self, ends_prefill: bool, ends_early: bool) -> None:
        batch, self.ahead = self.ahead or self.scheduler.schedule(), None
        assert batch is not None, "sequences are left, and nothing is to be done"
        alive = [each for each in batch.sequences if each in self.live]
        assert all(each.slot is not None for each in alive)
        if batch.kind == "prefill":
            assert sum(each.num_rows for each in alive) <= self.settings.max_num_batched_tokens or len(alive) == 1
            if not ends_prefill and self.settings.max_chunk_tokens is not None:
                return
            fill(batch, self.cache)
            self.scheduler.end_prefill()
            for each in list(alive):
                siblings = self.siblings.pop(each.request_id, [])
                alive += [sibling for sibling in siblings if self.scheduler.fork(each, sibling)]
        else:
            for each in alive:
                assert self.cache.lengths[each.slot or 0] == each.num_rows
            self.ahead = self.scheduler.schedule_ahead()
        for each in alive:
            each.output_token_ids.append(0)
            if len(each.output_token_ids) == each.max_tokens or (ends_early and each is alive[0]):
                self.remove(each)
        self.check()

    def check(self) -> None:
        assert self.scheduler.num_running <= self.settings.max_num_seqs
        with_slot = [each for each in self.live if each.slot is not None]
        assert len(with_slot) == self.scheduler.num_running == len(self.cache.blocks)
        unforked = sum(map(len, self.siblings.values()))
        assert len(self.live) == self.scheduler.num_running + self.scheduler.num_waiting + unforked
        if self.ahead is not None and all(each not in self.live for each in self.ahead.sequences):
            self.ahead = None


REQUESTS = st.tuples(st.integers(1, 30), st.integers(1, 12), st.integers(-1, 1), st.integers(0, 2))
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), REQUESTS),
        st.tuples(st.just("step"), st.tuples(st.booleans(), st.booleans())),
        st.tuples(st.just("abort"), st.integers(0, 20)),
    ),
    max_size=50,
)


@settings(max_examples=150, deadline=None)
@given(
    actions=ACTIONS,
    num_blocks=st.integers(blocks_of_rows(30 + 12 - 1), 40),
    max_num_seqs=st.integers(1, 5),
    max_num_batched_tokens=st.integers(1, 60),
    max_chunk_tokens=st.none() | st.just(8),
)
def test_every_sequence_ends(actions: list[Any], num_blocks: int, **limits: Any) -> None:
    scheduler, cache = make(num_blocks, **limits)
    loop = Loop(scheduler, cache, dataclasses.replace(SETTINGS, **limits))
    for number, (action, value) in enumerate(actions):
        if action == "add":
            num_rows, max_tokens, priority, count = value
            first, *siblings = (sequence(str(number), num_rows, max_tokens, priority) for _ in range(1 + count))
            loop.add(first, siblings)
        elif action == "step" and loop.live:
            loop.step(*value)
        elif action == "abort" and loop.live:
            loop.abort(loop.live[value % len(loop.live)].request_id)
    for _ in range(2000):
        if not loop.live:
            break
        loop.step(ends_prefill=True, ends_early=False)
    assert not loop.live and scheduler.num_waiting == scheduler.num_running == 0
    assert cache.num_free_blocks == num_blocks and cache.num_free_slots == 64
