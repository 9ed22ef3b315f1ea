"""PNG, JPEG, GIF and PPM files without the blocks that hold no pixels, which Pillow would read, keep and count.

Colour profiles, texts, thumbnails and private blocks are skipped, however large, many or damaged they are. What can
turn the picture stays, up to `MOST_BYTES`: EXIF, XMP and ImageMagick's EXIF as text. Animations become their first
frame.
"""

from __future__ import annotations

import io
import re
import zlib
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from typing import BinaryIO

from dpn_rt.prompts.image_blocks import MOST_BLOCKS, MOST_SKIPPED, TooManyBlocksError
from dpn_rt.prompts.image_comments import Span, gif_spans, ppm_spans, size_of

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_SIGNATURE = b"\xff\xd8\xff"
MOST_BYTES = 1 << 20
"""Of EXIF and XMP that are kept, together; also of each compressed block once it is expanded."""
MOST_SPANS = 10_000
"""Of the bytes that are kept. In real files pixels stand together, in tens of spans at most."""

MOST_SCANS = 100
"""Of a JPEG. Progressive ones have about ten, and each goes over the whole picture."""
MOST_PADDING = 2**16
"""Bytes of 0xFF before a marker of a JPEG. The decoder gets the file in parts, and goes over all padding again for
each."""
MOST_WHOLE_BYTES = 2**28
"""Of a JPEG's pixels and of a WebP, which are read as a whole. The largest pictures have about as many."""
PIECE = 2**18
"""Bytes that are searched at once: Python's lock is free between two pieces only."""

_PNG_CHUNK = re.compile(rb"\w{4}")
"""Kinds that Pillow takes."""
_JPEG_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")
"""Among pixels: 0xFF is followed by 0, or by a number for each restart."""
_LONG_PADDING = b"\xff" * (MOST_PADDING + 1)
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_PNG_KEYWORDS = (b"XML:com.adobe.xmp", b"Raw profile type exif")
_COMMENT, _SCAN = 0xFE, 0xDA


def without_metadata(file: BinaryIO) -> BinaryIO:
    """A view of a PNG, JPEG, GIF or PPM file from its beginning; any other file itself, at its beginning.

    Time is linear in the size of the metadata, and memory bounded. A WebP is read as a whole later, so its view ends
    where the file ends now.

    Raises:
        TooManyBlocksError: the file is made to cost time or memory.
    """
    file.seek(0)
    head = file.read(len(PNG_SIGNATURE))
    if head == PNG_SIGNATURE:
        spans = _merged(_png_spans(file))
    elif head.startswith(JPEG_SIGNATURE):
        spans = _merged(_jpeg_spans(file))
    elif head.startswith(b"RIFF"):
        if (size := size_of(file)) > MOST_WHOLE_BYTES:
            raise TooManyBlocksError(f"a WebP of {size} bytes, expected at most {MOST_WHOLE_BYTES}")
        spans = [(0, size)]
    elif head.startswith(b"GIF"):
        spans = _merged(gif_spans(file))
    elif head.startswith(b"P"):
        spans = _merged(ppm_spans(file))
    else:
        file.seek(0)
        return file
    return io.BufferedReader(_Spans(file, spans))


class _Spans(io.RawIOBase):
    """Parts of a seekable file, one after the other."""

    def __init__(self, file: BinaryIO, spans: list[Span]) -> None:
        self._file, self._spans = file, spans
        self._ends = list(accumulate(end - start for start, end in spans))
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._ends[-1]}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        index = bisect_right(self._ends, self._position)
        if index == len(self._spans):
            return 0
        left = self._ends[index] - self._position
        self._file.seek(self._spans[index][1] - left)
        data = self._file.read(min(left, len(buffer)))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def _merged(spans: Iterator[Span]) -> list[Span]:
    merged: list[Span] = []
    for count, (start, end) in enumerate(spans):
        if count > MOST_BLOCKS:
            raise TooManyBlocksError(f"a file of more than {MOST_BLOCKS} blocks that hold pixels")
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], end)
        elif len(merged) == MOST_SPANS:
            raise TooManyBlocksError(f"pixels in more than {MOST_SPANS} places")
        else:
            merged.append((start, end))
    return merged


def _png_spans(file: BinaryIO) -> Iterator[Span]:
    """Signature, critical chunks, transparency, and what can turn the picture."""
    size = size_of(file)
    start, budget, kind = len(PNG_SIGNATURE), MOST_BYTES, b""
    yield 0, start
    for _ in range(MOST_SKIPPED):
        if start >= size or kind == b"IEND":
            return
        file.seek(start)
        header = file.read(8)
        length, kind = int.from_bytes(header[:4]), header[4:]
        end = start + length + 12
        if len(header) < 8 or not _PNG_CHUNK.match(kind) or end > size:  # damaged: Pillow decides whether too early
            yield start, size
            return
        is_critical = not kind[0] & 0x20
        if is_critical or kind == b"tRNS":
            yield start, end
        elif length <= budget and (cost := _cost_of_turning(file, kind, length)) is not None and cost <= budget:
            budget -= cost
            yield start, end
        start = end
    raise TooManyBlocksError(f"a PNG of more than {MOST_SKIPPED} chunks")


