"""The scheduler alone: what the next step computes, and for which sequences."""

from __future__ import annotations

from typing import Any

import pytest

from dpn_rt.engine.scheduler import Scheduler
from dpn_rt.engine.sequence import Sequence
from tests.engine.scheduling import (
    FakeAllocator,
    add,
    decode,
    fill,
    make,
    names,
    prefill,
    sequence,
)

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
