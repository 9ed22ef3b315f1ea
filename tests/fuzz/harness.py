"""Random changes of real inputs against one surface of the product, for a number of seconds.

A surface is a check of one input, which passes where the product gives a result or one of its own errors. What fails
is written to `build/fuzz/<surface>/`. So is what ends the process or stands still for `STALL_SECONDS`: it is the file
`running-...` there. Put it into `corpus/<surface>/`, under a name that says what it is; every run starts with those.
"""

from __future__ import annotations

import faulthandler
import hashlib
import os
import random
import re
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

SECONDS = float(os.environ.get("DPN_RT_FUZZ_SECONDS", "1.5"))
"""For each surface."""
STALL_SECONDS = 30
"""After which one input ends the process."""
MOST_MEMORY = 4 << 30
"""Bytes that the process may ask for beyond what it has, so that one input does not take the machine's."""
MOST_FAILURES = 20
"""That one run collects."""
CORPUS = Path(__file__).parent / "corpus"
FAILURES = Path(__file__).parents[2] / "build" / "fuzz"
Mutate = Callable[[bytes, random.Random], bytes]
LIBRARY_TEXT = re.compile(
    r"0x[0-9a-f]{6}|<[\w.]+ object|Traceback|BytesIO|pydantic|validation error|Input should|Extra inputs|"
    r"Field required|Invalid JSON|"
    r"tagged-union|constrained|\[Errno|Incorrect padding|Excess data|Only base64|httpx|httpcore|torch\.|"
    r"tensor\(|safetensors_rust|jinja2|UndefinedError|is undefined|codec can't"
)
"""What no message of the product has: words of libraries, objects and addresses."""


@dataclass(frozen=True)
class Surface:
    """A place where inputs come in."""

    name: str
    seeds: Sequence[bytes]
    """Real inputs."""
    mutate: Mutate
    """Changes an input. It also gets inputs that were changed before."""
    check: Callable[[bytes], object]
    """Raises whatever should not happen."""

    @property
    def corpus(self) -> list[Path]:
        """Inputs that failed once."""
        return sorted((CORPUS / self.name).glob("*"))

    @property
    def failures(self) -> Path:
        """The folder of inputs that fail."""
        folder = FAILURES / self.name
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def fuzz(surface: Surface, seconds: float = SECONDS) -> int:
    """Checks the corpus, the seeds, and then changed inputs for `seconds`; returns how many inputs there were.

    Fails the test with one message for all failures, of which each kind is reported once.
    """
    rng = random.Random(random.getrandbits(64))  # the test's own seed, see tests/seeds.py
    pool = [*(path.read_bytes() for path in surface.corpus), *surface.seeds]
    failures: dict[str, str] = {}
    count = 0
    with _limited_memory(), _watched(surface) as running:
        deadline = time.monotonic() + seconds
        for data in _inputs(surface, pool, rng):
            running(data)
            count += 1
            try:
                surface.check(data)
            except Exception as error:
                failures.setdefault(_kind(error), _kept(surface, data, error))
            if len(failures) == MOST_FAILURES or (count >= len(pool) and time.monotonic() > deadline):
                break
    print(f"{surface.name}: {count} inputs in {seconds:g} s")
    if failures:
        pytest.fail(f"{len(failures)} kinds of failures among {count} inputs:\n" + "\n".join(failures.values()))
    return count


def _inputs(surface: Surface, pool: Sequence[bytes], rng: random.Random) -> Iterator[bytes]:
    """First all of the pool, then changes of it: of each input a few, and now and then many."""
    yield from pool
    while True:
        data = rng.choice(pool)
        for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 5, 10))):
            data = surface.mutate(data, rng)
        yield data


@contextmanager
def _watched(surface: Surface) -> Iterator[Callable[[bytes], None]]:
    """Keeps the input that is being checked in a file, in case the process ends, and ends what stands still."""
    path = surface.failures / f"running-{os.getpid()}"
    watched_from = 0.0

    def running(data: bytes) -> None:
        nonlocal watched_from
        os.pwrite(file.fileno(), data, 0)
        os.ftruncate(file.fileno(), len(data))
        if time.monotonic() > watched_from + 1:  # not for each input, since it takes a thread each time
            watched_from = time.monotonic()
            faulthandler.dump_traceback_later(STALL_SECONDS, file=log, exit=True)

    with path.open("wb", buffering=0) as file, path.with_name(f"stalled-{os.getpid()}.txt").open("w") as log:
        try:
            yield running
        finally:
            faulthandler.cancel_dump_traceback_later()
    path.unlink()
    Path(log.name).unlink()


@contextmanager
def _limited_memory() -> Iterator[None]:
    if "asan" in os.environ.get("LD_PRELOAD", ""):  # AddressSanitizer maps terabytes, of which it uses little
        yield
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MOST_MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _kept(surface: Surface, data: bytes, error: Exception) -> str:
    path = surface.failures / hashlib.sha256(data).hexdigest()[:12]
    path.write_bytes(data)
    return f"  {path}: {type(error).__name__}: {str(error)[:300]}"


def _kind(error: Exception) -> str:
    """The same for errors of one place and one text but for numbers."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = "" if trace is None else f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
    return f"{place} {type(error).__name__} {re.sub(r'[0-9]+', '', str(error))[:60]}"


def assert_own_words(message: str, most: int = 8000) -> None:
    """That a message has no words of libraries and is no flood."""
    found = LIBRARY_TEXT.search(message)
    assert not found, f"library text {found[0]!r} in: {message[:300]}"
    assert len(message) <= most, f"message of {len(message)} characters: {message[:300]}"
