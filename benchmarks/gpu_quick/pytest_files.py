"""Runs test files, each in a process of its own and several at a time: a GPU's lasting error spoils one file alone.

python -m benchmarks.gpu_quick.pytest_files --processes 8 --seconds 540 --junit FILE -m MARKS PATH ...
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from benchmarks.gpu_quick.groups import Groups, groups
from dpn_rt.terminal import escape_output

ROOT = Path(__file__).resolve().parents[2]
SEED = "DPN_RT_TEST_SEED"
NO_TESTS = 5
"""pytest's exit status where no test was selected."""
FIRST = ("tests/backends/kernels/", "tests/device/")
"""Tests of the runtime begin first: an engine that does not run there tells more than one of many kernels."""
PYTEST = (
    "-o", "addopts=", "-v", "-rf", "--tb=short", "-o", "junit_logging=no", "-p", "no:cacheprovider",
    "-p", "_hypothesis_pytestplugin",
)  # fmt: skip
"""Options of every process. A line for each test tells what ran where there is no report; other packages' plugins,
which take longer to import than many a file takes to run, are left out."""
OUTCOMES = {
    "PASSED": "passed", "XFAIL": "passed", "XPASS": "passed", "SKIPPED": "skipped", "FAILED": "failed",
    "ERROR": "failed",
}  # fmt: skip
TEST_LINE = re.compile(rf"^(\S+\.py::.+?)(?: ({'|'.join(OUTCOMES)})\b.*| ?)$", re.MULTILINE)
"""What `pytest -v` prints of a test: its name as it begins, and how it ended."""


@dataclass(frozen=True)
class Job:
    """One pytest process."""

    name: str
    arguments: tuple[str, ...]
    """Of pytest."""
    prefix: tuple[str, ...] = ()
    """A program that runs it."""
    environment: tuple[tuple[str, str], ...] = ()


@dataclass
class Result:
    """Of one process."""

    name: str
    status: int | None
    """Of pytest; None: stopped."""
    seconds: float
    counts: dict[str, int] = field(default_factory=dict)
    """passed, failed, skipped."""
    failures: list[str] = field(default_factory=list)
    """Name and first line of the error of each test that failed, and the one that ran when the process ended."""
    output: str = ""

    @property
    def is_good(self) -> bool:
        return self.status in (0, NO_TESTS)


def sanitized(tool: str) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """The program and the variables that run tests under a tool of compute-sanitizer, for the product's kernels alone.

    Without torch's caching allocator every tensor is an allocation of its own, so that the first byte after it counts.
    """
    program = ["compute-sanitizer", "--tool", tool, "--kernel-name", "kns=3dpn4cuda", "--error-exitcode", "9"]
    if tool == "memcheck":
        program += ["--report-api-errors", "no"]  # torch and cuBLAS ask for what a driver may refuse
    return tuple(program), (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)


def files_under(paths: Sequence[str]) -> list[str]:
    """The test files under `paths`: the runtime's, then others; the largest of each first, since they take longest."""
    found: set[Path] = set()
    for path in paths:
        given = ROOT / path
        found |= set(given.rglob("test_*.py")) if given.is_dir() else {given}
    sizes = {str(file.relative_to(ROOT)): file.stat().st_size for file in found}
    return sorted(sizes, key=lambda file: (not file.startswith(FIRST), -sizes[file], file))


def run_jobs(jobs: Sequence[Job], processes: int, seconds: float, junit: Path | None = None) -> Iterator[Result]:
    """Results as they come. What runs after `seconds` is stopped; `junit` gets the reports of all processes."""
    end, suites = time.monotonic() + seconds, ET.Element("testsuites")
    seed = os.environ.get(SEED) or str(int.from_bytes(os.urandom(4), "little"))
    print(f"{SEED}={seed}", flush=True)
    with (
        tempfile.TemporaryDirectory(prefix="gpu-tests-") as folder,
        ThreadPoolExecutor(processes) as pool,
        groups() as running,
    ):
        variables = {**cores_of_each(min(processes, len(jobs))), **os.environ, SEED: seed}
        variables |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        run = partial(_run, running=running, end=end, variables=variables)
        started = [pool.submit(run, job, Path(folder) / f"{i}.xml") for i, job in enumerate(jobs)]
        for future in as_completed(started):
            result, report = future.result()
            if report is not None:
                suites.extend(report.iter("testsuite"))
            if junit is not None:
                ET.ElementTree(suites).write(junit, encoding="utf-8", xml_declaration=True)
            yield result


