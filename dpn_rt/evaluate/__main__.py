"""Answer a benchmark's questions, score the answers, report: `python -m dpn_rt.evaluate run|score|convert|report`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dpn_rt.errors import DpnError
from dpn_rt.evaluate.commands import convert, report, run, score
from dpn_rt.memory import lacks_memory, not_enough_memory
from dpn_rt.terminal import INTERRUPTED, check_text, escape_output, output_failed


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0, 1 after an error, 3 where rows were skipped."""
    escape_output()
    options = _parser().parse_args(arguments)
    try:
        check_text(options)
        status: int = options.run(options)
    except (DpnError, MemoryError, RuntimeError, ImportError) as error:
        is_memory = lacks_memory(error)
        if not is_memory and not isinstance(error, DpnError):
            raise
        engine = getattr(options, "engine", None) or Path()
        print(f"error: {not_enough_memory(engine) if is_memory else error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: what has been written is kept, and the same command goes on", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        return output_failed(error)
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
