"""The bodies of requests: OpenAI's fields, as far as they apply, vLLM's additions, and our own."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeVar, cast

from pydantic import BeforeValidator, Field, ValidatorFunctionWrapHandler, WrapValidator, model_validator

from dpn_rt.sampling.params import SamplingParams
from dpn_rt.server.body_errors import FieldError
from dpn_rt.server.json_body import MAX_PROMPTS, MAX_TOKEN_IDS
from dpn_rt.server.neutral import (
    NeutralChatFields,
    NeutralCompletionFields,
    NeutralFields,
    NeutralMessageFields,
    NeutralPartFields,
    NeutralTemplateFields,
    Strict,
)

Value = TypeVar("Value")
DEFAULT_MAX_TOKENS = 16
"""Of `/v1/completions`, as OpenAI has it."""
StopString = Annotated[str, Field(max_length=4096)]
"""Text is held back while it may be the beginning of one."""
TokenId = Annotated[int, Field(ge=-(2**31), lt=2**31)]
IDS_AT_ONCE = 2**14
"""Ids that are checked at once. A million would keep Python's lock for some tens of milliseconds."""


def _check_in_pieces(ids: Any, check_whole: ValidatorFunctionWrapHandler) -> Any:
    """A list of right ids as it is; anything else goes to `check_whole`, which says what is wrong."""
    if isinstance(ids, list) and len(ids) > IDS_AT_ONCE:
        pieces = (ids[start : start + IDS_AT_ONCE] for start in range(0, len(ids), IDS_AT_ONCE))
        if len(ids) <= MAX_TOKEN_IDS and all(_are_ids(piece) for piece in pieces):
            return ids
    return check_whole(ids)


def _are_ids(items: list[Any]) -> bool:
    return set(map(type, items)) == {int} and min(items) >= -(2**31) and max(items) < 2**31


TokenIds = Annotated[list[TokenId], Field(max_length=MAX_TOKEN_IDS, fail_fast=True), WrapValidator(_check_in_pieces)]


class StreamOptions(Strict):
    """`stream_options`."""

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False
    """vLLM's: with `include_usage`, every chunk has the usage so far."""
    include_obfuscation: bool | None = False
    """Accepted, without effect."""


class NamesModel(Strict):
    """A body that says which model it is for."""

    model: str | None = None
    """Null: the one that is served."""


class _Common(NamesModel, NeutralFields):
    model: str
    temperature: float | None = 1.0
    top_p: float | None = 1.0
    n: Annotated[int, Field(ge=1, le=64)] | None = 1
    stop: StopString | Annotated[list[StopString], Field(max_length=16, fail_fast=True)] | None = None
    seed: int | None = None
    presence_penalty: float | None = 0.0
    frequency_penalty: float | None = 0.0
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    # vLLM's additions.
    top_k: int | None = 0
    min_p: float | None = 0.0
    repetition_penalty: float | None = 1.0
    min_tokens: int | None = 0
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_PROMPTS, fail_fast=True)] | None = None
    ignore_eos: bool | None = False
    skip_special_tokens: bool | None = True
    include_stop_str_in_output: bool | None = False
    priority: Annotated[int, Field(ge=-1000, le=1000)] | None = 0
    """Lower goes first."""
    # Our own additions.
    route: Annotated[list[int | None], Field(max_length=64, fail_fast=True)] | None = None
    """Forced expert per boundary; null leaves the choice to the router."""
    router_bias: float | None = 0.0
    """Added to the routers' logits per level of compression: above 0 faster, below 0 more accurate."""
    reduce: str | dict[str, Any] | None = None
    """SPEC of a training-free reduction; null: the engine's default."""
    kept: Annotated[list[Any], Field(max_length=64)] | None = None
    """Forced visual rows per boundary of the reduction."""

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and self.stream_options.model_fields_set and not self.stream:
            raise FieldError("stream_options", "expected stream=true as well")
        return self

    @property
    def reduction(self) -> dict[str, Any]:
        """What a prompt says of the reduction of its images."""
        return {"route": self.route, "router_bias": self.router_bias, "reduce": self.reduce, "kept": self.kept}

    @property
    def completions(self) -> int:
        """`n`; null is 1."""
        return self.n or 1

    def _sampling(self, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        return SamplingParams(
            n=self.completions,
            temperature=_or(self.temperature, 1.0),
            top_p=_or(self.top_p, 1.0),
            top_k=_or(self.top_k, 0),
            min_p=_or(self.min_p, 0.0),
            repetition_penalty=_or(self.repetition_penalty, 1.0),
            presence_penalty=_or(self.presence_penalty, 0.0),
            frequency_penalty=_or(self.frequency_penalty, 0.0),
            seed=self.seed,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
            max_tokens=max_tokens,
            min_tokens=_or(self.min_tokens, 0),
            ignore_eos=_or(self.ignore_eos, False),
            logprobs=logprobs,
            skip_special_tokens=_or(self.skip_special_tokens, True),
            include_stop_str_in_output=_or(self.include_stop_str_in_output, False),
        )

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk that has `usage`."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def wants_continuous_usage(self) -> bool:
        """Whether every chunk of a stream has `usage`."""
        return self.wants_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)


