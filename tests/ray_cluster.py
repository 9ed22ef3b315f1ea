"""A Ray cluster on this machine for one module of tests: two replicas, one thread each, files in one folder."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
