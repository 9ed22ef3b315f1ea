"""One completion of one request, from its arrival to its last token."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dpn_rt.engine.detokenizer import Detokenizer
from dpn_rt.engine.images import ImageResult
from dpn_rt.errors import DpnError
from dpn_rt.model.reduction.choice import Choice
from dpn_rt.model.reduction.grid import Grid, Segments, as_grid
from dpn_rt.outputs import CompletionOutput, FinishReason, Pyramid
from dpn_rt.prompts.processor import ProcessedPrompt
from dpn_rt.sampling.logprobs import Logprob
from dpn_rt.sampling.params import SamplingParams
from dpn_rt.sampling.sampler import SamplingState


@dataclass(eq=False)
class Sequence:
    """State of one completion. The scheduler sets `number` and `slot`, the prefill `image_rows` and `pyramid`."""

    request_id: str
    index: int
    prompt: ProcessedPrompt
    params: SamplingParams
    sampling: SamplingState
    detokenizer: Detokenizer | None
    max_tokens: int
    """Tokens that it may generate, within the model's length."""
    choices: list[Choice]
    """Per boundary. After the first prefill, what was done, so that it is done to a preempted sequence again."""
    priority: int = 0
    """Lower numbers go first."""
    number: int = 0
    """Order of arrival, given by the scheduler."""
    output_token_ids: list[int] = field(default_factory=list)
    logprobs: list[Mapping[int, Logprob]] = field(default_factory=list)
    slot: int | None = None
    """In the KV cache; None while it waits."""
    image_rows: Mapping[Hashable, ImageResult] = field(default_factory=dict)
    """Handle of an image -> its rows in the engine's dtype, kept while the sequence may be prefilled again."""
    num_cached_rows: int = 0
    """Rows of its first prefill that stage 0 found in the cache."""
    pyramid: Pyramid | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    num_preemptions: int = 0
    failure: DpnError | None = None
    """Why the sequence cannot go on; the engine ends its request."""

    @property
    def order(self) -> tuple[int, int]:
        """Lower ones are admitted first and preempted last."""
        return self.priority, self.number

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def ends_with_next(self) -> bool:
        """Whether the next token is the last one that it may generate."""
        return len(self.output_token_ids) + 1 >= self.max_tokens

    @property
    def num_rows(self) -> int:
        """Rows at stage 0 that a prefill computes: prompt, image and the tokens generated before a preemption."""
        return self.prompt.num_rows + len(self.output_token_ids)

    @property
    def image_starts(self) -> tuple[int, ...]:
        """First visual row of each image that boundaries may reduce."""
        return () if self.prompt.is_dense else self.prompt.image_starts

    @property
    def segments(self) -> tuple[Segments, ...]:
        """Grids of visual tokens of each image that boundaries may reduce."""
        return () if self.prompt.is_dense else self.prompt.segments

    @property
    def grids(self) -> tuple[Grid, ...]:
        """Rows and columns of visual tokens of each image that boundaries may reduce."""
        return tuple(map(as_grid, self.segments))

    @property
    def router_rows(self) -> npt.NDArray[np.int32]:
        return self.prompt.router_rows

    def row_token_ids(self) -> npt.NDArray[np.int64]:
        """`[num_rows]` token id of every row, negative on visual rows, as `Backend.embed` asks."""
        return np.concatenate((self.prompt.row_token_ids, np.asarray(self.output_token_ids, dtype=np.int64)))

    def append(self, token_id: int, logprobs: Mapping[int, Logprob] | None, eos_token_ids: tuple[int, ...]) -> str:
        """Adds a sampled token and decides whether the sequence ends.

        Args:
            token_id: the token.
            logprobs: of this position, None where none were asked for.
            eos_token_ids: of the model.

        Returns:
            The text that can no longer change by tokens to come.
        """
        self.output_token_ids.append(token_id)
        self.sampling.append(token_id)
        if logprobs is not None:
            self.logprobs.append(logprobs)
        self._check_end(token_id, eos_token_ids)
        return "" if self.detokenizer is None else self._new_text(self.detokenizer, token_id)

    def output(self) -> CompletionOutput:
        """What the sequence has generated so far."""
        asked = self.params.logprobs is not None
        chosen = [entries[token_id] for token_id, entries in zip(self.output_token_ids, self.logprobs, strict=False)]
        return CompletionOutput(
            index=self.index,
            text="" if self.detokenizer is None else self.detokenizer.text,
            token_ids=list(self.output_token_ids),
            logprobs=list(self.logprobs) if asked else None,
            cumulative_logprob=float(sum(chosen)) if asked else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )

    def _check_end(self, token_id: int, eos_token_ids: tuple[int, ...]) -> None:
        count = len(self.output_token_ids)
        if count >= self.params.min_tokens:
            if token_id in self.params.stop_ids:
                self.finish_reason, self.stop_reason = "stop", token_id
            elif token_id in eos_token_ids and not self.params.ignore_eos:
                self.finish_reason = "stop"
        if self.finish_reason is None and count >= self.max_tokens:
            self.finish_reason = "length"

    def _new_text(self, detokenizer: Detokenizer, token_id: int) -> str:
        text, stop = detokenizer.add(token_id, self.finish_reason)
        if stop is not None:
            self.finish_reason, self.stop_reason = "stop", stop
        return text
