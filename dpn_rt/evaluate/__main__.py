"""Answer a benchmark's questions, score the answers, report: `python -m dpn_rt.evaluate run|score|convert|report`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dpn_rt.evaluate.commands import convert, report, run, score
from dpn_rt.memory import not_enough_memory
from dpn_rt.terminal import check_text, escape_output, exit_status


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0, 1 after an error, 3 where rows were skipped."""
    escape_output()
    options = _parser().parse_args(arguments)
    return exit_status(
        lambda: _run(options),
        no_memory=lambda: not_enough_memory(getattr(options, "engine", Path())),
        interrupted=lambda: "interrupted: what has been written is kept, and the same command goes on",
    )


def _run(options: argparse.Namespace) -> int:
    check_text(options)
    status: int = options.run(options)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dpn_rt.evaluate", description="Answer a benchmark's questions, score the answers, report."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (run, score, convert, report):
        command.add_parser(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
