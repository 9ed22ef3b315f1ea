"""Hostile clients, each a function of an address that sends something once and says how the server took it."""

from __future__ import annotations

import io
import json
import random
import socket
import struct
import time
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from PIL import Image

from benchmarks.load.http_questions import data_url

TIMEOUT = 60.0
MEGABYTE = b"x" * 2**20


@dataclass(frozen=True)
class Target:
    """The server that is attacked."""

    host: str
    port: int
    model: str

    def connect(self) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout=TIMEOUT)

    def send(self, sent: bytes) -> str:
        """The status of the reply to some bytes; "closed" without one."""
        with self.connect() as connection:
            with suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(sent)
            answer = b""
            with suppress(ConnectionResetError):
                while len(answer) < 12 and (part := connection.recv(4096)):
                    answer += part
        return answer[9:12].decode() if answer.startswith(b"HTTP/1.1 ") else "closed"

    def post(self, path: str, content: bytes, kind: str = "application/json") -> str:
        fields = (
            f"Host: localhost\r\nContent-Type: {kind}\r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n"
        )
        return self.send(f"POST {path} HTTP/1.1\r\n{fields}".encode() + content)


Attack = Callable[[Target], str]
"""Gives the status of the reply, or "left" where the attack is to leave, or "closed"."""
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
GET = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n"


def listed(item: bytes, count: int) -> bytes:
    return b"[" + b",".join([item] * count) + b"]"


def body(content: bytes, path: str = COMPLETIONS) -> Attack:
    """An attack by a prompt in JSON."""
    return lambda target: target.post(path, b'{"model": "%b", "prompt": %b}' % (target.model.encode(), content))


def request(path: str, **fields: Any) -> Attack:
    """An attack by the fields of a request, which are encoded once: that would hold up the client that measures."""
    content = json.dumps(fields).encode()[1:]
    return lambda target: target.post(path, b'{"model": "%b", %b' % (target.model.encode(), content))


def unknown_keys(count: int) -> Attack:
    content = b"{" + b", ".join(b'"k%d": 1' % i for i in range(count)) + b"}"
    return lambda target: target.post(CHAT, content)


def head(sent: bytes) -> Attack:
    return lambda target: target.send(sent)


def chat(text: str, **fields: Any) -> Attack:
    return request(CHAT, messages=[{"role": "user", "content": text}], max_tokens=2, **fields)


def image(content: bytes) -> Attack:
    return image_url(data_url(content))


def image_url(url: str) -> Attack:
    part = {"type": "image_url", "image_url": {"url": url}}
    return request(CHAT, messages=[{"role": "user", "content": [part, {"type": "text", "text": "?"}]}], max_tokens=2)


def picture(size: tuple[int, int], form: str, frames: int = 1, **options: Any) -> bytes:
    file = io.BytesIO()
    images = [Image.new("L", size, number) for number in range(frames)]
    moving = {"save_all": True, "append_images": images[1:]} if frames > 1 else {}
    images[0].save(file, form, **moving, **options)
    return file.getvalue()


