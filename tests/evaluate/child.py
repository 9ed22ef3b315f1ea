"""A process that runs `evaluate` once, so that everything is imported, and then forks one run for each line of input.

It is started with OMP_NUM_THREADS=1: a fork would lose further threads.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from dpn_rt.evaluate.__main__ import main


def serve(first: list[str]) -> None:
    """Reads arguments as JSON, and prints the id of the process that got them, and then its exit status."""
    replies, sys.stdout = sys.stdout, Path(os.devnull).open("w")  # noqa: SIM115
    main(first)
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            os._exit(main(json.loads(line)))
        print(process, file=replies, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), file=replies, flush=True)


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