def cores_of_each(processes: int) -> dict[str, str]:
    """Variables of processes that share the cores: a part for each, and threads that wait do not spin."""
    return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // max(1, processes))), "OMP_WAIT_POLICY": "passive"}


def _run(
    job: Job, file: Path, *, running: Groups, end: float, variables: Mapping[str, str]
) -> tuple[Result, ET.Element | None]:
    start = time.monotonic()
    if start >= end:
        return Result(job.name, None, 0.0, output="no time was left"), None
    command = [*job.prefix, sys.executable, "-m", "pytest", *PYTEST, f"--junit-xml={file}", *job.arguments]
    environment, log = {**variables, **dict(job.environment)}, file.with_suffix(".log")
    with log.open("wb") as stream:  # a pipe would be waited for until the last child has closed it
        status = running.run(command, end - start, cwd=ROOT, env=environment, output=stream)
    output = log.read_text(encoding="utf-8", errors="replace")
    result = Result(job.name, status, time.monotonic() - start, output=output)
    report = _report(file)
    if report is not None:
        _count(report, result)
    else:
        _read_lines(result)
    return result, report


def _report(file: Path) -> ET.Element | None:
    """None where pytest has not written it, or not to its end."""
    try:
        return ET.parse(file).getroot()
    except (FileNotFoundError, ET.ParseError):
        return None


def _read_lines(result: Result) -> None:
    """What the lines of `pytest -v` tell of a process that has left no report."""
    result.counts = {"passed": 0, "failed": 0, "skipped": 0}
    found = TEST_LINE.findall(result.output)
    for name, outcome in found:
        if outcome:
            result.counts[OUTCOMES[outcome]] += 1
        if OUTCOMES.get(outcome) == "failed":
            result.failures.append(name)
    if found and not found[-1][1]:
        result.failures.append(f"{found[-1][0]}: ran when the process ended")


def _count(report: ET.Element, result: Result) -> None:
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for case in report.iter("testcase"):
        problem = next((part for part in case if part.tag in ("failure", "error")), None)
        if problem is not None:
            counts["failed"] += 1
            first = ((problem.get("message") or "").splitlines() or [""])[0]
            result.failures.append(f"{case.get('classname')}::{case.get('name')}: {first[:160]}")
        else:
            counts["skipped" if case.find("skipped") is not None else "passed"] += 1
    result.counts = counts


def line_of(result: Result) -> str:
    """What became of a process, in one line."""
    state = "stopped" if result.status is None else "ok" if result.is_good else f"exit status {result.status}"
    counts = ", ".join(f"{count} {name}" for name, count in result.counts.items() if count)
    return f"{result.name}: {state} after {result.seconds:.0f} s, {counts or 'no report'}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 where all tests passed in time."""
    escape_output()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("paths", nargs="+", metavar="PATH", help="test files and folders")
    parser.add_argument("-m", dest="marks", default="gpu", help="pytest's marks (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=8, help="at one time (default: %(default)s)")
    parser.add_argument("--seconds", type=int, default=540, help="for all (default: %(default)s)")
    parser.add_argument("--sanitizer", choices=("memcheck", "racecheck"), help="run them under compute-sanitizer")
    parser.add_argument("--junit", type=Path, metavar="FILE", help="write the reports of all there")
    options = parser.parse_args(arguments)
    prefix, environment = ((), ()) if options.sanitizer is None else sanitized(options.sanitizer)
    jobs = [Job(file, ("-m", options.marks, file), prefix, environment) for file in files_under(options.paths)]
    bad = []
    for result in run_jobs(jobs, options.processes, options.seconds, options.junit):
        print(line_of(result), flush=True)
        if not result.is_good:
            bad.append(result.name)
            print(result.output[-4000:], flush=True)
    print(f"{len(jobs) - len(bad)} of {len(jobs)} files are good" + (f", not {', '.join(bad)}" if bad else ""))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
