"""The outputs of requests."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from PIL import Image

from dpn_rt.drawing import draw_pyramid
from dpn_rt.errors import DpnError
from dpn_rt.sampling.logprobs import Logprob

FinishReason = Literal["stop", "length", "abort", "error"]
TokenLogprobs = Mapping[int, Logprob]
"""Token id -> log-probability, for one output position."""


@dataclass(frozen=True)
class PrefillFlops:
    """Floating-point operations of the decoder for one prompt."""

    prefill: int
    dense_prefill: int
    """Without reduction."""
    saved: float
    """Share of `dense_prefill` that was not computed."""


@dataclass(frozen=True)
class ReductionStep:
    """One boundary of a training-free reduction."""

    stage: int
    """The first one that sees fewer rows."""
    spec: str
    """Of the method that acts there, with all keys; a method with several boundaries is named at each."""


@dataclass(frozen=True)
class Pyramid:
    """How the visual tokens of a request were reduced: one entry per boundary or per stage."""

    experts: list[int | None]
    """Expert per boundary; None where the boundary skipped the request."""
    kernels: list[tuple[int, int] | None]
    """(kernel height, kernel width) per boundary; None where the boundary skipped the request."""
    probs: list[list[float] | None]
    """The router's probability of each expert, per boundary; None where no router ran."""
    visual_tokens: list[int]
    """Visual rows per stage."""
    kv_lengths: list[int]
    """Rows in the key-value cache per stage after the prefill: text and visual tokens. Each generated token but the
    last adds one row to every stage."""
    grids: list[tuple[int, int] | None]
    """(rows, columns) of the visual tokens per stage; None without an image."""
    kept: list[list[int] | list[list[int]] | None] = field(default_factory=list)
    """Per boundary of a training-free reduction the visual rows that it left, ascending, by their numbers before any
    was left out; with several images a list for each. None where rows were pooled, or there is no image."""
    steps: list[ReductionStep] = field(default_factory=list)
    """Per entry of `kept` what left these rows; empty for a trained reduction, or without an image."""
    reduction: str | None = None
    """SPEC of the training-free reduction, with all keys; None for a trained one, or for a model without any."""
    image_grid: tuple[int, int] | None = None
    """(rows, columns) of the image's patches, each of which is one visual row before any reduction; those of the
    overview of an image in tiles. None without an image."""
    image_segments: list[tuple[int, int]] = field(default_factory=list)
    """(rows, columns) of each part of the image, in the order of their visual rows: `image_grid`, and the grid of all
    tiles together where there are any."""
    patches_per_token: list[tuple[int, int]] = field(default_factory=list)
    """(rows, columns) of the patches that one visual token stands for, per stage."""
    flops: PrefillFlops | None = None
    """None for a request that was not prefilled."""

    def draw(self, image: Image.Image, side: int = 336, question: str = "", answer: str = "") -> Image.Image:
        """Draws what each stage saw, from left to right: cells of visual tokens over the image.

        Args:
            image: the first one, as the vision encoder saw it (`LLM.processor.seen_image`); any other is scaled.
            side: width and height of a stage's panel in pixels.
            question: stands above the panels; may be empty, as `answer`.
            answer: of the model.

        Returns:
            An RGB image, which notebooks show; empty if there were no visual tokens.
        """
        return draw_pyramid(image, self, side, question, answer)

    def _repr_png_(self) -> bytes | None:
        """What a notebook shows: the cells over plain gray; None without an image."""
        if self.image_grid is None:
            return None
        buffer = io.BytesIO()
        self.draw(Image.new("RGB", (1, 1), "gray")).save(buffer, "PNG")
        return buffer.getvalue()


