"""A file that torch.save wrote, checked before torch reads it.

torch's safe loading runs no code, but makes as much room as the file's lists ask for, and calls functions such as
`bytearray` with any size.
"""

from __future__ import annotations

import io
import os
import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from dpn_rt.errors import CheckpointError
from dpn_rt.schema.files import open_file
from dpn_rt.schema.text import shown

_DAMAGED = "truncated or damaged: not a file that torch.save wrote"
PICKLE_BYTES = 16 << 20
"""Largest list of tensors; 50,000 tensors take about 10 MB."""
_LEGACY_PICKLES = 5
"""Of a file from before torch 1.6: magic number, version, machine, tensors, names of storages."""
_NAMES = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(?:tensor|tensor_v2|parameter)|torch(?:\.storage)? \w+Storage|"
    r"torch (?:float16|float32|float64|bfloat16|u?int\d+|bool|float8_\w+)|torch\.serialization _get_layout"
)
"""Modules and names that tensors are made of."""


def check_archive(path: Path) -> None:
    """Refuse a file that holds other things than tensors, or is larger inside than outside.

    Raises:
        CheckpointError: with what is wrong.
    """
    with open_file(path, CheckpointError) as file:
        start = file.read(4)
        file.seek(0)
        if start.startswith(b"PK"):
            _check_names(path, _pickle(path, file), 1)
        elif start.startswith(b"\x80"):
            _check_names(path, file.read(PICKLE_BYTES), _LEGACY_PICKLES)


def _pickle(path: Path, file: BinaryIO) -> bytes:
    """The pickle in a zip archive, whose entries are as large as they say."""
    size = os.fstat(file.fileno()).st_size
    try:
        archive = zipfile.ZipFile(file)
        entries = archive.infolist()
    except Exception as error:  # of any kind: damaged directories lead the library anywhere
        raise CheckpointError(f"{path}: {_DAMAGED}") from error
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise CheckpointError(f"{path}: {shown(entry.filename)} is compressed, expected it as torch.save writes it")
    pickles = [entry for entry in entries if entry.filename.endswith("data.pkl")]
    if len(pickles) != 1 or pickles[0].file_size > PICKLE_BYTES or sum(entry.file_size for entry in entries) > size:
        raise CheckpointError(
            f"{path}: {_DAMAGED}: {len(pickles)} lists of tensors (data.pkl) of "
            f"{sum(entry.file_size for entry in pickles):,} bytes, expected one of at most {PICKLE_BYTES:,}"
        )
    try:
        return archive.read(pickles[0])
    except Exception as error:  # as above
        raise CheckpointError(f"{path}: {_DAMAGED}") from error


def _check_names(path: Path, data: bytes, count: int) -> None:
    """Refuse names of other things than tensors in the first `count` pickles of `data`."""
    try:
        other = next((name for name in _names(io.BytesIO(data), count) if not _NAMES.fullmatch(name)), None)
    except Exception as error:  # of any kind, as above
        raise CheckpointError(f"{path}: {_DAMAGED}") from error
    if other is not None:
        raise CheckpointError(
            f"{path}: refused: the pickle holds more than tensors ({shown(other)}), and loading it could run code; "
            "convert the checkpoint to safetensors where you trust it"
        )


def _names(stream: BinaryIO, count: int) -> Iterator[str]:
    """Modules and names that pickles import, as far as these can be read."""
    for _ in range(count):
        for code, argument, _position in pickletools.genops(stream):
            if code.name in ("GLOBAL", "INST"):
                yield str(argument)
            elif code.name == "STACK_GLOBAL" or code.name.startswith("EXT"):  # newer than torch.save's protocol
                yield code.name