def _cost_of_turning(file: BinaryIO, kind: bytes, length: int) -> int | None:
    """Bytes in memory of a chunk that Pillow reads an orientation from; None for any other, and for a damaged one.

    Its `length` data begin at the file's position.
    """
    if kind != b"eXIf" and kind not in _PNG_TEXTS:
        return None
    data, checksum = file.read(length), file.read(4)
    if zlib.crc32(kind + data) != int.from_bytes(checksum):
        return None
    keyword, _, text = data.partition(b"\0")
    if kind != b"eXIf" and keyword not in _PNG_KEYWORDS:
        return None
    if kind == b"zTXt":
        return _expanded_size(text[1:]) if text[:1] == b"\0" else None
    if kind == b"iTXt" and text[:1] != b"\0":  # compressed; the method, language, translated keyword and text follow
        return _expanded_size(text[2:].split(b"\0", 2)[-1]) if text[:2] == b"\1\0" else None
    return length


def _expanded_size(data: bytes) -> int | None:
    """None if it is damaged, or larger than `MOST_BYTES`."""
    expander = zlib.decompressobj()
    try:
        size = len(expander.decompress(data, MOST_BYTES))
    except zlib.error:
        return None
    return None if expander.unconsumed_tail or not size else size


def _jpeg_spans(file: BinaryIO) -> Iterator[Span]:
    """All but application blocks and comments; of those the ones that name the colour space, and EXIF and XMP."""
    size = size_of(file)
    start, turning_budget, colour_budget = 2, MOST_BYTES, MOST_BYTES
    yield 0, start
    for _ in range(MOST_SKIPPED):
        file.seek(start)
        header = file.read(4)
        code = header[1] if len(header) == 4 else 0
        length = 2 + int.from_bytes(header[2:])
        if header[:2] == b"\xff\xff":
            start += _padding(file, start)
            continue
        if len(header) == 4 and (header[0] != 0xFF or not code):  # bytes between blocks
            start = _next_ff(file, start + 1, size)
            continue
        if 0xD0 <= code <= 0xD9:  # a marker alone
            yield start, start + 2
            start += 2
            continue
        if code < 0xC0 or code == _SCAN or length < 4 or start + length > size:
            _check_scans(file, start, size)
            yield start, size  # from where the pixels begin, or something that is no block
            return
        is_kept = True
        if 0xE0 <= code <= 0xEF or code == _COMMENT:
            data = file.read(min(length - 4, 32))
            is_colour, is_turn = _names_colours(code, data), _can_turn(code, data)
            is_kept = (is_colour and length <= colour_budget) or (is_turn and length <= turning_budget)
            colour_budget -= length if is_colour and is_kept else 0
            turning_budget -= length if is_turn and is_kept else 0
        if is_kept:
            yield start, start + length
        start += length
    raise TooManyBlocksError(f"a JPEG of more than {MOST_SKIPPED} blocks")


def _next_ff(file: BinaryIO, start: int, size: int) -> int:
    """Where the next byte of 0xFF is; the end of the file where there is none."""
    file.seek(start)
    while block := file.read(io.DEFAULT_BUFFER_SIZE):
        if (place := block.find(b"\xff")) >= 0:
            return start + place
        start += len(block)
    return size


def _check_scans(file: BinaryIO, start: int, size: int) -> None:
    """Refuses a picture in far too many scans, blocks or bytes, or with far too much padding, walking from the first
    scan's marker to the picture's end. What stands after that does not count."""
    file.seek(start)
    data = file.read(min(size - start, MOST_WHOLE_BYTES))
    place, blocks, scans = 0, 0, 0
    while place < len(data) and blocks <= MOST_SKIPPED:
        marker = _JPEG_MARKER.search(data, place, place + PIECE + 1)
        if data.find(_LONG_PADDING, place, marker.start() if marker else place + PIECE + MOST_PADDING) >= 0:
            raise TooManyBlocksError(f"a JPEG with more than {MOST_PADDING} bytes of padding before a marker")
        if marker is None:
            place += PIECE
            continue
        if marker[1] == b"\xd9":
            return
        place = marker.end()
        if marker[1] != b"\x01" and marker[1] != b"\xd8":
            place += max(2, int.from_bytes(data[place : place + 2]))
        blocks += 1
        scans += marker[1] == b"\xda"
        if scans > MOST_SCANS:
            raise TooManyBlocksError(f"a JPEG of more than {MOST_SCANS} scans")
    if blocks > MOST_SKIPPED:
        raise TooManyBlocksError(f"a JPEG of more than {MOST_SKIPPED} blocks")
    if start + len(data) < size:
        raise TooManyBlocksError(f"a JPEG of more than {MOST_WHOLE_BYTES} bytes of pixels")


def _padding(file: BinaryIO, start: int) -> int:
    """How many bytes of 0xFF stand at `start` before a marker's own; at most one block's."""
    file.seek(start)
    block = file.read(io.DEFAULT_BUFFER_SIZE)
    return len(block) - len(block.lstrip(b"\xff")) - 1


def _names_colours(code: int, data: bytes) -> bool:
    """Whether it is JFIF's or Adobe's block, as long as decoders want it."""
    return (code == 0xE0 and data.startswith(b"JFIF\0") and len(data) >= 14) or (
        code == 0xEE and data.startswith(b"Adobe") and len(data) >= 12
    )


def _can_turn(code: int, data: bytes) -> bool:
    return code == 0xE1 and data.startswith((b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"))
