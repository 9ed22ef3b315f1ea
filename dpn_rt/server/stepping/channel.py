"""Messages between two processes of one server."""

from __future__ import annotations

import os
import pickle
import socket
import threading
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any


class Channel:
    """One end of a socket. Any thread may send, one receives.

    Both ends are the same program, and nobody else has the socket: that is why messages may be pickled.
    """

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._connection = Connection(os.dup(end.fileno()))
        self._sending = threading.Lock()

    def send(self, message: object) -> None:
        """Waits while the other end reads more slowly than this one sends.

        Raises:
            OSError: the other end is gone.
        """
        data = pickle.dumps(message, protocol=5)  # Connection.send would share tensors' memory; copies are enough
        with self._sending:
            self._connection.send_bytes(data)

    def receive(self) -> Any:
        """The next message.

        Raises:
            EOFError: the other end is gone, or either was shut down.
        """
        try:
            return pickle.loads(self._connection.recv_bytes())
        except OSError as error:
            raise EOFError("the other end is gone") from error

    def shut_down(self) -> None:
        """Ends both directions; who waits to receive, here or there, gets EOFError."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Gives the socket back, when no thread uses it any more."""
        self._socket.close()
        self._connection.close()
