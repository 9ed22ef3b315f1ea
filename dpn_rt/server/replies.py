"""The engine's progress and outputs in OpenAI's form."""

from __future__ import annotations

import codecs
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pydantic_core import to_json

from dpn_rt.engine.engine import Progress
from dpn_rt.format.config import ModelConfig
from dpn_rt.outputs import CompletionOutput, RequestOutput, TokenLogprobs
from dpn_rt.prompts.processor import ProcessedPrompt
from dpn_rt.prompts.tokenizer import Tokenizer
from dpn_rt.sampling.logprobs import Logprob

Json = dict[str, Any]
ITEMS_AT_ONCE = 2**14
"""Items of a list that are encoded at once."""


def usage(prompts: Sequence[ProcessedPrompt], outputs: Sequence[RequestOutput]) -> Json:
    """`usage`. The prompt tokens include the image's rows as they enter the decoder."""
    completion_tokens = sum(len(c.token_ids) for output in outputs for c in output.outputs)
    images = sum(prompt.num_visual_tokens for prompt in prompts)
    cached = sum(output.num_cached_tokens for output in outputs)
    stages = [output.pyramid.visual_tokens for output in outputs if output.pyramid.visual_tokens]
    return {
        **token_counts(prompts, completion_tokens),
        "prompt_tokens_details": {"image_tokens": images, "cached_tokens": cached},
        "visual_tokens_per_stage": [sum(counts) for counts in zip(*stages, strict=True)],
    }


def token_counts(prompts: Sequence[ProcessedPrompt], completion_tokens: int) -> Json:
    """The part of `usage` that is known while a request runs."""
    prompt_tokens = sum(prompt.num_rows for prompt in prompts)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def pyramid(model: ModelConfig, prompt: ProcessedPrompt, output: RequestOutput) -> Json | None:
    """`pyramid`: the route, the visual tokens per stage, and the decoder's prefill FLOPs. None without an image."""
    if not prompt.images or not output.pyramid.kv_lengths:
        return None
    return {
        **asdict(output.pyramid),
        "image_fit": _image_fit(model),
    }


def timings(output: RequestOutput) -> Json:
    """`timings` in seconds: in the queue, until the first token, in all."""
    metrics = output.metrics
    return {"queue": metrics.queue, "first_token": metrics.time_to_first_token, "total": metrics.latency}


