"""Runs test files, each in a process of its own and several at a time: a GPU's lasting error spoils one file alone.

python -m benchmarks.gpu_quick.pytest_files --processes 8 --seconds 540 --junit FILE -m MARKS PATH ...
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from dpn_rt.terminal import escape_output

ROOT = Path(__file__).resolve().parents[2]
SEED = "DPN_RT_TEST_SEED"
NO_TESTS = 5
"""pytest's exit status where no test was selected."""


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
    """Name and first line of the error of each test that failed."""
    output: str = ""

    @property
    def is_good(self) -> bool:
        return self.status in (0, NO_TESTS)


def sanitized(tool: str) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """The program and the variables that run tests under a tool of compute-sanitizer, for the product's kernels alone.

    Without torch's caching allocator every tensor is an allocation of its own, so that the first byte after it counts.
    """
    program = ("compute-sanitizer", "--tool", tool, "--kernel-name", "kns=3dpn4cuda", "--error-exitcode", "9")
    return program, (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)


def files_under(paths: Sequence[str]) -> list[str]:
    """The test files under `paths`, largest first: they take longest."""
    found: set[Path] = set()
    for path in paths:
        given = ROOT / path
        found |= set(given.rglob("test_*.py")) if given.is_dir() else {given}
    ordered = sorted(found, key=lambda file: (-file.stat().st_size, file))
    return [str(file.relative_to(ROOT)) for file in ordered]


def run_jobs(jobs: Sequence[Job], processes: int, seconds: float, junit: Path | None = None) -> Iterator[Result]:
    """Results as they come. What runs after `seconds` is stopped; `junit` gets the reports of all processes."""
    end, suites = time.monotonic() + seconds, ET.Element("testsuites")
    seed = os.environ.get(SEED) or str(int.from_bytes(os.urandom(4), "little"))
    print(f"{SEED}={seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="gpu-tests-") as folder, ThreadPoolExecutor(processes) as pool:
        variables = {**cores_of_each(min(processes, len(jobs))), **os.environ, SEED: seed}
        started = [pool.submit(_run, job, Path(folder) / f"{i}.xml", end, variables) for i, job in enumerate(jobs)]
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


def _run(job: Job, file: Path, end: float, variables: Mapping[str, str]) -> tuple[Result, ET.Element | None]:
    left = end - time.monotonic()
    if left <= 0:
        return Result(job.name, None, 0.0, output="no time was left"), None
    command = [*job.prefix, sys.executable, "-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider"]
    command += [f"--junit-xml={file}", *job.arguments]
    environment = {**variables, **dict(job.environment)}
    start, log = time.monotonic(), file.with_suffix(".log")
    with log.open("wb") as stream:  # a pipe would be waited for until the last child has closed it
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT)
        status: int | None
        try:
            status = process.wait(left)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            status = None
    output = log.read_text(encoding="utf-8", errors="replace")
    result = Result(job.name, status, time.monotonic() - start, output=output)
    report = ET.parse(file).getroot() if file.exists() else None
    if report is not None:
        _count(report, result)
    return result, report


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
