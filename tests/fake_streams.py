"""A stream of a GPU that is not there."""

from __future__ import annotations


class FakeStream:
    """Notes who waits for whom, and when it is the current one."""

    def __init__(self, name: str, events: list[str]) -> None:
        self.name, self.events = name, events

    def wait_stream(self, other: FakeStream) -> None:
        self.events.append(f"{self.name} waits for {other.name}")

    def __enter__(self) -> None:
        self.events.append(f"on {self.name}")

    def __exit__(self, *_: object) -> None:
        self.events.append(f"off {self.name}")
