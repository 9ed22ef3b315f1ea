"""`POST /tokenize` and `POST /detokenize`, as vLLM has them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

from pydantic import model_validator

from dpn_rt.errors import RequestError
from dpn_rt.format.config import IMAGE_PLACEHOLDER_ID
from dpn_rt.prompts.markers import IMAGE_TEXT
from dpn_rt.prompts.tokenizer import Tokenizer
from dpn_rt.server.body_errors import FieldError
from dpn_rt.server.neutral import NoObject, NoTools, Unsupported
from dpn_rt.server.preparation import Preparation
from dpn_rt.server.protocol import Conversation, Messages, NamesModel, TokenIds


class TokenizeRequest(NamesModel):
    """`POST /tokenize`: of text as it stands, or of a conversation, as a chat request makes a prompt of it."""

    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    """Those at the begin and the end of a text; null: yes. The template of a conversation writes its own."""
    return_token_strs: bool | None = False
    # With messages.
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    chat_template: Unsupported = None
    mm_processor_kwargs: NoObject = None
    tools: NoTools = None

    @model_validator(mode="after")
    def _check_forms(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("expected one of prompt and messages")
        if self.messages is not None and self.add_special_tokens:
            raise FieldError("add_special_tokens", "true with messages, whose template writes them: expected false")
        return self

    @property
    def conversation(self) -> Conversation | None:
        """The messages and the options of their template; None for text."""
        if self.messages is None:
            return None
        return Conversation(
            messages=self.messages,
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=self.continue_final_message,
            chat_template_kwargs=self.chat_template_kwargs,
        )


class DetokenizeRequest(NamesModel):
    """`POST /detokenize`."""

    tokens: TokenIds


@dataclass(frozen=True)
class Tokenization:
    """Answers these requests. Each image is one id, -200, and one `<image>` in a text."""

    preparation: Preparation

    async def tokens(self, request: TokenizeRequest) -> dict[str, Any]:
        """The reply to `POST /tokenize`.

        Raises:
            RequestError: the engine has no tokenizer, or the text is far too long; ImageError: as a chat request.
        """
        conversation = request.conversation
        if conversation is None:
            adds = request.add_special_tokens is not False
            ids = await self.preparation.run(self._encode, request.prompt, adds)
        else:
            ids = list((await self.preparation.chat(conversation)).prompt_token_ids)
        entries = await self.preparation.run(self._entries, ids) if request.return_token_strs else None
        return {
            "count": len(ids),
            "max_model_len": self.preparation.max_model_len,
            "tokens": ids,
            "token_strs": entries,
        }

    async def text(self, request: DetokenizeRequest) -> dict[str, Any]:
        """The reply to `POST /detokenize`; special tokens are in the text.

        Raises:
            RequestError: the engine has no tokenizer, or an id is not in its vocabulary.
        """
        return {"prompt": await self.preparation.run(self._decode, request.tokens)}

    @property
    def _tokenizer(self) -> Tokenizer:
        if self.preparation.tokenizer is None:
            raise RequestError("this engine has no tokenizer: ids and texts cannot be turned into each other")
        return self.preparation.tokenizer

    def _encode(self, text: str, with_special_tokens: bool) -> list[int]:
        tokenizer, processor = self._tokenizer, self.preparation.processor
        processor.check_text(len(text))
        ids = tokenizer.encode(text, processor.model.prompt.image_token_id)
        return ids if with_special_tokens else _without_added(ids, text, tokenizer)

    def _decode(self, token_ids: list[int]) -> str:
        tokenizer = self._tokenizer
        vocab_size = self.preparation.processor.model.decoder.vocab_size
        for position, token_id in enumerate(token_ids):
            if not 0 <= token_id < vocab_size and token_id != IMAGE_PLACEHOLDER_ID:
                raise RequestError(
                    f"tokens.{position}: {token_id}, expected 0 to {vocab_size - 1}, "
                    f"or {IMAGE_PLACEHOLDER_ID} for an image"
                )
        pieces = _between_images(token_ids)
        return IMAGE_TEXT.join(tokenizer.decode(piece, skip_special_tokens=False) if piece else "" for piece in pieces)

    def _entries(self, token_ids: Sequence[int]) -> list[str]:
        tokenizer = self._tokenizer
        return [IMAGE_TEXT if i == IMAGE_PLACEHOLDER_ID else tokenizer.token(i) or "" for i in token_ids]


def _between_images(token_ids: list[int]) -> Iterator[list[int]]:
    start = 0
    for _ in range(token_ids.count(IMAGE_PLACEHOLDER_ID)):
        end = token_ids.index(IMAGE_PLACEHOLDER_ID, start)
        yield token_ids[start:end]
        start = end + 1
    yield token_ids[start:]


def _without_added(ids: list[int], text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids without the special tokens that the tokenizer adds to every text. Those written in the text stay."""
    added = tokenizer.encode("")
    bos = tokenizer.bos_token_id
    num_before = int(bool(added) and added[0] == bos)
    before = "" if bos is None else tokenizer.token(bos) or ""
    if num_before and before and text.startswith(before):  # `encode` has merged the two into one
        return ids[: len(ids) - len(added) + num_before]
    return ids[num_before : len(ids) - len(added) + num_before]
