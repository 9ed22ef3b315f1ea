"""A prompt as the user gives it -> checked ids, pixels and row numbers."""

from __future__ import annotations

import numbers
import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dpn_rt.errors import EngineError, ImageError, PromptTooLongError, RequestError
from dpn_rt.format.config import IMAGE_PLACEHOLDER_ID, ModelConfig
from dpn_rt.model.reduction.chain import Chain
from dpn_rt.model.reduction.grid import Grid, IntArray, Segments
from dpn_rt.model.reduction.reduction import NoReduction
from dpn_rt.model.vision.preprocessing import Preprocessor
from dpn_rt.model.vision.visual_input import VisualInput
from dpn_rt.prompts.chat import chat_options, chat_prompt
from dpn_rt.prompts.image import MAX_PIXELS, load_image
from dpn_rt.prompts.messages import Message
from dpn_rt.prompts.placeholders import place_images
from dpn_rt.prompts.prompt import MAX_IMAGES, Prompt, PromptParts, check_num_images, take_apart
from dpn_rt.prompts.reduction import checked_reduction, reduced_images
from dpn_rt.prompts.template import ChatTemplate, VicunaTemplate, load_template
from dpn_rt.prompts.tokenizer import Tokenizer
from dpn_rt.prompts.visual_input import check_image_grid, check_views, from_embeds
from dpn_rt.schema.text import shown

Route = tuple[int | None, ...]
"""A forced expert per boundary; None leaves the choice to the router."""

MAX_ROUTER_BIAS = 1000
"""A greater bias would make a router's probabilities 0 and 1 for any model."""


@dataclass(frozen=True, eq=False)
class ProcessedPrompt:
    """A checked prompt."""

    token_ids: npt.NDArray[np.int64]
    """[num_prompt_ids], read-only, with one placeholder (-200) for each image."""
    text: str | None
    """The prompt string; None when ids were given."""
    images: tuple[VisualInput, ...]
    """In the order of their placeholders."""
    image_starts: tuple[int, ...]
    """First visual row of each image in stage 0."""
    router_rows: npt.NDArray[np.int32]
    """Rows that the routers read, numbered as in stage 0; empty when no router runs."""
    num_rows: int
    """Rows of stage 0: the ids, with visual tokens in place of the placeholders."""
    route: Route | None
    """Forced experts; None where the routers choose at all boundaries."""
    reduction: Chain | None = None
    """Training-free reduction; None for a model without any, or with a trained one."""
    kept: tuple[tuple[IntArray, ...], ...] | None = None
    """Rows that are to stay, per boundary after the first layer and image; None: the reduction decides."""
    is_dense: bool = False
    """Whether the boundaries of a trained model are to skip the images."""
    router_bias: float = 0.0
    """Added to the routers' logits per level of compression: above 0 is faster, below 0 more accurate."""

    @property
    def num_visual_tokens(self) -> int:
        """Of all images, at stage 0."""
        return sum(image.num_visual_tokens for image in self.images)

    @property
    def num_dense_rows(self) -> int:
        """Rows of stage 0 if nothing were left out before the decoder."""
        return self.num_text_rows + sum(image.given.num_visual_tokens for image in self.images)

    @property
    def num_text_rows(self) -> int:
        """Rows that no boundary removes."""
        return self.num_rows - self.num_visual_tokens  # newlines of images among them

    @property
    def segments(self) -> tuple[Segments, ...]:
        """Grids of the visual tokens of each image."""
        return tuple(image.segments for image in self.images)

    @property
    def grids(self) -> tuple[Grid, ...]:
        """(rows, columns) of the visual tokens of each image; (1, n) for one in tiles."""
        return tuple(image.grid for image in self.images)

    @property
    def row_token_ids(self) -> npt.NDArray[np.int64]:
        """`[num_rows]` token id of every row, the placeholder's on visual rows."""
        return np.repeat(self.token_ids, _rows_of_ids(self.token_ids, self.images))

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        """`token_ids` as plain integers."""
        return tuple(self.token_ids.tolist())