def deep_png(side: int) -> bytes:
    """A black square of four samples of 16 bits a pixel, which Pillow cannot write."""
    rows = zlib.compressobj(1)
    data = b"".join([rows.compress(bytes(1 + 8 * side)) for _ in range(side)] + [rows.flush()])
    parts = {b"IHDR": struct.pack(">IIBBBBB", side, side, 16, 6, 0, 0, 0), b"IDAT": data, b"IEND": b""}
    chunks = [
        struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in parts.items()
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def silent_sockets(target: Target) -> str:
    """500 connections that send nothing."""
    connections = []
    with suppress(OSError):
        for _ in range(500):
            connections.append(target.connect())
    time.sleep(1)
    for connection in connections:
        connection.close()
    return "left"


def slowly(first: bytes) -> Attack:
    """A byte every tenth of a second, for two seconds."""

    def attack(target: Target) -> str:
        with target.connect() as connection:
            connection.sendall(first)
            for _ in range(20):
                time.sleep(0.1)
                with suppress(OSError):
                    connection.send(b"x")
        return "left"

    return attack


def leave_many_prompts(target: Target) -> str:
    """As many answers as the queue takes, and away."""
    content = json.dumps(
        {"model": target.model, "prompt": ["a"] * 4, "n": 64, "temperature": 1, "max_tokens": 900}
    ).encode()
    with target.connect() as connection:
        fields = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        connection.sendall(f"POST {COMPLETIONS} HTTP/1.1\r\n{fields}".encode() + content)
        time.sleep(0.3)
    return "left"


def garbage(target: Target) -> str:
    """Random bytes."""
    return target.send(random.randbytes(20_000) + b"\r\n\r\n")


def among(content: bytes, inserted: bytes, place: int) -> bytes:
    """A file with something in it."""
    return content[:place] + inserted + content[place:]


ATTACKS: Mapping[str, Callable[[], Attack]] = {
    "1 million empty prompts": lambda: body(listed(b'""', 10**6)),
    "10 million empty prompts": lambda: body(listed(b'""', 10**7)),
    "8 million ids": lambda: body(listed(b"1", 8 * 10**6)),
    "a million lists": lambda: body(listed(b"[1]", 10**6)),
    "60,000 lists": lambda: body(listed(b"[1]", 60_000)),
    "lists in lists": lambda: body(b"[" * 10**5),
    "15 million lists in lists": lambda: body(b"[" * (15 << 20) + b"]" * (15 << 20)),
    "500,000 unknown keys": lambda: unknown_keys(500_000),
    "60,000 unknown keys": lambda: unknown_keys(60_000),
    "120,000 empty prompts": lambda: body(listed(b'""', 120_000)),
    "30 MB of text": lambda: body(b'"' + b"a" * (30 << 20) + b'"'),
    "10 MB of text outside ASCII": lambda: body('"{}"'.format("é" * (5 << 20)).encode()),
    "10 million escapes": lambda: body(b'"' + rb"\u4e00" * (5 << 20) + b'"'),
    "30 MB of spaces": lambda: body(b" " * (30 << 20) + b'""'),
    "6,000 numbers of 4,000 digits": lambda: body(listed(b"1" * 4000, 6000)),
    "a million layers to reduce at": lambda: chat(
        "?", reduce={"method": "pyramiddrop", "layers": list(range(1, 2**20))}
    ),
    "a header of 96 MB": lambda: head(GET + b"X: " + MEGABYTE * 96),
    "20,000 headers": lambda: head(GET + b"X: 1\r\n" * 20_000 + b"\r\n"),
    "a request line of 32 MB": lambda: head(b"GET /" + MEGABYTE * 32),
    "silent connections": lambda: silent_sockets,
    "headers byte by byte": lambda: slowly(GET),
    "a body byte by byte": lambda: slowly(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
    ),
    "random bytes": lambda: garbage,
    "no Host": lambda: head(b"GET /v1/models HTTP/1.1\r\n\r\n"),
    "another host": lambda: head(b"GET /v1/models HTTP/1.1\r\nHost: evil.example\r\n\r\n"),
    "HTTP/0.9": lambda: head(b"GET /v1/models\r\n\r\n"),
    "text from a web page": lambda: lambda target: target.post(CHAT, b"{}", "text/plain"),
    "4,096 prompts, 64 answers each": lambda: request(
        COMPLETIONS, prompt=["a"] * 4096, n=64, max_tokens=1000, priority=-1000
    ),
    "a full queue that is left": lambda: leave_many_prompts,
    "priority": lambda: chat("?", priority=-1000),
    "a stop string of 8 MB": lambda: chat("?", stop="a" * (8 << 20)),
    "16 stop strings of 500 kB": lambda: chat("?", stop=["ab" * 250_000] * 16),
    "one character, 100 kB": lambda: chat("a" * 100_000),
    "one character, 1 MB": lambda: chat("a" * 10**6),
    "spaces, 1 MB": lambda: chat(" " * 10**6),
    "one emoji, 1 MB": lambda: chat("\U0001f600" * (10**6 // 4)),
    "combining marks, 1 MB": lambda: chat("a" + "\u0301" * (10**6 // 2)),
    "combining marks, 20 kB": lambda: chat("a" + "\u0301" * 20_000),
    "5,000 stop strings": lambda: chat("?", stop=[f"stop {number}" for number in range(5000)]),
    "a character that becomes 18 (NFKC)": lambda: chat("\ufdfa" * 5_000),
    "template arguments": lambda: chat("?", chat_template_kwargs={"messages": [], "bos_token": "x" * 10**6}),
    "a decompression bomb": lambda: image(picture((20_000, 20_000), "PNG")),
    "an image of 1 x 60,000": lambda: image(picture((1, 60_000), "PNG")),
    "an image of 400,000 x 10": lambda: image(picture((400_000, 10), "PNG")),
    "an animation of 500 frames": lambda: image(picture((64, 64), "GIF", 500)),
    "TIFF of 500 directories": lambda: image(picture((64, 64), "TIFF", 500)),
    "PNG of 16 million pixels of 64 bits": lambda: image(deep_png(4096)),
    "PNG with a transparent colour": lambda: image(picture((6300, 6300), "PNG", transparency=0)),
    "WebP of 16 million pixels": lambda: image(picture((4096, 4096), "WEBP", method=0)),
    "WebP of 54 million pixels, moving": lambda: image(picture((9000, 6000), "WEBP", 2, method=0)),
    "JPEG of 15 MB of padding": lambda: image(among(picture((8, 8), "JPEG"), b"\xff" * (15 << 20), -2)),
    "JPEG of 7 million blocks after a scan": lambda: image(among(picture((8, 8), "JPEG"), b"\xff\1" * (15 << 19), -2)),
    "PPM of 15 MB in colours of 1,000": lambda: image(b"P6 1600 1600 999\n" + bytes(6 * 1600**2)),
    "a URL of 20 million parameters": lambda: image_url("data:image/png" + ";a" * (10 << 20) + ",QUJD"),
    "a URL of 20 million escapes": lambda: image_url("data:image/png;base64," + "%41" * (9 << 20)),
    "a URL with 20 million =": lambda: image_url("data:image/png;base64," + "=" * (20 << 20)),
    "an https URL of 8 MB": lambda: image_url("https:" + "//" * (4 << 20)),
    "PPM of 15 MB as text": lambda: image(b"P3 64 64 255\n" + b"#\n" * (15 << 19)),
    "PPM of 15 MB of spaces": lambda: image(b"P6" + b" " * (15 << 20)),
    "GIF of 3 million comments": lambda: image(among(picture((8, 8), "GIF"), b"!\xfe\1a\0" * (3 << 20), 25)),
    "JPEG of 4 million comments": lambda: image(among(picture((8, 8), "JPEG"), b"\xff\xfe\0\2" * (4 << 20), 2)),
    "JPEG of 200,000 tables": lambda: image(
        among(picture((8, 8), "JPEG"), (b"\xff\xdb\0\x43\0" + b"\1" * 64) * 200_000, 2)
    ),
    "PNG of a million chunks": lambda: image(
        among(picture((8, 8), "PNG"), b"\0\0\0\0IDAT\x35\xaf\x06\x1e" * (1 << 20), 33)
    ),
    "a million ids to text": lambda: request("/detokenize", tokens=[9] * 2**20),
    "a million images to text": lambda: request("/detokenize", tokens=[-200] * 2**20),
    "a million ids and a wrong one": lambda: request("/detokenize", tokens=[9] * (2**20 - 1) + [1.5]),
    "JPEG 2000": lambda: image(b"\0\0\0\x0cjP  \r\n\x87\n" + b"\0" * 100),
    "an icon": lambda: image(picture((32, 32), "ICO")),
    "PostScript": lambda: image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
}
"""Each makes an attack, whose body may have 30 MB."""
