"""A directory for libraries that read files by name alone."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from dpn_rt.errors import CheckpointError


@contextlib.contextmanager
def temporary_files(files: Mapping[str, bytes]) -> Iterator[Path]:
    """A directory with these files, by name, until the block ends.

    Raises:
        CheckpointError: they cannot be written, as on a full disk.
    """
    with contextlib.ExitStack() as stack:
        num_bytes = sum(map(len, files.values()))
        try:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dpn_rt-build-")))
            for name, data in files.items():
                (directory / name).write_bytes(data)
        except OSError as error:
            raise CheckpointError(
                f"{tempfile.gettempdir()}: {num_bytes:,} bytes of tokenizer and image processor files cannot be "
                f"written there for a trial: {error.strerror}; TMPDIR names another directory"
            ) from error
        yield directory
