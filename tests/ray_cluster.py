"""A Ray cluster on this machine for one module of tests: two replicas, one thread each, files in one folder."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Before Ray is loaded: it tells its makers nothing, and keeps no token in the user's home.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
# A replica that is slow to say how many requests it has is passed over after 0.1 s: on a busy machine, by chance.
os.environ["RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S"] = "600"
os.environ["RAY_SERVE_MAX_QUEUE_LENGTH_RESPONSE_DEADLINE_S"] = "600"

import ray

OBJECT_STORE_BYTES = 80 * 2**20
"""Ray takes no smaller one."""


@contextmanager
def ray_cluster(num_cpus: int) -> Iterator[Path]:
    """Gives the folder of its files. Paths of sockets may have 107 bytes, more than folders of pytest leave."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    try:
        ray.init(
            "local",  # whatever other cluster there is
            num_cpus=num_cpus,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            _temp_dir=str(folder),
            log_to_driver=False,
        )
        yield folder
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