@dataclass(frozen=True)
class RequestMetrics:
    """Times of a request in seconds. `arrival`, `first_token` and `finish` are readings of one monotonic clock."""

    arrival: float
    """When the request arrived."""
    queue: float | None
    """How long it waited before it was first scheduled."""
    first_token: float | None
    """When its first token was sampled."""
    finish: float | None
    """When its last completion ended."""

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from arrival to the first token."""
        return None if self.first_token is None else self.first_token - self.arrival

    @property
    def latency(self) -> float | None:
        """Seconds from arrival to finish."""
        return None if self.finish is None else self.finish - self.arrival


@dataclass(frozen=True)
class CompletionOutput:
    """One completion of a prompt."""

    index: int
    """0 to n - 1."""
    text: str
    token_ids: list[int]
    """Every generated id, including an end-of-sequence or stop token."""
    logprobs: list[TokenLogprobs] | None
    """One mapping per generated token; None unless `SamplingParams.logprobs` asks for them."""
    cumulative_logprob: float | None
    """Sum over the generated tokens; None without `logprobs`."""
    finish_reason: FinishReason | None
    """"stop" (end of sequence, stop token or stop string), "length", "abort" or "error"."""
    stop_reason: int | str | None
    """The stop token id or stop string that ended it; None for an end-of-sequence token and for all other reasons."""


@dataclass(frozen=True)
class RequestOutput:
    """A finished request: its completions, or the error that ended it."""

    request_id: str
    prompt_token_ids: list[int]
    """The processed ids, with one placeholder (-200) for the image."""
    outputs: list[CompletionOutput]
    metrics: RequestMetrics
    pyramid: Pyramid
    error: DpnError | None = None
    num_cached_tokens: int = 0
    """Rows of the prompt at stage 0 that were taken from the prefix cache."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as values that `json.dumps` takes, in all depths.

        An error is {"type": ..., "message": ...}; log-probabilities of a token are an object with the tokens' ids, as
        texts, and {"logprob": ..., "rank": ..., "decoded_token": ...}. `metrics` has `time_to_first_token` and
        `latency` too.
        """
        return {
            "request_id": self.request_id,
            "prompt_token_ids": list(self.prompt_token_ids),
            "outputs": [
                {each.name: _plain(getattr(output, each.name)) for each in fields(output)} for output in self.outputs
            ],
            "metrics": asdict(self.metrics)
            | {"time_to_first_token": self.metrics.time_to_first_token, "latency": self.metrics.latency},
            "pyramid": _plain(asdict(self.pyramid)),
            "error": None if self.error is None else {"type": type(self.error).__name__, "message": str(self.error)},
            "num_cached_tokens": self.num_cached_tokens,
        }


def _plain(value: Any) -> Any:
    """Lists for tuples, and texts for the keys of mappings."""
    if isinstance(value, Logprob):
        return {"logprob": value.logprob, "rank": value.rank, "decoded_token": value.decoded_token}
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


class StreamDelta(str):
    """New text of a stream. It is a string, so that deltas can be joined and printed as they are.

    Attributes:
        completion_index: which of the n completions it belongs to.
        token_ids: the new ids.
        finish_reason: why the completion ends with this delta; None while it goes on.
        output: the whole `RequestOutput` on the last delta of a request, None before.
        logprobs: log-probabilities of the new token; None unless `SamplingParams.logprobs` asks for them.
    """

    __slots__ = ("completion_index", "finish_reason", "logprobs", "output", "token_ids")

    completion_index: int
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    output: RequestOutput | None
    logprobs: TokenLogprobs | None

    def __new__(
        cls,
        text: str,
        completion_index: int = 0,
        token_ids: tuple[int, ...] = (),
        finish_reason: FinishReason | None = None,
        output: RequestOutput | None = None,
        logprobs: TokenLogprobs | None = None,
    ) -> StreamDelta:
        """See the attributes of the same names."""
        self = super().__new__(cls, text)
        self.completion_index = completion_index
        self.token_ids = token_ids
        self.finish_reason = finish_reason
        self.output = output
        self.logprobs = logprobs
        return self

    @property
    def text(self) -> str:
        """The new text as a plain string."""
        return str(self)
