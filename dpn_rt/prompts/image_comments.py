"""Parts of PPM and GIF files without the comments that stand before the pixels, which Pillow would read in Python."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import BinaryIO

from dpn_rt.prompts.image_blocks import MOST_SKIPPED, PPM_HEADER, PPM_NUMBERS, TooManyBlocksError

Span = tuple[int, int]
"""First byte and end of a part of a file."""

_SPACE = b" \t\n\v\f\r"
_PPM_MAGIC = 6
"""Most characters of a PPM's first word."""
_GIF_TEXTS = (b"\x01", b"\xfe", b"\xff")
"""Kinds of a GIF's extensions: text to be drawn, a comment, an application's own."""


def size_of(file: BinaryIO) -> int:
    """Of a file, whose position stays."""
    position = file.tell()
    size = file.seek(0, io.SEEK_END)
    file.seek(position)
    return size


def ppm_spans(file: BinaryIO) -> Iterator[Span]:
    """All but the comments of the header, each with the end of its line. A number may go on after one, as in Pillow.

    Raises:
        TooManyBlocksError: there are more than `MOST_SKIPPED` comments.
    """
    size = size_of(file)
    file.seek(0)
    magic = _word(file)
    numbers, comments, start, is_in_number = PPM_NUMBERS.get(magic, 3), 0, 0, False
    for _ in range(PPM_HEADER):  # `check_blocks` refuses longer headers
        while (byte := file.read(1)) == b"#":
            comments += 1
            if comments > MOST_SKIPPED:
                raise TooManyBlocksError(f"a PPM of more than {MOST_SKIPPED} comments")
            if (end := file.tell() - 1) > start:
                yield start, end
            start = _end_of_line(file)
            file.seek(start)
        is_space = not byte or byte in _SPACE
        numbers -= is_space and is_in_number
        is_in_number = not is_space
        if not byte or not numbers:
            break
    yield start, size


def gif_spans(file: BinaryIO) -> Iterator[Span]:
    """All but comments and other texts before the first frame.

    Raises:
        TooManyBlocksError: there are more than `MOST_SKIPPED` blocks before it.
    """
    size = size_of(file)
    file.seek(0)
    head = file.read(13)
    start = 13 + (3 << ((head[10] & 7) + 1) if len(head) == 13 and head[10] & 0x80 else 0)
    yield 0, min(start, size)
    left = MOST_SKIPPED
    while start < size and left > 0:
        file.seek(start)
        kind = file.read(2)
        end, left = start + 1, left - 1
        if kind[:1] in (b",", b";"):
            yield start, size
            return
        if kind[:1] == b"!":  # an extension: made of parts, one of size 0 ends it
            end, part = start + 2, 1
            while part and left > 0:
                file.seek(end)
                part = (file.read(1) or b"\0")[0]
                end, left = end + 1 + part, left - 1
        if kind[:1] != b"!" or kind[1:] not in _GIF_TEXTS:
            yield start, min(end, size)
        start = end
    if left <= 0:
        raise TooManyBlocksError(f"a GIF of more than {MOST_SKIPPED} blocks before its first frame")


def _word(file: BinaryIO) -> bytes:
    """The first word, with the position behind the space after it."""
    word = b""
    while len(word) < _PPM_MAGIC and (byte := file.read(1)) and byte not in _SPACE:
        word += byte
    return word


def _end_of_line(file: BinaryIO) -> int:
    """Where the next line begins; the end of the file where there is none."""
    while block := file.read(io.DEFAULT_BUFFER_SIZE):
        places = [place for end in (b"\r", b"\n") if (place := block.find(end)) >= 0]
        if places:
            return file.tell() - len(block) + min(places) + 1
    return file.tell()
