"""Messages over the socket between the server and the engine's process: each is its length and its pickle.

Pickles are safe here: both ends are the same program, and no other process has the socket.
"""

from __future__ import annotations

import asyncio
import pickle
import socket
import struct
from contextlib import suppress
from typing import Any

LENGTH = struct.Struct("!Q")


def encode(message: object) -> bytes:
    """The bytes of a message on the socket."""
    data = pickle.dumps(message, protocol=5)
    return LENGTH.pack(len(data)) + data


async def read_message(reader: asyncio.StreamReader) -> Any:
    """The next message, for an end that an event loop reads.

    Raises:
        EOFError: the other end is gone, or either end was shut down.
    """
    try:
        (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
        return pickle.loads(await reader.readexactly(length))
    except OSError as error:
        raise EOFError("the other end is gone") from error


class Channel:
    """One end of the socket, for threads: all calls block. One thread sends and one receives."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    def send(self, message: object) -> None:
        """Waits while the other end reads more slowly than this one sends.

        Raises:
            EOFError: the other end is gone, or either end was shut down.
        """
        try:
            self._socket.sendall(encode(message))
        except OSError as error:
            raise EOFError("the other end is gone") from error

    def receive(self) -> Any:
        """The next message.

        Raises:
            EOFError: the other end is gone, or either end was shut down.
        """
        (length,) = LENGTH.unpack(self._read(LENGTH.size))
        return pickle.loads(self._read(length))

    def shut_down(self) -> None:
        """Ends both directions: every call to receive, at either end, raises EOFError."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def duplicate(self) -> socket.socket:
        """Another handle on this end, for an event loop that takes it over. `shut_down` ends that too."""
        return self._socket.dup()

    def close(self) -> None:
        """Closes this handle, once no thread uses it any more."""
        self._socket.close()

    def _read(self, num_bytes: int) -> bytearray:
        data = bytearray(num_bytes)
        view, done = memoryview(data), 0
        while done < num_bytes:
            try:
                count = self._socket.recv_into(view[done:])
            except OSError as error:
                raise EOFError("the other end is gone") from error
            if not count:
                raise EOFError("the other end is gone")
            done += count
        return data
