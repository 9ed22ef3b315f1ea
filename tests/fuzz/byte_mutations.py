"""Changes of the bytes of a file."""

from __future__ import annotations

import random

INTERESTING = [0, 1, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]
MOST_BYTES = 1 << 20


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """One change: bits, bytes, numbers of 2 to 8 bytes, or parts that are left out, doubled, exchanged or filled."""
    changed = bytearray(data)
    if not changed:
        return bytes(rng.randrange(256) for _ in range(rng.randrange(1, 16)))
    kind = rng.choice(("bit", "byte", "byte", "number", "number", "cut", "end", "double", "swap", "fill"))
    start = _place(len(changed), rng)
    end = min(len(changed), start + rng.choice((1, 2, 4, 8, 16, 64, 1024)))
    if kind == "bit":
        changed[start] ^= 1 << rng.randrange(8)
    elif kind == "byte":
        changed[start] = rng.randrange(256)
    elif kind == "number":
        size = rng.choice((2, 4, 8))
        value = rng.choice((*INTERESTING, rng.getrandbits(32))) % (1 << (8 * size))
        changed[start : start + size] = value.to_bytes(size, rng.choice(("little", "big")))
    elif kind == "cut":
        del changed[start:end]
    elif kind == "end":
        del changed[start:]
    elif kind == "double":
        changed[start:start] = changed[start:end] * rng.choice((1, 1, 2, 50))
    elif kind == "swap":
        other = _place(len(changed), rng)
        changed[start:end] = changed[other : other + end - start]
    else:
        changed[start:end] = bytes([rng.choice((0, 0xFF, 0x20))]) * (end - start)
    return bytes(changed[:MOST_BYTES])


def _place(size: int, rng: random.Random) -> int:
    """Half of the time among the first bytes, where headers are."""
    return rng.randrange(size if rng.random() < 0.5 else min(size, 64))
