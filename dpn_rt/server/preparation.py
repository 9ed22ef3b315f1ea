"""Requests -> processed prompts. Images are decoded and texts tokenised in worker threads."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from dpn_rt.errors import PromptTooLongError, RequestError
from dpn_rt.model.vision.visual_input import VisualInput
from dpn_rt.prompts.image import decode_image, load_image
from dpn_rt.prompts.processor import ProcessedPrompt, Processor
from dpn_rt.prompts.prompt import check_num_images
from dpn_rt.prompts.tokenizer import Tokenizer
from dpn_rt.server.media.loader import MediaLoader
from dpn_rt.server.processed_image_cache import ProcessedImageCache
from dpn_rt.server.protocol import ChatMessage, ChatRequest, CompletionRequest, Conversation

CHARACTERS_PER_TOKEN = 3
"""For estimates before a text is tokenised."""
DEFAULT_ANSWER_TOKENS = 256
"""Estimated tokens of an answer whose length the request leaves open."""
Result = TypeVar("Result")


class Preparation:
    """Makes the prompts of one engine."""

    def __init__(
        self, processor: Processor, media: MediaLoader, images: ProcessedImageCache, workers: Executor
    ) -> None:
        self._processor, self._media, self._images, self._workers = processor, media, images, workers

    @property
    def processor(self) -> Processor:
        return self._processor

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._processor.tokenizer

    @property
    def max_model_len(self) -> int:
        """Rows of prompt and answer together."""
        return self._processor.max_model_len

    async def run(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Calls a function in a worker thread and gives its result."""
        return await asyncio.get_running_loop().run_in_executor(self._workers, function, *arguments)

    async def chat(self, request: Conversation) -> ProcessedPrompt:
        """The prompt of a conversation, and what a chat request says of its route.

        Raises:
            RequestError, ImageError: text or image cannot be served; MediaError: an image cannot be loaded.
        """
        urls = [part.url for message in request.messages for part in message.images]
        with _about("messages"):
            files = [await self._media.load(url) for url in urls]
            return await self.run(self._process_chat, request, files)

    async def text(self, request: CompletionRequest) -> list[ProcessedPrompt]:
        """The prompts of a completion request, one after the other: a client may leave between two."""
        with _about("prompt"):
            return [await self.run(self._process_text, request, prompt) for prompt in request.prompts]

    def check(self, request: Conversation | CompletionRequest) -> None:
        """Checks what can be checked before anything is loaded or decoded.

        Raises:
            RequestError: sampling parameters are invalid, there are more images than the server takes, or the text is
                far too long for the model.
        """
        if isinstance(request, ChatRequest | CompletionRequest):
            _ = request.sampling  # raises if a value is invalid
        if isinstance(request, CompletionRequest):
            with _about("prompt"):
                for prompt in request.prompts:
                    self._check_prompt(prompt)
            return
        with _about("messages"):
            self._processor.check_text(sum(len(text) for message in request.messages for text in _texts(message)))
            count = sum(len(message.images) for message in request.messages)
            check_num_images(count, self._processor.max_images, f"messages: {count} images")

    def _check_prompt(self, prompt: str | list[int]) -> None:
        if isinstance(prompt, str):
            self._processor.check_text(len(prompt))
        elif len(prompt) > self.max_model_len:
            raise PromptTooLongError(f"prompt of {len(prompt)} tokens: expected fewer than {self.max_model_len}")

    def estimated_tokens(self, request: Conversation | CompletionRequest) -> int:
        """Tokens of prompts and answers, estimated from lengths alone."""
        if isinstance(request, CompletionRequest):
            lengths = [len(prompt) if isinstance(prompt, list) else _tokens(prompt) for prompt in request.prompts]
            return sum(lengths) + len(lengths) * request.completions * self._answer(request.token_limit)
        vision = self._processor.model.vision
        visual = 0 if vision is None else vision.max_visual_tokens
        text = sum(_tokens(text) for message in request.messages for text in _texts(message))
        images = sum(len(message.images) for message in request.messages)
        answers = request.completions * self._answer(request.token_limit) if isinstance(request, ChatRequest) else 0
        return text + images * visual + answers

    def _answer(self, max_tokens: int | None) -> int:
        return min(max_tokens or DEFAULT_ANSWER_TOKENS, self.max_model_len)

    def _process_chat(self, request: Conversation, files: list[bytes]) -> ProcessedPrompt:
        count = len(files)
        images = iter(
            [
                self._images.get(file, partial(self._image, index, count), among_others=count > 1)
                for index, file in enumerate(files)
            ]
        )
        messages = [_message(message, images) for message in request.messages]
        prompt = self._processor.chat(
            messages,
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
            chat_template_kwargs=request.chat_template_kwargs,
        )
        if isinstance(request, ChatRequest):
            prompt |= request.reduction
        return self._processor.process(prompt)

    def _image(self, index: int, num_images: int, file: bytes) -> VisualInput:
        name = f"image {index}"
        # In two steps, so that the pixels as the file has them are gone before the encoder's are made.
        image = load_image(decode_image(io.BytesIO(file), name), self._processor.max_pixels, name)
        return self._processor.image(image, name, num_images)

    def _process_text(self, request: CompletionRequest, prompt: str | list[int]) -> ProcessedPrompt:
        key = "prompt" if isinstance(prompt, str) else "prompt_token_ids"
        return self._processor.process({key: prompt, **request.reduction})


@contextmanager
def _about(field: str) -> Iterator[None]:
    """Errors that name no field are about this one."""
    try:
        yield
    except RequestError as error:
        error.field = error.field or field
        raise


def _message(message: ChatMessage, images: Iterator[VisualInput]) -> dict[str, Any]:
    """A message as `Processor.chat` takes it, with the next of `images` for each image part."""
    if not isinstance(message.content, list):
        return {"role": message.role, "content": message.content}
    content: list[dict[str, Any]] = []
    for part in message.content:
        if part.type == "image_url":
            content.append({"type": "image", "image": next(images)})
        else:
            content.append({"type": "text", "text": part.text})
    return {"role": message.role, "content": content}


def _texts(message: ChatMessage) -> list[str]:
    if not isinstance(message.content, list):
        return [message.content or ""]
    return [part.text for part in message.content if part.type != "image_url"]


def _tokens(text: str) -> int:
    return len(text) // CHARACTERS_PER_TOKEN + 1
