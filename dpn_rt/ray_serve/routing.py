"""Which replica a request goes to: the one that knows its image, or the least loaded one."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

SPARE_PLACES = 8
"""Places of a replica that requests of clients leave free: for questions about its health and metrics."""


class ImageAffinityRouter(RequestRouter):
    """Sends requests about an image to one replica (rendezvous hashing), as long as it has a place free.

    All routers choose the same replica without telling each other anything, and a replica that comes or goes changes
    the choice for its own share of the images alone. A request whose replica is full, or which has no image, goes to
    the less loaded of two others, chosen at random. The key is the handle's `session_id`.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        """Takes the keyword argument `capacity`: requests that a replica has at a time."""
        self._capacity = int(kwargs["capacity"])
        self._sent: Counter[ReplicaID] = Counter()
        """Requests of this router that a replica has. Its own reports are late: one from before a burst says 0."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of replicas, of each of which the least loaded is tried; empty: all are full, ask again later."""
        free = [replica for replica in candidate_replicas if self._has_place(replica)]
        key = ""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # where all are full, ask again after a while
            key = pending_request.metadata.session_id
        two = random.sample(free, min(2, len(free)))
        if not key:
            return [two]
        known = preferred(key, {replica.replica_id.unique_id: replica for replica in candidate_replicas})
        return [[known], two] if known in free else [two]

    def on_send_request(self, replica_id: ReplicaID) -> None:
        """Called by Serve for each request that a replica gets."""
        super().on_send_request(replica_id)
        self._sent[replica_id] += 1

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Called by Serve when a request has ended, in whatever way; also for one that could not be sent."""
        super().on_request_completed(replica_id, internal_request_id)
        self._sent[replica_id] -= 1
        if self._sent[replica_id] <= 0:
            del self._sent[replica_id]

    def _has_place(self, replica: RunningReplica) -> bool:
        reported = self.replica_queue_len_cache.get(replica.replica_id) or 0  # has requests of other routers as well
        return max(reported, self._sent[replica.replica_id]) < self._capacity


def preferred(key: str, replicas: dict[str, Any]) -> Any:
    """The replica whose name has the highest hash together with the key.

    Args:
        key: of an image.
        replicas: by their names, at least one.
    """
    name = max(replicas, key=lambda name: hashlib.sha256(f"{key}/{name}".encode()).digest())
    return replicas[name]