class Processor:
    """Turns prompts of one engine into `ProcessedPrompt`s. Safe to call from several threads."""

    def __init__(
        self,
        directory: Path | None,
        model: ModelConfig,
        *,
        max_model_len: int | None = None,
        max_pixels: int = MAX_PIXELS,
        max_images: int = MAX_IMAGES,
        keys_of_embeds: bool = False,
    ) -> None:
        """
        Args:
            directory: the engine's `processor/`; None for an engine that takes ids and embeddings only.
            model: the engine's model.
            max_model_len: rows of prompt and output together; None: the model's `max_position_embeddings`.
            max_pixels: of an image.
            max_images: of a prompt.
            keys_of_embeds: whether to compute the keys of embeddings, because the engine compares images. The engine
                would compute them in its own thread.

        Raises:
            EngineError: tokenizer or image processor cannot be loaded.
        """
        config = model.prompt
        if directory is None and (config.has_tokenizer or config.has_image_processor):
            raise EngineError("the engine has processor files: expected their directory, got None")
        self.model = model
        self.max_model_len = max_model_len or model.decoder.max_position_embeddings
        self.tokenizer = Tokenizer.load(directory) if directory and config.has_tokenizer else None
        self._template: ChatTemplate = VicunaTemplate()
        if directory and self.tokenizer is not None and config.template == "tokenizer":
            takes_images = model.vision is not None
            self._template = load_template(directory, self.tokenizer, config.image_token_id, takes_images)
        self.max_pixels, self.max_images, self._keys_of_embeds = max_pixels, max_images, keys_of_embeds
        self._preprocessor: Preprocessor | None = None
        if model.vision is not None:
            files = directory if config.has_image_processor else None
            pads = config.image_aspect_ratio == "pad"
            self._preprocessor = model.vision.preprocessor(files, pads=pads, max_pixels=max_pixels)

    def process(self, prompt: Prompt) -> ProcessedPrompt:
        """Checks a prompt and prepares it.

        Raises:
            RequestError: the prompt cannot be served. The message names the part, its value and what would be right.
            ImageError: the same for the image.
        """
        parts = take_apart(prompt)
        route = _checked_route(parts.route, self.model)
        ids = self._token_ids(parts)
        num_images = len(parts.images) + len(parts.image_embeds)
        check_num_images(num_images, self.max_images, f"multi_modal_data has {num_images} images")
        asked = checked_reduction(parts.reduce, self.model)
        chain = asked if isinstance(asked, Chain) else None
        images, kept = reduced_images(self._images(parts, chain), chain, parts.kept)
        image_token_id = self.model.prompt.image_token_id
        ids = place_images(ids, image_token_id, [image.num_rows for image in images])
        token_ids = np.array(ids, dtype=np.int64)
        token_ids.setflags(write=False)
        first_rows = np.cumsum([0, *_rows_of_ids(token_ids, images)])  # of each id in stage 0, and the number of rows
        num_rows = int(first_rows[-1])
        if num_rows >= self.max_model_len:
            of_images = " and ".join(str(image.num_rows) for image in images)
            raise PromptTooLongError(
                f"prompt has {num_rows} rows ({len(ids)} token ids"
                + (f", the image{'s' * (len(images) > 1)} as {of_images} rows" if images else "")
                + f"): expected at most {self.max_model_len - 1}, to leave room for one token"
            )
        return ProcessedPrompt(
            token_ids=token_ids,
            text=parts.text,
            images=images,
            image_starts=tuple(first_rows[np.flatnonzero(token_ids == IMAGE_PLACEHOLDER_ID)].tolist()),
            router_rows=self._router_rows(token_ids, first_rows) if images else np.empty(0, dtype=np.int32),
            num_rows=num_rows,
            route=route,
            reduction=chain,
            kept=kept,
            is_dense=isinstance(asked, NoReduction),
            router_bias=_checked_bias(parts.router_bias, self.model),
        )

    @property
    def takes_images(self) -> bool:
        """Whether pictures can be prepared, and not embeddings alone."""
        return self._preprocessor is not None

    def image(
        self, source: Image.Image | str | os.PathLike[str], name: str = "image 0", num_images: int = 1
    ) -> VisualInput:
        """An image prepared for the vision encoder. It may be given as `image` in any number of prompts.

        Args:
            source: as `load_image` takes it.
            name: of an image without a file name in messages.
            num_images: of its prompt: some models see an image among others in less detail.

        Raises:
            ImageError: it cannot be read, or the engine has no vision encoder.
        """
        if self._preprocessor is None:
            raise ImageError(f"{name}: this engine has no vision tower, expected image_embeds")
        return self._preprocessor(load_image(source, self.max_pixels, name), num_images)

    def seen_image(self, prompt: Prompt) -> Image.Image:
        """The first image of a prompt as the vision encoder sees it, padded or cropped and scaled, in RGB.

        Raises:
            RequestError: as `process`; ImageError: as `process`, or the prompt has no image.
        """
        images = self.process(prompt).images
        if not images or images[0].embeds is not None or self._preprocessor is None:
            raise ImageError("the prompt has no image, expected one")
        return self._preprocessor.picture(images[0])

    def check_text(self, num_characters: int) -> None:
        """Refuses a text that cannot fit, before time is spent to tokenise it.

        Raises:
            RequestError: it is longer than `max_model_len` of the longest tokens.
        """
        if self.tokenizer is None:
            return
        longest = self.tokenizer.longest_entry
        if num_characters > self.max_model_len * longest:
            raise PromptTooLongError(
                f"prompt of {num_characters} characters: expected at most {self.max_model_len * longest}, "
                f"{self.max_model_len} rows of at most {longest} characters"
            )

    def chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The prompt of a conversation in OpenAI's form, to be given to `process`.

        Args:
            messages: in OpenAI's form.
            add_generation_prompt: end where the assistant's answer begins; None: yes, unless an answer is continued.
            continue_final_message: the answer continues the last message, which is the assistant's.
            chat_template_kwargs: variables of the model's chat template.

        Raises:
            RequestError: a message has the wrong form, or the engine has no tokenizer; ImageError: as `chat_prompt`.
        """
        if self.tokenizer is None:
            raise RequestError("chat: this engine has no tokenizer, expected prompt_token_ids")
        config = self.model.prompt
        options = chat_options(add_generation_prompt, continue_final_message, chat_template_kwargs)
        return chat_prompt(
            messages,
            self.tokenizer,
            self._template,
            options,
            image_token_id=config.image_token_id,
            router_token_id=config.router_token_id if self.model.reduction.use_router_token else None,
            max_images=self.max_images,
            check_text=self.check_text,
        )

    def _token_ids(self, parts: PromptParts) -> list[int]:
        image_token_id = self.model.prompt.image_token_id
        if parts.token_ids is None:
            assert parts.text is not None
            if self.tokenizer is None:
                raise RequestError("prompt is a string, but this engine has no tokenizer: expected prompt_token_ids")
            self.check_text(len(parts.text))
            ids = self.tokenizer.encode(parts.text, image_token_id)
        else:
            ids = list(parts.token_ids)
        count = ids.count(IMAGE_PLACEHOLDER_ID)
        check_num_images(count, self.max_images, f"prompt has {count} image placeholders")
        vocab_size = self.model.decoder.vocab_size
        for position, token_id in enumerate(ids):
            if not 0 <= token_id < vocab_size and token_id != IMAGE_PLACEHOLDER_ID:
                raise RequestError(
                    f"prompt_token_ids[{position}]={token_id}: expected 0 to {vocab_size - 1}, "
                    f"or {IMAGE_PLACEHOLDER_ID} for the image"
                )
        return ids

    def _images(self, parts: PromptParts, chain: Chain | None) -> tuple[VisualInput, ...]:
        """The images as they are given, with all their rows."""
        if parts.image_embeds:
            needs_grid = any(step.needs_grid for step in chain.steps) if chain else bool(self.model.reduction.layers)
            embeds = zip(parts.image_embeds, parts.image_grids, strict=True)
            images = tuple(from_embeds(rows, grid, self.model, needs_grid) for rows, grid in embeds)
            return tuple(image.with_key() for image in images) if self._keys_of_embeds else images
        given = zip(parts.images, parts.image_grids, strict=True)
        count = len(parts.images)
        return tuple(self._prepared(image, grid, f"image {index}", count) for index, (image, grid) in enumerate(given))

    def _prepared(self, image: Any, grid: Any, name: str, num_images: int) -> VisualInput:
        visual = image if isinstance(image, VisualInput) else self.image(image, name, num_images)
        check_views(visual, self.model)
        check_image_grid(grid, visual.grid)
        return visual

    def _router_rows(self, ids: npt.NDArray[np.int64], first_rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """Of ids with images, whose rows in stage 0 begin at `first_rows` `[num_ids + 1]`."""
        reduction = self.model.reduction
        if not reduction.reads_router_rows:
            return np.empty(0, dtype=np.int32)
        if not reduction.use_router_token:
            return first_rows[-1:].astype(np.int32) - 1
        router_id = self.model.prompt.router_token_id
        positions = np.flatnonzero(ids == router_id)
        name = f"the router token (id {router_id}, <ROUTER>)"
        if len(positions) == 0:
            raise RequestError(f"the prompt has an image but not {name}: expected one at the end of every user turn")
        image = int(np.flatnonzero(ids == IMAGE_PLACEHOLDER_ID)[0])
        if positions[0] < image:
            raise RequestError(
                f"{name} is at position {positions[0]}, before the image at {image}: expected it after the image"
            )
        return first_rows[positions].astype(np.int32)


def _rows_of_ids(ids: npt.NDArray[np.int64], images: Sequence[VisualInput]) -> npt.NDArray[np.int64]:
    """`[num_ids]` rows that each id has in stage 0."""
    rows = np.ones(len(ids), dtype=np.int64)
    rows[ids == IMAGE_PLACEHOLDER_ID] = [image.num_rows for image in images]
    return rows


def _checked_route(route: Any, model: ModelConfig) -> Route | None:
    if route is None:
        return None
    counts = model.reduction.num_experts
    if isinstance(route, np.ndarray):
        route = route.tolist()  # of an array without dimensions it makes a number, which is refused
    if isinstance(route, str) or not isinstance(route, Sequence) or len(route) != len(counts):
        raise RequestError(
            f"route={shown(route)}: expected a list of {len(counts)} experts, one per boundary", field="route"
        )
    result: list[int | None] = []
    for position, (expert, count) in enumerate(zip(route, counts, strict=True)):
        index = _expert(expert)
        if expert is not None and (index is None or not 0 <= index < count):
            raise RequestError(
                f"route[{position}]={shown(expert)}: expected an expert from 0 to {count - 1}, or None", field="route"
            )
        result.append(index)
    return tuple(result)


def _checked_bias(bias: Any, model: ModelConfig) -> float:
    if bias is None:
        return 0.0
    is_number = isinstance(bias, numbers.Real) and not isinstance(bias, bool)
    if not (is_number and -MAX_ROUTER_BIAS <= bias <= MAX_ROUTER_BIAS):  # before it is a float, which may be too large
        raise RequestError(
            f"router_bias={shown(bias)}: expected a number from -{MAX_ROUTER_BIAS} to {MAX_ROUTER_BIAS}",
            field="router_bias",
        )
    if bias and not model.reduction.reads_router_rows:
        raise RequestError(
            f"router_bias={shown(bias)}: this model has no routers, expected 0 or none", field="router_bias"
        )
    return float(bias)


def _expert(value: Any) -> int | None:
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None
