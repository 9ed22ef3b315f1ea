"""Draws the pyramid of a request over its image: the patches that each visual token of each stage stands for."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Protocol

from PIL import Image, ImageDraw, ImageFont

from dpn_rt.errors import ImageError
from dpn_rt.model.reduction.grid import Grid

LINE = (255, 255, 255)
DROPPED = 0.65
"""Share of black over what was dropped: visual tokens, or the patches that pooling leaves over at the edges."""
FONT_SIZE, MIN_FONT_SIZE = 18, 8
LINE_HEIGHT = 24
CAPTION_HEIGHT = 30
MARGIN = 6
"""Around question and answer."""
MAX_LINES = 3
"""Of a question or an answer; longer ones end in dots."""
GAP = 8


class Saved(Protocol):
    """What `Drawable` needs of FLOPs."""

    @property
    def saved(self) -> float: ...


class Step(Protocol):
    """What `Drawable` needs of a boundary of a training-free reduction."""

    @property
    def stage(self) -> int: ...

    @property
    def spec(self) -> str: ...


class Drawable(Protocol):
    """What is drawn: see `dpn_rt.outputs.Pyramid`, which knows how to draw itself."""

    @property
    def kernels(self) -> Sequence[Grid | None]: ...

    @property
    def visual_tokens(self) -> Sequence[int]: ...

    @property
    def grids(self) -> Sequence[Grid | None]: ...

    @property
    def kept(self) -> Sequence[list[int] | list[list[int]] | None]: ...

    @property
    def steps(self) -> Sequence[Step]: ...

    @property
    def reduction(self) -> str | None: ...

    @property
    def image_grid(self) -> Grid | None: ...

    @property
    def patches_per_token(self) -> Sequence[Grid]: ...

    @property
    def flops(self) -> Saved | None: ...


def draw_pyramid(
    image: Image.Image, pyramid: Drawable, side: int = 336, question: str = "", answer: str = ""
) -> Image.Image:
    """Draws one panel per stage, from left to right, below the question, the reduction and the answer.

    Args:
        image: square, as the vision encoder saw it; the first of several.
        pyramid: of the request's output.
        side: width and height of a panel in pixels.
        question: may be empty, as `answer` may; then there is no room for it.
        answer: of the model.

    Returns:
        An RGB image, empty if there were no visual tokens.

    Raises:
        ImageError: `image` is none, such as a path, or `side` is below 1.
    """
    if not isinstance(image, Image.Image):
        raise ImageError(f"image: expected a PIL image, which Image.open makes of a path, got {type(image).__name__}")
    if side < 1:
        raise ImageError(f"side={side}: expected at least 1 pixel")
    width = max(1, len(pyramid.grids) * (side + GAP) - GAP)
    font = _font(FONT_SIZE)
    captions = [_caption(pyramid, stage) for stage in range(len(pyramid.grids))]
    small_font = _fitting_font(captions, side)
    texts = (question, _heading(pyramid), answer)
    lines = [line for text in texts for line in _wrapped(text, font, width - 2 * MARGIN)]
    top = len(lines) * LINE_HEIGHT + (2 * MARGIN if lines else 0)
    sheet = Image.new("RGB", (width, top + side + CAPTION_HEIGHT), "white")
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(lines):
        draw.text((MARGIN, MARGIN + number * LINE_HEIGHT), line, fill="black", font=font)
    for stage, caption in enumerate(captions):
        if pyramid.image_grid is None:
            break
        left = stage * (side + GAP)
        kept = kept_tokens(pyramid, stage)
        panel = _panel(image.resize((side, side)), pyramid.image_grid, pyramid.patches_per_token[stage], kept)
        sheet.paste(panel, (left, top + CAPTION_HEIGHT))
        draw.text((left, top + 3), caption, fill="black", font=small_font)
    return sheet


def draw_pyramids(
    image: Image.Image, answers: Sequence[tuple[Drawable, str]], side: int = 336, question: str = ""
) -> Image.Image:
    """Draws the answers to one question, one below the other, so that the panels of a stage stand in a column.

    Args:
        image: as in `draw_pyramid`.
        answers: at least one pyramid and text.
        side: as in `draw_pyramid`.
        question: of all answers; may be empty.
    """
    rows = [
        draw_pyramid(image, pyramid, side, "" if number else question, answer)
        for number, (pyramid, answer) in enumerate(answers)
    ]
    height = sum(row.height for row in rows) + (len(rows) - 1) * GAP
    sheet = Image.new("RGB", (max(row.width for row in rows), height), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height + GAP
    return sheet


def kept_tokens(pyramid: Drawable, stage: int) -> list[int] | None:
    """Visual tokens of the first image that a stage sees, ascending, by their numbers on its grid of
    `patches_per_token`; None: all of that grid."""
    pairs = zip(pyramid.steps, pyramid.kept, strict=False)  # a trained reduction has no steps
    kept = next((kept for step, kept in reversed(list(pairs)) if step.stage <= stage), None)
    return None if kept is None else of_first_image(kept)


def of_first_image(kept: list[int] | list[list[int]]) -> list[int]:
    """An entry of `Pyramid.kept` without those of further images."""
    of_images = [rows for rows in kept if isinstance(rows, list)]
    return of_images[0] if of_images else [row for row in kept if isinstance(row, int)]


def _heading(pyramid: Drawable) -> str:
    """The reduction and what it saves; empty where it was trained."""
    if pyramid.reduction is None:
        return ""
    if pyramid.flops is None or not pyramid.steps:
        return f"reduction: {pyramid.reduction}"
    return f"{pyramid.reduction} saves {100 * pyramid.flops.saved:.1f} % of the prefill's FLOPs"


def _caption(pyramid: Drawable, stage: int) -> str:
    count = pyramid.visual_tokens[stage]
    tokens = f"{count} visual token{'s' * (count != 1)}"
    if pyramid.reduction is not None:
        methods = [step.spec.partition(":")[0] for step in pyramid.steps if step.stage == stage]
        return f"stage {stage}{''.join(f', {method}' for method in methods)}: {tokens}"
    if stage == 0:
        return f"stage 0: {tokens}"
    kernel = pyramid.kernels[stage - 1]
    return f"stage {stage}, {'skipped' if kernel is None else f'{kernel[0]}x{kernel[1]}'}: {tokens}"


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    try:
        return ImageFont.load_default(size)
    except ImportError:  # Pillow without FreeType has one small font
        return ImageFont.load_default()


def _fitting_font(texts: list[str], width: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The largest one up to `FONT_SIZE` in which every text fits."""
    fonts = (_font(size) for size in range(FONT_SIZE, MIN_FONT_SIZE, -1))
    fitting = (font for font in fonts if all(font.getlength(text) <= width for text in texts))
    return next(fitting, _font(MIN_FONT_SIZE))


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """At most `MAX_LINES` lines that fit `width` pixels."""
    text = " ".join(text.split())[: MAX_LINES * max(width, 1)]  # a character takes more than a pixel
    if not text:
        return []
    for characters in range(max(1, round(width / font.getlength("n"))), 0, -1):
        lines = textwrap.wrap(text, characters, max_lines=MAX_LINES, placeholder="..."[:characters])
        if all(font.getlength(line) <= width for line in lines):
            return lines
    return []


