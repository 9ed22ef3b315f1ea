"""Fixtures that tests of several packages share, and the plugins that print seeds and report skipped tests."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator

import pytest

from tests.places import place as place
from tests.seeds import pytest_configure as pytest_configure
from tests.seeds import pytest_runtest_setup as pytest_runtest_setup
from tests.skips import pytest_addoption as pytest_addoption
from tests.skips import pytest_sessionfinish as pytest_sessionfinish
from tests.skips import pytest_terminal_summary as pytest_terminal_summary

# No test measures the machine or writes into the user's cache directory, unless it is about that.
os.environ.setdefault("DPN_RT_CPU_CHOICES", "default")

gc.disable()  # until all tests are imported
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell leaves it to what runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
# From 15 seconds on, the longest first: processes finish at about the same time, since what comes last is short.
LONGEST = [
    f"tests/{name}.py"
    for name in (
        "ops/test_isa", "batch/test_batch", "ray_serve/test_service", "server/test_identity",
        "server/test_serve_command", "engine/test_prefix_cache", "server/page/test_reductions",
        "benchmarks/test_benchmarks", "backends/tensorrt/test_evaluated_golden", "training/test_run",
        "server/test_hostile", "prompts/test_tokenizer", "backends/parallel/test_golden_ranks",
        "server/test_engine_client", "cuda/test_activation", "server/test_standard_error", "examples/test_checkpoint",
        "engine/test_hr", "builders/test_quantized_engines", "test_build_command", "server/page/test_problems",
        "server/test_connections", "evaluate/test_run", "engine/test_windows", "benchmarks/test_gpu_quick",
        "server/test_refusals", "server/test_tls",
    )
]  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: position for position, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.nodeid.partition("::")[0], len(LONGEST)))


def pytest_collection_finish() -> None:
    """What the imports of all tests leave is looked at by no collection of garbage: a full one takes a second of it."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _files_need_not_reach_the_disk() -> Iterator[None]:
    """No test takes the power away. What is no file is an error as before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)
        yield