class TextPart(NeutralPartFields):
    """Text of a message."""

    type: Literal["text"]
    text: str


class RefusalPart(NeutralPartFields):
    """What an assistant said when it refused to answer."""

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        """It is text of the message as any other."""
        return self.refusal


class ImageUrl(Strict):
    """Where an image comes from."""

    url: str
    detail: str | None = None
    """Accepted, without effect: the vision tower has one resolution."""


class ImagePart(NeutralPartFields):
    """An image of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl | str
    """Or the URL itself, which some clients send."""

    @property
    def url(self) -> str:
        """Where the image comes from."""
        return self.image_url if isinstance(self.image_url, str) else self.image_url.url


Part = Annotated[TextPart | RefusalPart | ImagePart, Field(discriminator="type")]


class ChatMessage(NeutralMessageFields):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(max_length=MAX_PROMPTS, fail_fast=True)] | None = None
    """Null or none in an assistant's message stands for no text."""
    name: str | None = None

    @model_validator(mode="after")
    def _check_content(self) -> Self:
        if self.role == "assistant":
            return self
        if self.content is None:
            what = "null" if "content" in self.model_fields_set else "missing"
            raise FieldError("content", f"{what} in a message of role {self.role!r}, expected text or parts")
        if isinstance(self.content, list) and any(isinstance(part, RefusalPart) for part in self.content):
            raise FieldError("content", f"a refusal in a message of role {self.role!r}, expected it in an assistant's")
        return self

    @property
    def images(self) -> list[ImagePart]:
        return [part for part in self.content if isinstance(part, ImagePart)] if isinstance(self.content, list) else []


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]


class Conversation(NeutralTemplateFields):
    """Messages, and how the chat template makes a prompt of them."""

    messages: Messages
    # vLLM's additions.
    add_generation_prompt: bool | None = None
    """Null: yes, unless an answer is continued."""
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def num_prompts(self) -> int:
        """A conversation is one prompt."""
        return 1


class ChatRequest(Conversation, NeutralChatFields, _Common):
    """`POST /v1/chat/completions`."""

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _check_top_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise FieldError("top_logprobs", f"{self.top_logprobs}, expected logprobs=true as well")
        return self

    @property
    def token_limit(self) -> int | None:
        """Largest number of tokens of the answer; None: as many as the model's length allows."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def sampling(self) -> SamplingParams:
        """Raises RequestError: a value is out of range or contradicts another."""
        return self._sampling(self.token_limit, (self.top_logprobs or 0) if self.logprobs else None)


def _check_number(prompt: Any) -> Any:
    """Before the items are looked at, of which each could be wrong in several ways."""
    if isinstance(prompt, list) and prompt:
        is_ids = isinstance(prompt[0], int)
        most, what = (MAX_TOKEN_IDS, "token ids") if is_ids else (MAX_PROMPTS, "prompts")
        if len(prompt) > most:
            raise ValueError(f"{len(prompt)} items, expected at most {most} {what}")
    return prompt


Ids = Annotated[TokenIds, Field(min_length=1)]
Prompt = Annotated[
    str
    | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    | Ids
    | Annotated[list[Ids], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)],
    BeforeValidator(_check_number),
]


class CompletionRequest(NeutralCompletionFields, _Common):
    """`POST /v1/completions`: continues text as it stands, without images."""

    prompt: Prompt
    max_tokens: Annotated[int, Field(ge=1)] | None = DEFAULT_MAX_TOKENS
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts as a list, also when there is one."""
        is_one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return cast("list[str | list[int]]", [self.prompt] if is_one else self.prompt)

    @property
    def num_prompts(self) -> int:
        """How many prompts are continued."""
        return len(self.prompts)

    @property
    def token_limit(self) -> int:
        """Largest number of tokens of each answer; null counts as left out."""
        return _or(self.max_tokens, DEFAULT_MAX_TOKENS)

    @property
    def sampling(self) -> SamplingParams:
        """Raises RequestError: a value is out of range or contradicts another."""
        return self._sampling(self.token_limit, self.logprobs)


def _or(value: Value | None, default: Value) -> Value:
    return default if value is None else value