class Replies:
    """Makes the reply to one request, chat or completion, whole or in chunks."""

    def __init__(
        self,
        request_id: str,
        model_name: str,
        *,
        is_chat: bool,
        top_logprobs: int = 0,
        tokenizer: Tokenizer | None = None,
        skip_special_tokens: bool = True,
    ) -> None:
        """
        Args:
            top_logprobs: how many of the most probable tokens a chat lists per token.
            tokenizer: for the text of single tokens; None: they have no text.
        """
        self._is_chat, self._top_logprobs = is_chat, top_logprobs
        self._tokenizer, self._skip_special_tokens = tokenizer, skip_special_tokens
        self._offsets: dict[int, _Offsets] = {}
        """By the index of the completion."""
        self._head = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{request_id}",
            "created": int(time.time()),
            "model": model_name,
        }

    def first_chunks(self, completions: int) -> list[Json]:
        """The chunks with which the stream of a chat begins."""
        if not self._is_chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [self._chunk([_choice(index, delta=delta)]) for index in range(completions)]

    def chunk(self, progress: Sequence[Progress], first_index: int = 0) -> Json:
        """A chunk of new tokens: one choice per completion that has some.

        Args:
            first_index: index of the prompt's first choice.
        """
        choices = []
        for index in sorted({item.index for item in progress}):
            items = [item for item in progress if item.index == index]
            text = "".join(item.text for item in items)
            logprobs = [(item.token_ids[0], item.logprobs) for item in items if item.logprobs is not None]
            content = {"delta": {"content": text} if text else {}} if self._is_chat else {"text": text}
            choices.append(
                _choice(
                    first_index + index,
                    **content,
                    logprobs=self._logprobs(first_index + index, logprobs) if logprobs else None,
                    finish_reason=items[-1].finish_reason,
                )
            )
        return self._chunk(choices)

    def aborted_chunk(self, indices: Sequence[int]) -> Json:
        """A chunk that ends aborted completions, which have no last token."""
        content: Json = {"delta": {}} if self._is_chat else {"text": ""}
        return self._chunk([_choice(index, **content, finish_reason="abort") for index in indices])

    def usage_chunk(self, used: Json) -> Json:
        """The chunk with `usage`, which has no choices."""
        return {**self._chunk([]), "usage": used}

    def whole(self, outputs: Sequence[RequestOutput], **fields: Any) -> Json:
        """The reply to a request that does not stream."""
        completions = [completion for output in outputs for completion in output.outputs]
        choices = [self._whole_choice(index, completion) for index, completion in enumerate(completions)]
        kind = "chat.completion" if self._is_chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, **fields}

    def _chunk(self, choices: list[Json]) -> Json:
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices}

    def _whole_choice(self, index: int, completion: CompletionOutput) -> Json:
        entries = list(zip(completion.token_ids, completion.logprobs or (), strict=False))
        logprobs = self._logprobs(index, entries) if completion.logprobs is not None else None
        message = {"role": "assistant", "content": completion.text, "refusal": None}
        content = {"message": message} if self._is_chat else {"text": completion.text}
        reason = completion.finish_reason
        return _choice(index, **content, logprobs=logprobs, finish_reason=reason, stop_reason=completion.stop_reason)

    def _logprobs(self, index: int, tokens: Sequence[tuple[int, TokenLogprobs]]) -> Json:
        if self._is_chat:
            return {"content": [self._chat_logprob(*token) for token in tokens], "refusal": None}
        return {
            "tokens": [self._text(token_id) for token_id, _ in tokens],
            "token_logprobs": [float(entries[token_id]) for token_id, entries in tokens],
            "top_logprobs": [
                {self._text(entry.token_id): float(entry) for entry in entries.values()} for _, entries in tokens
            ],
            "text_offset": [self._take_offset(index, token_id) for token_id, _ in tokens],
        }

    def _take_offset(self, index: int, token_id: int) -> int:
        """Where a token begins in the text of its completion. To be called once per token, in order."""
        if self._tokenizer is None:
            return 0
        if index not in self._offsets:
            self._offsets[index] = _Offsets(self._tokenizer, self._skip_special_tokens)
        return self._offsets[index].take(token_id)

    def _chat_logprob(self, token_id: int, entries: TokenLogprobs) -> Json:
        # `entries` has the sampled token even where it is not among the most probable ones.
        best = sorted(entries.values(), key=lambda entry: entry.rank)[: self._top_logprobs]
        return {**self._logprob(entries[token_id]), "top_logprobs": [self._logprob(entry) for entry in best]}

    def _logprob(self, entry: Logprob) -> Json:
        content = b"" if self._tokenizer is None else self._tokenizer.token_bytes(entry.token_id)
        return {"token": _named(content), "logprob": float(entry), "bytes": list(content)}

    def _text(self, token_id: int) -> str:
        return "" if self._tokenizer is None else _named(self._tokenizer.token_bytes(token_id))


class _Offsets:
    """Where the tokens of one completion begin in its text. A character may be that of several tokens."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer, self._skip_special_tokens = tokenizer, skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._length, self._has_begun = 0, False

    def take(self, token_id: int) -> int:
        """The offset of the next token."""
        if not self._tokenizer.has_text(token_id, self._skip_special_tokens):
            return self._length
        content = self._tokenizer.token_bytes(token_id)
        if not self._has_begun:
            content = content[self._tokenizer.num_stripped(token_id) :]
            self._has_begun = True
        new = self._decoder.decode(content)
        # Longer than the token's own text where bytes before it have turned out to be no character.
        offset = self._length + max(0, len(new) - len(content.decode("utf-8", "replace")))
        self._length += len(new)
        return offset


def _choice(index: int, **fields: Any) -> Json:
    return {"index": index, "logprobs": None, "finish_reason": None, **fields}


def _named(content: bytes) -> str:
    """Text of a token. Where that is not whole characters, OpenAI's notation of bytes keeps tokens distinct."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def sse(data: Json | str) -> bytes:
    """One server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


def encoded(reply: Json) -> bytes:
    """A reply as JSON. Its lists may have millions of items; other threads run between two pieces of them."""
    fields = (to_json(key) + b":" + _encoded_value(value) for key, value in reply.items())
    return b"{" + b",".join(fields) + b"}"


def _encoded_value(value: Any) -> bytes:
    if not isinstance(value, list):
        return to_json(value)
    starts = range(0, len(value), ITEMS_AT_ONCE)
    return b"[" + b",".join(to_json(value[start : start + ITEMS_AT_ONCE])[1:-1] for start in starts) + b"]"


def _image_fit(model: ModelConfig) -> str:
    """How a picture becomes the square whose visual tokens are drawn."""
    if model.vision is not None and model.vision.grid is None:  # tiles, whose overview is drawn
        return "stretch"
    return "pad" if model.prompt.image_aspect_ratio == "pad" else "crop"
