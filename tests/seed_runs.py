"""Runs every random test function with many seeds: `make seeds SEEDS=200 TESTS=tests/ops`.

A pytest plugin: `python -m pytest -p tests.seed_runs --seeds 200 tests/ops`. The runs of a function are spread over its
parameter sets. Each run has another seed and new fixtures, those of modules and sessions too, so that the command which
is printed for a failure repeats it alone. A test that draws nothing by its seed runs once and is listed. Examples of
Hypothesis count as runs. No further run of a function starts after `--seconds-per-function`.
"""

from __future__ import annotations

import math
import random
import shlex
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from _pytest.runner import runtestprotocol  # what plugins call that run a test again

from tests.seeds import VARIABLE, is_hypothesis_test, read_seed, use_seed


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seeds", type=int, default=200, help="runs of a test function, each with a seed of its own")
    parser.addoption("--seconds-per-function", type=float, default=60.0, help="time after which no further run starts")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(SeedRuns(config), "seed-runs")


@dataclass
class Function:
    """What was seen of a test function."""

    runs: int = 0
    """Runs that were not skipped; for Hypothesis examples."""
    drew: bool = False
    """Whether a run took numbers from a generator that has the test's seed."""
    seconds: float = 0.0
    failures: dict[str, str] = field(default_factory=dict)
    """Command that repeats a failed run -> the first line of its error."""


class SeedRuns:
    """The plugin. In a process that runs tests it repeats them, in the one that reports it collects the outcomes."""

    def __init__(self, config: pytest.Config) -> None:
        self._seeds: int = config.getoption("--seeds")
        self._seconds: float = config.getoption("--seconds-per-function")
        self._first_seed = read_seed(config)
        self._num_sets: Counter[str] = Counter()
        self._before: tuple[object, ...] = ()
        self._asked_for_seed = False
        self._functions: defaultdict[str, Function] = defaultdict(Function)
        self._seconds_left: defaultdict[str, float] = defaultdict(float)
        self._skipped: set[tuple[str, int]] = set()
        self._patch = pytest.MonkeyPatch()
        self._patch.setattr(torch, "initial_seed", self._initial_seed)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        has_gpu = torch.cuda.is_available()
        self._num_sets.update(_function(item.nodeid) for item in items if has_gpu or not item.get_closest_marker("gpu"))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool:
        function, examples = _function(item.nodeid), _num_examples(item)
        num_sets = max(1, self._num_sets[function])
        # A set takes its share and what those before it left.
        self._seconds_left[function] += self._seconds / num_sets
        end = time.monotonic() + self._seconds_left[function]
        for run in range(math.ceil(self._seeds / (num_sets * examples))):
            seed = (self._first_seed + run) % 2**32
            use_seed(item.config, seed)
            item.user_properties = [("seed", seed), ("examples", examples)]
            item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
            reports = runtestprotocol(item, nextitem=None)  # tears down all fixtures, so that the next run draws them
            item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
            if (
                any(report.skipped for report in reports)
                or not dict(reports[-1].user_properties)["drew"]
                or time.monotonic() > end
            ):
                break
        self._seconds_left[function] = end - time.monotonic()
        return True

    def pytest_runtest_setup(self) -> None:
        """After `tests.seeds`, before the test's fixtures."""
        self._asked_for_seed = False
        self._before = _states_of_generators()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> None:
        drew = self._asked_for_seed or is_hypothesis_test(item) or _states_of_generators() != self._before
        item.user_properties.append(("drew", drew))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        properties: dict[str, Any] = dict(report.user_properties)
        if "seed" not in properties:  # of a run that was broken off
            return
        run = report.nodeid, properties["seed"]
        if report.skipped:
            self._skipped.add(run)
        if run in self._skipped:
            return
        function = self._functions[_function(report.nodeid)]
        function.seconds += report.duration
        if report.when == "teardown":
            function.runs += properties["examples"]
            function.drew |= properties["drew"]
        if report.outcome == "failed":
            command = f"{VARIABLE}={properties['seed']} python -m pytest {shlex.quote(report.nodeid)}"
            function.failures[command] = _message(report)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        functions = sorted(self._functions.items())
        line, section = terminalreporter.line, terminalreporter.section
        section("functions that drew nothing by their seed")
        for name, function in functions:
            if not function.drew:
                line(name)
        section(f"functions with fewer than {self._seeds} runs")
        for name, function in functions:
            if function.drew and function.runs < self._seeds:
                line(f"{function.runs:5} in {function.seconds:.0f} s  {name}")
        section("functions that failed")
        for name, function in functions:
            if function.failures:
                line(f"{len(function.failures)} of {function.runs}  {name}", red=True)
            for command, message in function.failures.items():
                line(f"  {command}\n    {message}")
        drew = [function for _, function in functions if function.drew]
        runs, failures = sum(f.runs for f in drew), sum(len(f.failures) for _, f in functions)
        line(f"{len(drew)} random functions of {len(functions)}, {runs} runs of them, {failures} failures")

    def pytest_unconfigure(self) -> None:
        self._patch.undo()

    def _initial_seed(self) -> int:
        """`torch.initial_seed`, by which tests seed generators of their own."""
        self._asked_for_seed = True
        return torch.default_generator.initial_seed()


def _function(nodeid: str) -> str:
    return nodeid.partition("[")[0]


def _num_examples(item: pytest.Item) -> int:
    """What one run draws: of a Hypothesis test its examples."""
    if not is_hypothesis_test(item):
        return 1
    from hypothesis import settings

    called, cls = getattr(item, "obj", None), getattr(item, "cls", None)
    own = getattr(called, "_hypothesis_internal_use_settings", None) or getattr(cls, "settings", None)
    return (own or settings()).max_examples


def _states_of_generators() -> tuple[object, ...]:
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002
    return torch.get_rng_state().numpy().tobytes(), repr(numpy_state["state"]["pos"]), random.getstate()


def _message(report: pytest.TestReport) -> str:
    """The first line of the error."""
    crash = getattr(report.longrepr, "reprcrash", None)
    return (str(crash.message if crash else report.longrepr).strip().splitlines() or [""])[0][:300]
