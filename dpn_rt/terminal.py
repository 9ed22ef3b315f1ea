"""What all commands share: exit statuses, standard streams, and the encodings of arguments and output."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

from dpn_rt.errors import ConfigError, DpnError
from dpn_rt.memory import lacks_memory
from dpn_rt.schema.text import is_text

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells use it."""


class LossyText(io.TextIOWrapper):
    """Loses what there is no room for: a message that cannot be written must not end what it tells about."""

    def write(self, text: str) -> int:
        """As any stream, without errors."""
        with suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        """As any stream, without errors."""
        with suppress(OSError):
            super().flush()


def escape_output() -> None:
    """From now on standard output escapes the characters that it cannot encode, as standard error does.

    Standard error loses what cannot be written, and everything where it is closed. Writing to a standard output that is
    closed is an `OSError`.
    """
    _open_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="backslashreplace")
    if type(sys.stderr) is io.TextIOWrapper:  # not what a notebook or a test has put there
        file = io.FileIO(sys.stderr.fileno(), "w", closefd=False)
        sys.stderr = LossyText(file, "utf-8", "backslashreplace", write_through=True)


def _open_closed_streams() -> None:
    """Otherwise the next file or socket would get a closed stream's number, and what is written to the stream."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            # It gets the lowest number that is free. An answer that nothing takes is an error, a message is none.
            os.open(os.devnull, os.O_WRONLY if number == 2 else os.O_RDONLY)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115


def ending_signals() -> tuple[signal.Signals, ...]:
    """What asks a command to end in order: Ctrl-C, a supervisor, a terminal that closes (unless nohup ignores it)."""
    hang_up = () if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (signal.SIGHUP,)
    return signal.SIGINT, signal.SIGTERM, *hang_up


def output_failed(error: OSError) -> int:
    """The exit status after standard output failed: the reader of a pipe has gone, a disk is full, or it is closed."""
    with suppress(OSError):  # Python flushes once more when it ends, and would report the error again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    print(f"error: standard output: {error.strerror or error}", file=sys.stderr)
    return 1


def file_failed(error: OSError, path: Path) -> int:
    """The exit status after a file could not be read or written; `path` where the error names none."""
    print(f"error: {error.filename or path}: {error.strerror or error}", file=sys.stderr)
    return 1


def exit_status(
    command: Callable[[], int],
    *,
    no_memory: Callable[[], str],
    interrupted: Callable[[], str],
    system_error: Callable[[OSError], int] = output_failed,
) -> int:
    """Runs a command. What went wrong is told in one line, unless it is a defect.

    Args:
        command: returns its exit status.
        no_memory: gives the message for too little memory of the host.
        interrupted: gives the message after Ctrl-C.
        system_error: tells what an `OSError` means and returns the exit status; by default one of standard output.

    Returns:
        The command's exit status, 1 after an error, or `INTERRUPTED`.
    """
    try:
        return command()
    except KeyboardInterrupt:
        print(interrupted(), file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if lacks_memory(error):
            message = no_memory()
        elif isinstance(error, DpnError):
            message = str(error)
        elif isinstance(error, OSError):
            return system_error(error)
        else:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 1


def check_text(options: argparse.Namespace, file_names: Collection[str] = ()) -> None:
    """Refuse arguments whose bytes are no text.

    Args:
        options: parsed; names of files, which may have any bytes, are paths or among `file_names`.
        file_names: of options.

    Raises:
        ConfigError: naming the option.
    """
    for name, value in vars(options).items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and name not in file_names and not is_text(text):
                raise ConfigError(f"--{name.replace('_', '-')} {text!r:.200}: not UTF-8, expected text in UTF-8")


def whole_number(text: str) -> int:
    """Of an option, for `argparse`: 0 or more, of nine digits at most."""
    if not (text.isascii() and text.isdecimal() and len(text) <= 9):
        raise argparse.ArgumentTypeError(f"{text!r:.100}: expected a whole number")
    return int(text)


def count(text: str) -> int:
    """The same, of at least 1."""
    number = whole_number(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r:.100}: expected at least 1")
    return number
