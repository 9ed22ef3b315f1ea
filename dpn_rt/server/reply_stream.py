"""The chunks of one streamed reply, in the order in which the client gets them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dpn_rt.engine.engine import Progress
from dpn_rt.outputs import RequestOutput
from dpn_rt.server.engine_client.stream import Event
from dpn_rt.server.replies import Json, Replies


class ReplyStream:
    """Turns the events of a request's prompts into chunks.

    The last chunk of a prompt carries its pyramid and timings, so it is held until the prompt's output is there.
    """

    def __init__(
        self,
        replies: Replies,
        prompts: int,
        completions: int,
        *,
        extra: Callable[[int, RequestOutput], Json],
        usage: Callable[[int], Json | None] | None = None,
    ) -> None:
        """
        Args:
            completions: of each prompt.
            extra: fields of a prompt's last chunk, from its position and output.
            usage: gives every chunk its `usage`, from the number of tokens of the whole request so far; None: chunks
                have none.
        """
        self._replies, self._completions, self._extra, self._usage = replies, completions, extra, usage
        self._num_tokens = 0
        self._unfinished = [completions] * prompts
        self._held: dict[int, Json] = {}
        self._outputs: dict[int, RequestOutput] = {}
        self.has_begun = False
        """Whether a chunk was sent. After that an error can no longer have a status of its own."""

    @property
    def outputs(self) -> list[RequestOutput]:
        """The outputs of the prompts that have ended."""
        return list(self._outputs.values())

    def take(self, position: int, event: Event) -> list[Json]:
        """The chunks to send after an event of the prompt at `position`.

        Raises:
            DpnError: the event says that the prompt has failed.
        """
        if isinstance(event, RequestOutput) and event.error is not None:
            raise event.error
        first = [] if self.has_begun else self._with_usage(self._replies.first_chunks(self._completions))
        self.has_begun = True
        if isinstance(event, RequestOutput):
            return [*first, *self._with_usage([self._last_chunk(position, event)])]
        self._num_tokens += sum(len(item.token_ids) for item in event)
        return [*first, *self._with_usage(self._chunks(position, event))]

    def _with_usage(self, chunks: list[Json]) -> list[Json]:
        if self._usage is None:
            return chunks
        return [{**chunk, "usage": self._usage(self._num_tokens)} for chunk in chunks]

    def _chunks(self, position: int, progress: Sequence[Progress]) -> list[Json]:
        chunk = self._replies.chunk(progress, position * self._completions)
        self._unfinished[position] -= sum(item.finish_reason is not None for item in progress)
        if self._unfinished[position]:
            return [chunk]
        self._held[position] = chunk
        return []

    def _last_chunk(self, position: int, output: RequestOutput) -> Json:
        self._outputs[position] = output
        held = self._held.pop(position, None)
        if held is None:  # no last token came: the prompt was aborted
            first_index = position * self._completions
            aborted = [first_index + c.index for c in output.outputs if c.finish_reason == "abort"]
            held = self._replies.aborted_chunk(aborted)
        return {**held, **self._extra(position, output)}
