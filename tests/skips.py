"""Reasons for skipped tests, a summary of them after every run, and `--strict-skips` for CI.

A pytest plugin, which `tests/conftest.py` loads.
"""

from __future__ import annotations

import importlib.util
import os
from collections import Counter

import pytest

NO_GPU = "there is no GPU"
GPU_PRESENT = "there is a GPU"
"""Reason of tests that replace a GPU by the host."""
UNSUPPORTED_BY_GPU = "this GPU does not support it"
UNSUPPORTED_BY_CPU = "this processor lacks the instructions"
SUPPORTED_BY_CPU = "this processor has the instructions"
"""Reason of tests that replace instructions by plain C++."""
OTHER_ENVIRONMENT = "runs in an environment of its own: make test-harnesses"
"""Of tests whose packages are large, or contradict those of the other tests (`need_harness`)."""
ACCEPTED = frozenset((NO_GPU, GPU_PRESENT, UNSUPPORTED_BY_GPU, UNSUPPORTED_BY_CPU, SUPPORTED_BY_CPU, OTHER_ENVIRONMENT))
"""Reasons that are allowed in CI; all else can be installed or built there."""

NO_CUDA_BUILD = "built without CUDA"
NO_TENSORRT = "needs TensorRT-RTX: pip install --no-build-isolation -e '.[tensorrt]'"
NO_PARQUET = "needs pyarrow and pandas: pip install --no-build-isolation -e '.[evaluate]'"
NO_PEFT = "needs peft: pip install --no-build-isolation -e '.[train]'"
NO_BROWSER = "needs chromium and chromedriver"
NO_ONEDNN = "torch is built without oneDNN"
NO_LANGCHAIN = "needs langchain-openai: pip install --no-build-isolation -e '.[test]'"
NO_COMPILER = "needs g++ and make"
NOT_LINUX = "needs Linux"
NOT_GLIBC = "needs glibc"
FORCED_ISA = "DPN_RT_CPU_ISA forces an instruction set"


def need_harness(package: str) -> None:
    """Skip a module whose package is missing; in `make test-harnesses`, which has installed it, fail."""
    if importlib.util.find_spec(package) is None:
        if os.environ.get("DPN_RT_HARNESSES"):
            pytest.fail(f"{package} is missing in the environment of make test-harnesses", pytrace=False)
        pytest.skip(OTHER_ENVIRONMENT, allow_module_level=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--strict-skips",
        action="store_true",
        help="fail where a test is skipped for another reason than a GPU or instructions that the machine lacks",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or not session.config.getoption("--strict-skips"):
        return
    if session.exitstatus == pytest.ExitCode.OK and not skip_reasons(reporter).keys() <= ACCEPTED:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    reasons = skip_reasons(terminalreporter)
    if reasons:
        terminalreporter.section("skipped")
    for reason, count in sorted(reasons.items()):
        is_wrong = config.getoption("--strict-skips") and reason not in ACCEPTED
        terminalreporter.line(f"{count:5} {reason}{' (--strict-skips: an error)' if is_wrong else ''}", red=is_wrong)


def skip_reasons(reporter: pytest.TerminalReporter) -> Counter[str]:
    """Reason -> number of tests, or of modules that were skipped as a whole."""
    reports = reporter.stats.get("skipped", [])
    return Counter(str(report.longrepr[2]).removeprefix("Skipped: ") for report in reports)
