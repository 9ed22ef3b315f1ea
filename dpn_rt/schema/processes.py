"""Starts a module of this package in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys


def start_module(module: str, connection: int) -> subprocess.Popen[bytes]:
    """Starts `python -m module CONNECTION`, which imports what this process would import.

    `-m` alone would look into the working directory first, where a file of someone else may have the name of a package.
    The process is the first of a group of its own: Ctrl-C on a terminal goes to this process alone, which acts on it.

    Args:
        module: full name, such as `dpn_rt.server.engine_client.worker`.
        connection: file descriptor that the process inherits under the same number; it has no other and no input.

    Raises:
        OSError: the system refuses a process.
    """
    return subprocess.Popen(
        [sys.executable, "-P", "-m", module, str(connection)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)},
        stdin=subprocess.DEVNULL,
        pass_fds=[connection],
        process_group=0,
    )
