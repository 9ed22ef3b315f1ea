"""Files of GIF, BMP and PPM that Pillow would read a few bytes at a time, for minutes: refused before it does.

Pillow reads these formats' headers, and some of their pixels, in Python. (`image_metadata` counts the blocks of PNG and
JPEG, and gives this the files without their comments.)
"""

from __future__ import annotations

import re
from typing import BinaryIO

MOST_BLOCKS = 20_000
"""That Pillow reads of a PNG, a JPEG, or a GIF up to its first frame. Files of 100 MB in blocks of 8 KB have 13,000."""
MOST_SKIPPED = 100_000
"""Blocks of a PNG, a JPEG or a GIF, together with those that are skipped."""
MOST_TEXT_BYTES = 2**18
"""Of a PPM as text."""
MOST_SCALED_BYTES = 2**22
"""Of a PPM whose samples have another range than 255 or 65535: Pillow reads them one by one."""
MOST_RUNS_BYTES = 2**19
"""Of a BMP in runs."""
PPM_HEADER = 2**12
"""Bytes of a PPM before its pixels, without comments."""
PPM_NUMBERS = {b"P1": 2, b"P4": 2}
"""Of a header: width and height; others have a range too."""
_BMP_COMPRESSION = slice(30, 34)
_BMP_RUNS = (1, 2)


class TooManyBlocksError(ValueError):
    """A file that is made to cost time or memory. The message says of what there is too much."""


def check_blocks(file: BinaryIO) -> None:
    """Leaves the file's position anywhere.

    Raises:
        TooManyBlocksError: the file would take long to read.
    """
    file.seek(0)
    head = file.read(PPM_HEADER)
    if head[:3] == b"GIF":
        _check_gif(file)
    elif head[:2] == b"BM" and int.from_bytes(head[_BMP_COMPRESSION], "little") in _BMP_RUNS:
        _check_size(file, MOST_RUNS_BYTES, "a BMP in runs")
    elif head[:1] == b"P" and head[1:2] in b"0123456fy":
        _check_ppm(file, head)


def _check_ppm(file: BinaryIO, head: bytes) -> None:
    numbers = re.sub(rb"#[^\r\n]*[\r\n]?", b"", head).split()[1:]
    if len(numbers) < PPM_NUMBERS.get(head[:2], 3) and len(head) == PPM_HEADER:
        raise TooManyBlocksError(f"a PPM whose header has more than {PPM_HEADER} bytes")
    if head[1:2] in b"123":
        _check_size(file, MOST_TEXT_BYTES, "a PPM as text")
    elif head[1:2] in b"056y" and numbers[2:3] not in ([b"255"], [b"65535"]):
        _check_size(file, MOST_SCALED_BYTES, "a PPM whose samples have another range than 255 or 65535")
    elif head[1:2] in b"0y" and numbers[2:3] == [b"65535"]:
        _check_size(file, MOST_SCALED_BYTES, "a PPM of Pillow's own kinds with 16 bits")


def _check_size(file: BinaryIO, most: int, kind: str) -> None:
    size = file.seek(0, 2)
    if size > most:
        raise TooManyBlocksError(f"{kind} of {size} bytes, expected at most {most}")


def _check_gif(file: BinaryIO) -> None:
    """Walks over everything up to the first frame, as Pillow does."""
    file.seek(0)
    head = file.read(13)
    if len(head) == 13 and head[10] & 0x80:
        file.seek(3 << ((head[10] & 7) + 1), 1)
    is_extension = False
    for _ in range(MOST_BLOCKS):
        byte = file.read(1)
        if is_extension:  # made of parts; one of size 0 ends it
            is_extension = byte not in (b"", b"\0")
            file.seek(byte[0] if byte else 0, 1)
        elif byte in (b"", b",", b";"):
            return
        elif byte == b"!":
            is_extension = True
            file.seek(1, 1)
    raise TooManyBlocksError(f"a GIF of more than {MOST_BLOCKS} blocks before its first frame")