def _panel(image: Image.Image, patches: Grid, token_size: Grid, kept: Sequence[int] | None) -> Image.Image:
    """The image with a line around every visual token, and a shade over what was dropped.

    Args:
        patches: grid of the image's patches.
        token_size: patches per visual token.
        kept: see `kept_tokens`.
    """
    panel = image.convert("RGB")
    rows, columns = patches[0] // token_size[0], patches[1] // token_size[1]
    height, width = panel.height * token_size[0] / patches[0], panel.width * token_size[1] / patches[1]
    seen = Image.new("L", panel.size)
    boxes = []
    for token in range(rows * columns) if kept is None else kept:
        if token >= rows * columns:  # of the tiles, which are drawn nowhere
            break
        row, column = divmod(token, columns)
        left, top, right, bottom = column * width, row * height, (column + 1) * width, (row + 1) * height
        boxes.append(
            (round(left), round(top), min(round(right), panel.width - 1), min(round(bottom), panel.height - 1))
        )
        seen.paste(255, (round(left), round(top), round(right), round(bottom)))
    dimmed = Image.blend(panel, Image.new("RGB", panel.size), DROPPED)
    panel = Image.composite(panel, dimmed, seen)
    draw = ImageDraw.Draw(panel)
    for box in boxes:
        draw.rectangle(box, outline=LINE)
    return panel
