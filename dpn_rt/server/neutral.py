"""Fields that are not supported: accepted at values that change nothing, else refused. OpenAI's and vLLM's."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict


class Strict(BaseModel):
    """A JSON object without fields that are not declared."""

    model_config = ConfigDict(extra="forbid", strict=True)


def neutral(*values: Any) -> AfterValidator:
    """The check of a field that is not supported: it accepts null and the values that change nothing."""

    def check(value: Any) -> Any:
        if value is not None and not any(_is_same(value, accepted) for accepted in values):
            expected = " or ".join(json.dumps(accepted) for accepted in (None, *values))
            raise ValueError(f"not supported, expected it left out or {expected}")
        return value

    return AfterValidator(check)


def _is_same(value: Any, accepted: Any) -> bool:
    return isinstance(value, bool) == isinstance(accepted, bool) and bool(value == accepted)


Unsupported = Annotated[Any, neutral()]
"""Only null is accepted."""
NoList = Annotated[Any, neutral([])]
NoObject = Annotated[Any, neutral({})]
NotAsked = Annotated[Any, neutral(False)]
NoTools = NoList
"""A list of tools or of their calls, which no model here supports."""
Hint = Any
"""Whatever it says, the answer would be the same: labels of the client's own, and wishes for caches."""


class NeutralFields(Strict):
    """Of both kinds of requests."""

    # OpenAI's.
    user: Hint = None
    metadata: Hint = None
    store: Hint = None
    service_tier: Hint = None
    safety_identifier: Hint = None
    prompt_cache_key: Hint = None
    prompt_cache_options: Hint = None
    prompt_cache_retention: Hint = None
    logit_bias: NoObject = None
    # vLLM's.
    session_id: Hint = None
    include_reasoning: Hint = None
    """No model here reasons apart from its answer."""
    extra_body: NoObject = None
    """Of a client that does not unpack it."""
    best_of: Annotated[Any, neutral(1)] = None
    use_beam_search: NotAsked = None
    early_stopping: NotAsked = None
    length_penalty: Annotated[Any, neutral(1.0)] = None
    spaces_between_special_tokens: Annotated[Any, neutral(True)] = None
    truncate_prompt_tokens: Unsupported = None
    truncation_side: Unsupported = None
    prompt_logprobs: Unsupported = None
    logprob_token_ids: Unsupported = None
    allowed_token_ids: Unsupported = None
    bad_words: NoList = None
    logits_processors: NoList = None
    watermarking: NotAsked = None
    repetition_detection: Unsupported = None
    thinking_token_budget: Annotated[Any, neutral(-1)] = None
    structured_outputs: NoObject = None
    guided_json: Unsupported = None
    guided_regex: Unsupported = None
    guided_choice: NoList = None
    guided_grammar: Unsupported = None
    guided_decoding_backend: Unsupported = None
    guided_whitespace_pattern: Unsupported = None
    structural_tag: Unsupported = None
    request_id: Unsupported = None
    return_tokens_as_token_ids: NotAsked = None
    return_token_ids: NotAsked = None
    return_token_offsets: NotAsked = None
    return_mm_kwargs: Annotated[Any, neutral(True)] = None
    routed_experts_prompt_start: Annotated[Any, neutral(0)] = None
    stream_interval: Annotated[Any, neutral(1)] = None
    cache_salt: Unsupported = None
    kv_transfer_params: NoObject = None
    ec_transfer_params: NoObject = None
    vllm_xargs: NoObject = None


class NeutralTemplateFields(Strict):
    """Of requests with messages."""

    tools: NoTools = None
    documents: NoList = None
    chat_template: Unsupported = None
    mm_processor_kwargs: NoObject = None
    media_io_kwargs: NoObject = None
    add_special_tokens: NotAsked = None
    """On top of those that the template writes."""


class NeutralChatFields(Strict):
    """Of chat requests only."""

    # OpenAI's.
    tool_choice: Annotated[Any, neutral("none", "auto")] = None
    parallel_tool_calls: bool | None = None
    functions: NoTools = None
    function_call: Annotated[Any, neutral("none", "auto")] = None
    response_format: Annotated[Any, neutral({"type": "text"})] = None
    modalities: Annotated[Any, neutral(["text"])] = None
    audio: Unsupported = None
    moderation: Unsupported = None
    prediction: Unsupported = None
    reasoning_effort: Annotated[Any, neutral("none", "minimal", "low", "medium", "high", "xhigh", "max")] = None
    """A wish for effort, and so is the next one: any value that OpenAI documents, without effect, as in vLLM."""
    verbosity: Annotated[Any, neutral("low", "medium", "high")] = None
    web_search_options: Unsupported = None
    # vLLM's.
    echo: NotAsked = None
    return_prompt_text: NotAsked = None


class NeutralCompletionFields(Strict):
    """Of completion requests only."""

    echo: NotAsked = None
    suffix: Annotated[Any, neutral("")] = None
    response_format: Annotated[Any, neutral({"type": "text"})] = None
    prompt_embeds: Unsupported = None
    add_special_tokens: Annotated[Any, neutral(True)] = None


class NeutralMessageFields(Strict):
    """Of a reply's message, so that a client can send it back."""

    refusal: Unsupported = None
    annotations: NoList = None
    audio: Unsupported = None
    tool_calls: NoTools = None
    function_call: Unsupported = None
    reasoning: Unsupported = None
    reasoning_content: Unsupported = None


class NeutralPartFields(Strict):
    """Of a part of a message."""

    prompt_cache_breakpoint: Hint = None
    uuid: Hint = None
    """vLLM's name of an image for its cache; here an image is recognised by its content."""
