"""The arithmetic of replicas: against closed forms, and against a simulation."""

from __future__ import annotations

import heapq
import math
import random

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from benchmarks.capacity import erlang_c, least_servers, mean_wait


@given(st.floats(0.01, 0.99))
def test_one_server_is_the_m_m_1_queue(load: float) -> None:
    assert erlang_c(1, load) == pytest.approx(load)
    assert mean_wait(1, load, 1.0, variation=1.0) == pytest.approx(load / (1 - load))


@pytest.mark.parametrize(("servers", "offered", "expected"), [(2, 1.0, 1 / 3), (3, 2.0, 4 / 9), (10, 8.0, 0.4092)])
def test_tables_of_erlang_c(servers: int, offered: float, expected: float) -> None:
    assert erlang_c(servers, offered) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("servers", "load"), [(1, 0.7), (4, 0.8), (20, 0.9)])
def test_the_wait_is_that_of_a_simulation(servers: int, load: float) -> None:
    draw, seconds = random.Random(servers), 2.0
    rate = servers * load / seconds
    free, now, waited, count = [0.0] * servers, 0.0, 0.0, 200_000
    for _ in range(count):
        now += draw.expovariate(rate)
        start = max(now, heapq.heappop(free))
        waited += start - now
        heapq.heappush(free, start + draw.expovariate(1 / seconds))
    assert waited / count == pytest.approx(mean_wait(servers, rate, seconds, variation=1.0), rel=0.15)


@settings(max_examples=50)
@given(rate=st.floats(0.01, 3000), seconds=st.floats(0.01, 5), wait=st.floats(0.001, 5))
def test_the_fewest_servers(rate: float, seconds: float, wait: float) -> None:
    servers = least_servers(rate, seconds, wait)
    assert mean_wait(servers, rate, seconds) <= wait
    assert servers == 1 or mean_wait(servers - 1, rate, seconds) > wait


def test_too_few_servers_wait_for_ever() -> None:
    assert mean_wait(2, 1.0, 2.0) == math.inf
