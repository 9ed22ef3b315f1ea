"""The scheduler alone, with a fake allocator of one stage, sequences without prompts and steps without a model."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpn_rt.engine.scheduler import Batch, Scheduler
from dpn_rt.engine.sequence import Sequence
from dpn_rt.model.reduction.reduction import NoReduction
from dpn_rt.settings import EngineOptions, EngineSettings, resolve
from tests.engine.models import MODEL

BLOCK_SIZE = 4
SETTINGS = resolve(MODEL, EngineOptions(block_size=BLOCK_SIZE, max_num_batched_tokens=100))


def blocks_of_rows(num_rows: int) -> int:
    return -(-num_rows // BLOCK_SIZE)


class FakeAllocator:
    """A `SequenceCache` of one stage with one layer: slots with lists of blocks. Fails when blocks run out."""

    def __init__(self, num_blocks: int, num_slots: int = 64) -> None:
        self.users = [0] * num_blocks
        self.blocks: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}
        self.slots = list(range(num_slots))[::-1]
        self.fitted: list[tuple[Any, int]] = []

    @property
    def num_blocks(self) -> int:
        return len(self.users)

    @property
    def num_free_blocks(self) -> int:
        return self.users.count(0)

    @property
    def num_free_slots(self) -> int:
        return len(self.slots)

    @property
    def bytes_in_use(self) -> int:
        return self.num_blocks - self.num_free_blocks

    def check_fits(self, lengths: Any, max_tokens: int) -> None:
        self.fitted.append((lengths, max_tokens))

    def blocks_for(self, lengths: Any) -> int:
        return sum(blocks_of_rows(length) for length in lengths)

    def blocks_of(self, slot: int) -> int:
        return len(self.blocks[slot])

    def blocks_to_grow(self, slots: np.ndarray) -> int:
        return sum(self.lengths[slot] % BLOCK_SIZE == 0 for slot in slots.tolist())

    def grow(self, slots: np.ndarray) -> None:
        for slot in slots.tolist():
            self.fill(slot, self.lengths[slot] + 1)

    def fill(self, slot: int, num_rows: int) -> None:
        """Makes room for the rows of a prefill, as the engine does."""
        while len(self.blocks[slot]) < blocks_of_rows(num_rows):
            self._take(slot)
        self.lengths[slot] = num_rows

    def fork(self, slot: int, max_blocks: int) -> int | None:
        num_full = self.lengths[slot] // BLOCK_SIZE
        is_partial = self.lengths[slot] % BLOCK_SIZE != 0
        if is_partial > max_blocks:
            return None
        child = self.open_slot()
        for block in self.blocks[slot][:num_full]:
            self.users[block] += 1
            self.blocks[child].append(block)
        if is_partial:
            self._take(child)
        self.lengths[child] = self.lengths[slot]
        return child

    def open_slot(self) -> int:
        slot = self.slots.pop()
        self.blocks[slot], self.lengths[slot] = [], 0
        return slot

    def close_slot(self, slot: int) -> None:
        for block in self.blocks.pop(slot):
            self.users[block] -= 1
        del self.lengths[slot]
        self.slots.append(slot)

    def _take(self, slot: int) -> None:
        assert 0 in self.users, "more blocks than there are"
        block = self.users.index(0)
        self.users[block] = 1
        self.blocks[slot].append(block)


def make(num_blocks: int = 100, **changes: Any) -> tuple[Scheduler, FakeAllocator]:
    cache = FakeAllocator(num_blocks)
    return Scheduler(dataclasses.replace(SETTINGS, **changes), NoReduction(), cache), cache


def sequence(name: str, num_rows: int = 5, max_tokens: int = 100, priority: int = 0) -> Sequence:
    prompt: Any = SimpleNamespace(num_rows=num_rows, segments=(), image_starts=(), is_dense=False)
    nothing: Any = None
    return Sequence(name, 0, prompt, nothing, nothing, None, max_tokens, [], priority)


def add(scheduler: Scheduler, *sequences: Sequence) -> None:
    for each in sequences:
        scheduler.add(each)


def names(batch: Batch | None) -> str:
    """Kind and sequences of a batch, such as `prefill a b`."""
    return "" if batch is None else " ".join([batch.kind, *(each.request_id for each in batch.sequences)])


def prefill(scheduler: Scheduler, cache: FakeAllocator) -> str:
    """A whole prefill with the first token of each sequence."""
    batch = scheduler.schedule()
    assert batch is not None and batch.kind == "prefill"
    assert batch.slots.tolist() == [each.slot for each in batch.sequences]
    fill(batch, cache)
    scheduler.end_prefill()
    take_tokens(batch)
    return names(batch)


def decode(scheduler: Scheduler) -> str:
    batch = scheduler.schedule()
    assert batch is not None and batch.kind == "decode"
    assert batch.slots.tolist() == [each.slot for each in batch.sequences]
    take_tokens(batch)
    return names(batch)


def fill(batch: Batch, cache: FakeAllocator) -> None:
    for each in batch.sequences:
        assert each.slot is not None
        cache.fill(each.slot, each.num_rows)


def take_tokens(batch: Batch) -> None:
    for each in batch.sequences:
        each.output_token_ids.append(0)


# Admission


def test_nothing_to_do() -> None:
    scheduler, _ = make()
    assert scheduler.schedule() is None and scheduler.schedule_ahead() is None


def test_no_more_sequences_than_allowed() -> None:
    scheduler, cache = make(max_num_seqs=2)
    a, b, c = (sequence(name) for name in "abc")
    add(scheduler, a, b, c)
    assert prefill(scheduler, cache) == "prefill a b"
    assert (scheduler.num_waiting, scheduler.num_running, scheduler.num_decoding) == (1, 2, 2)
    assert decode(scheduler) == "decode a b"
    scheduler.remove(a)
    assert prefill(scheduler, cache) == "prefill c"
    assert decode(scheduler) == "decode b c"


def test_no_more_rows_in_a_prefill_than_allowed() -> None:
    scheduler, cache = make(max_num_batched_tokens=10)
    add(scheduler, *(sequence(name, rows) for name, rows in zip("abcdef", (6, 4, 1, 9, 30, 2), strict=True)))
    batches = [prefill(scheduler, cache) for _ in range(4)]
    assert batches == ["prefill a b", "prefill c d", "prefill e", "prefill f"], "a longer prompt goes alone"


def test_a_sequence_waits_until_there_are_blocks_for_its_rows_and_one_more() -> None:
    for num_blocks, first in ((4, "prefill a"), (5, "prefill a"), (6, "prefill a b")):
        scheduler, cache = make(num_blocks)
        add(scheduler, sequence("a", 8), sequence("b", 8))
        assert prefill(scheduler, cache) == first


def test_next_rows_of_running_sequences_come_before_new_sequences() -> None:
    scheduler, cache = make(num_blocks=4)
    add(scheduler, sequence("a", 7))  # 2 blocks
    prefill(scheduler, cache)
    decode(scheduler)  # 8 rows: its next row takes a block
    add(scheduler, sequence("b", 5))
    assert decode(scheduler) == "decode a"
    scheduler, cache = make(num_blocks=5)
    add(scheduler, sequence("a", 7))
    prefill(scheduler, cache)
    decode(scheduler)
    add(scheduler, sequence("b", 5))
    assert prefill(scheduler, cache) == "prefill b"


def test_the_first_sequence_that_does_not_fit_keeps_its_turn() -> None:
    scheduler, cache = make(num_blocks=6)
    add(scheduler, sequence("a", 7), sequence("large", 17), sequence("small", 1))
    assert prefill(scheduler, cache) == "prefill a"
    assert decode(scheduler) == "decode a", "a small one must not overtake for ever"


def test_alone_a_sequence_may_take_the_whole_pool() -> None:
    scheduler, cache = make(num_blocks=2)
    add(scheduler, sequence("a", 8, max_tokens=1))
    assert prefill(scheduler, cache) == "prefill a"


def test_order_by_priority_and_arrival() -> None:
    scheduler, cache = make(max_num_seqs=1)
    arrivals = [
        sequence(name, priority=priority) for name, priority in (("a", 1), ("b", 0), ("c", 1), ("d", -1), ("e", 0))
    ]
    add(scheduler, *arrivals)
    served = []
    for _ in arrivals:
        served.append(prefill(scheduler, cache))
        scheduler.remove(next(each for each in arrivals if each.slot is not None))
    assert served == [f"prefill {name}" for name in "dbeac"]


def test_a_request_must_be_able_to_end() -> None:
    scheduler, cache = make()
    scheduler.check_fits(sequence("a", 7, max_tokens=5))
    assert cache.fitted == [((7 + 5 - 1,), 5)], "the last token is never stored"


# Preemption


@pytest.mark.parametrize(
    ("num_free", "decoded", "preempted"), [(0, "decode a d", "bc"), (1, "decode a d b", "c"), (4, "decode a d b c", "")]
)
def test_the_youngest_of_the_last_priority_is_preempted(num_free: int, decoded: str, preempted: str) -> None:
    scheduler, cache = make(num_blocks=12)
    arrivals = [sequence(name, 8, priority=priority) for name, priority in zip("abcd", (0, 1, 1, 0), strict=True)]
    add(scheduler, *arrivals)
    assert prefill(scheduler, cache) == "prefill a d b c"
    cache.users = cache.users[: 8 + num_free]  # 2 blocks each, and one is wanted for each new row
    assert decode(scheduler) == decoded
    assert "".join(each.request_id for each in arrivals if each.num_preemptions) == preempted
    assert scheduler.num_preemptions == scheduler.num_waiting == len(preempted)
    for each in arrivals:
        assert (each.slot is None) == (each.request_id in preempted)
        assert each.num_rows == 8 + len(each.output_token_ids), "its tokens are computed again"


def test_a_preempted_sequence_comes_back_before_later_ones() -> None:
    scheduler, cache = make(num_blocks=6)
    a, b = sequence("a", 7), sequence("b", 7)
    add(scheduler, a, b)
    prefill(scheduler, cache)
    assert [decode(scheduler) for _ in range(2)] == ["decode a b"] * 2  # 9 rows each: all blocks
    add(scheduler, sequence("c", 5))
    assert [decode(scheduler) for _ in range(4)] == [*["decode a b"] * 3, "decode a"]
    assert b.num_preemptions == 1
    assert decode(scheduler) == "decode a", "there is room for c, but b is before it"
    scheduler.remove(a)
    assert prefill(scheduler, cache) == "prefill b c"


# Prefills in parts


def test_prefills_in_parts_and_decoding_take_turns() -> None:
    scheduler, cache = make(max_chunk_tokens=10)
    add(scheduler, sequence("a"))
    prefill(scheduler, cache)
    add(scheduler, sequence("b"))
    assert names(scheduler.schedule()) == "prefill b"
    add(scheduler, sequence("c"))  # waits for the end of b's prefill
    for _ in range(3):
        assert decode(scheduler) == "decode a"
        assert names(scheduler.schedule()) == "prefill b"
    scheduler.end_prefill()
    assert names(scheduler.schedule()) == "prefill c"


def test_a_prefill_in_parts_goes_on_where_nothing_decodes() -> None:
    scheduler, _ = make(max_chunk_tokens=10)
    add(scheduler, sequence("a"))
    assert [names(scheduler.schedule()) for _ in range(3)] == ["prefill a"] * 3


def test_whole_prefills_do_not_wait() -> None:
    scheduler, cache = make()
    add(scheduler, sequence("a"))
    prefill(scheduler, cache)
    add(scheduler, sequence("b"))
    assert [names(scheduler.schedule()) for _ in range(3)] == ["prefill b"] * 3


def test_decoding_leaves_a_prefill_the_blocks_that_it_may_need() -> None:
    scheduler, cache = make(num_blocks=7, max_chunk_tokens=10)
    a, b = sequence("a", 7), sequence("b", 7)
    add(scheduler, a, b)
    prefill(scheduler, cache)  # 2 blocks each
    add(scheduler, sequence("c", 5))  # wants 2 of the 3 that are left
    batch = scheduler.schedule()
    assert names(batch) == "prefill c" and batch is not None
    assert decode(scheduler) == "decode a b"  # row 8
    assert names(scheduler.schedule()) == "prefill c"
    assert decode(scheduler) == "decode a", "both rows 9 need a block, and one is left"
    assert b.num_preemptions == 1
    fill(batch, cache)
    scheduler.end_prefill()
    assert decode(scheduler) == "decode a c"


def test_blocks_that_a_prefill_has_are_not_kept_for_it_again() -> None:
    scheduler, cache = make(num_blocks=8, max_chunk_tokens=10)
    add(scheduler, sequence("a", 7), sequence("b", 7))
    prefill(scheduler, cache)  # 2 blocks each
    decode(scheduler)  # row 8
    add(scheduler, sequence("c", 5))
    batch = scheduler.schedule()
    assert names(batch) == "prefill c" and batch is not None
    fill(batch, cache)  # another 2, as stage 0 of several
    assert decode(scheduler) == "decode a b", "one block for each of rows 9"


# Siblings


def forked(num_blocks: int, num_rows: int = 6, **changes: Any) -> tuple[Scheduler, FakeAllocator, Sequence, Sequence]:
    """A sequence after its prefill and a sibling that waits for it."""
    scheduler, cache = make(num_blocks, **changes)
    first, sibling = sequence("first", num_rows), sequence("sibling", num_rows)
    scheduler.add(first, [sibling])
    assert scheduler.num_waiting == 1
    assert prefill(scheduler, cache) == "prefill first"
    return scheduler, cache, first, sibling


def test_a_sibling_goes_on_from_the_same_rows() -> None:
    scheduler, cache, first, sibling = forked(num_blocks=3)
    assert scheduler.fork(first, sibling)
    assert first.slot is not None and sibling.slot is not None
    assert cache.lengths[sibling.slot] == 6 and cache.num_free_blocks == 0
    assert cache.blocks[first.slot][0] == cache.blocks[sibling.slot][0]
    assert decode(scheduler) == "decode first sibling"


@pytest.mark.parametrize(("num_blocks", "changes"), [(2, {}), (9, {"max_num_seqs": 1})], ids=["blocks", "sequences"])
def test_a_sibling_without_room_waits(num_blocks: int, changes: dict[str, int]) -> None:
    scheduler, cache, first, sibling = forked(num_blocks, **changes)
    assert not scheduler.fork(first, sibling)
    assert sibling.slot is None and scheduler.num_waiting == 1
    scheduler.remove(first)
    assert prefill(scheduler, cache) == "prefill sibling"


def test_siblings_have_the_number_of_their_arrival() -> None:
    scheduler, _ = make()
    first, sibling, later = sequence("first"), sequence("sibling"), sequence("later")
    scheduler.add(first, [sibling])
    scheduler.add(later)
    assert [each.order for each in (first, sibling, later)] == [(0, 0), (0, 1), (0, 2)]


# A step ahead


def test_a_step_ahead_without_those_that_end() -> None:
    scheduler, cache = make()
    add(scheduler, sequence("a", max_tokens=9), sequence("b", max_tokens=2))
    prefill(scheduler, cache)
    batch = scheduler.schedule()
    assert names(batch) == "decode a b"
    ahead = scheduler.schedule_ahead()
    assert names(ahead) == "decode a" and ahead is not None
    assert cache.lengths[ahead.sequences[0].slot or 0] == 5 + 2, "there is room for its row"


def test_no_step_ahead_where_all_end() -> None:
    scheduler, cache = make()
    add(scheduler, sequence("a", max_tokens=2))
    prefill(scheduler, cache)
    assert scheduler.schedule() is not None
    assert scheduler.schedule_ahead() is None


def test_no_step_ahead_of_a_prefill() -> None:
    scheduler, cache = make(max_chunk_tokens=4)
    add(scheduler, sequence("a"))
    prefill(scheduler, cache)
    add(scheduler, sequence("b"))
    assert scheduler.schedule_ahead() is None, "b can be admitted"
    scheduler.schedule()
    decode(scheduler)
    assert scheduler.schedule_ahead() is None, "b is in prefill"


def test_a_step_ahead_where_those_that_wait_have_no_place() -> None:
    scheduler, cache = make(max_num_seqs=1)
    add(scheduler, sequence("a"), sequence("b"))
    prefill(scheduler, cache)
    assert names(scheduler.schedule_ahead()) == "decode a"


def test_no_step_ahead_that_would_preempt() -> None:
    scheduler, cache = make(num_blocks=2)
    add(scheduler, sequence("a", 7))
    prefill(scheduler, cache)
    decode(scheduler)  # row 8
    assert scheduler.schedule_ahead() is None
    assert scheduler.num_preemptions == 0 and cache.lengths[0] == 8


# Removal


def test_removal_in_every_state() -> None:
    scheduler, cache = make(max_num_seqs=3, max_chunk_tokens=4)
    running, prefilling, other, waiting = (sequence(name) for name in ("running", "prefilling", "other", "waiting"))
    unforked = sequence("unforked")
    add(scheduler, running)
    prefill(scheduler, cache)
    scheduler.add(prefilling, [unforked])
    add(scheduler, other, waiting)
    assert names(scheduler.schedule()) == "prefill prefilling other"
    scheduler.remove(unforked)  # not known yet
    scheduler.remove(waiting)
    assert scheduler.num_waiting == 0
    scheduler.remove(prefilling)
    assert scheduler.num_running == 2
    assert decode(scheduler) == "decode running"
    assert names(scheduler.schedule()) == "prefill other"
    scheduler.remove(running)
    scheduler.remove(other)
    assert scheduler.schedule() is None
    assert (scheduler.num_waiting, scheduler.num_running, scheduler.num_decoding) == (0, 0, 0)
    assert cache.num_free_blocks == cache.num_blocks and cache.num_free_slots == 64
    scheduler.remove(running)  # once more
    assert cache.num_free_slots == 64


# All together


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
