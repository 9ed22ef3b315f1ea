"""Draws the pyramid of a request over its image: the patches that each visual token of each stage stands for."""

from __future__ import annotations

import textwrap

from PIL import Image, ImageDraw, ImageFont

from dpn_rt.model.reduction.grid import Grid
from dpn_rt.outputs import Pyramid

LINE = (255, 255, 255)
DROPPED = (0, 0, 0, 150)
"""Shade over the patches that pooling dropped at the right and lower edges."""
FONT_SIZE, MIN_FONT_SIZE = 18, 8
LINE_HEIGHT = 24
CAPTION_HEIGHT = 30
MARGIN = 6
"""Around question and answer."""
MAX_LINES = 3
"""Of a question or an answer; longer ones end in dots."""
GAP = 8


def draw_pyramid(
    image: Image.Image, pyramid: Pyramid, side: int = 336, question: str = "", answer: str = ""
) -> Image.Image:
    """Draws one panel per stage, from left to right, below the question and the answer.

    Args:
        image: square, as the vision encoder saw it.
        pyramid: of the request's output.
        side: width and height of a panel in pixels.
        question: may be empty, as `answer` may; then there is no room for it.
        answer: of the model.

    Returns:
        An RGB image, empty if there were no visual tokens.
    """
    token_sizes = patches_per_token(pyramid)
    width = max(1, len(token_sizes) * (side + GAP) - GAP)
    font = _font(FONT_SIZE)
    captions = [_caption(pyramid, stage) for stage in range(len(token_sizes))]
    small_font = _fitting_font(captions, side)
    lines = [line for text in (question, answer) for line in _wrapped(text, font, width - 2 * MARGIN)]
    top = len(lines) * LINE_HEIGHT + (2 * MARGIN if lines else 0)
    sheet = Image.new("RGB", (width, top + side + CAPTION_HEIGHT), "white")
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(lines):
        draw.text((MARGIN, MARGIN + number * LINE_HEIGHT), line, fill="black", font=font)
    for stage, (token_size, grid) in enumerate(zip(token_sizes, pyramid.grids, strict=False)):
        if grid is None or pyramid.grids[0] is None:
            continue
        left = stage * (side + GAP)
        panel = _panel(image.resize((side, side)), pyramid.grids[0], grid, token_size)
        sheet.paste(panel, (left, top + CAPTION_HEIGHT))
        draw.text((left, top + 3), captions[stage], fill="black", font=small_font)
    return sheet


def _caption(pyramid: Pyramid, stage: int) -> str:
    count = pyramid.visual_tokens[stage]
    tokens = f"{count} visual token{'s' * (count != 1)}"
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


def patches_per_token(pyramid: Pyramid) -> list[Grid]:
    """(rows, columns) of the patches that one visual token stands for, per stage."""
    height, width = 1, 1
    sizes = [(height, width)]
    for kernel in pyramid.kernels:
        if kernel is not None:
            height, width = height * kernel[0], width * kernel[1]
        sizes.append((height, width))
    return sizes


def _panel(image: Image.Image, patches: Grid, grid: Grid, token_size: Grid) -> Image.Image:
    """The image with a line around every visual token.

    Args:
        patches: grid of the image's patches.
        grid: of the visual tokens.
        token_size: patches per visual token.
    """
    panel = image.convert("RGB")
    draw = ImageDraw.Draw(panel, "RGBA")
    patch_height, patch_width = panel.height / patches[0], panel.width / patches[1]
    bottom, right = grid[0] * token_size[0] * patch_height, grid[1] * token_size[1] * patch_width
    draw.rectangle((right, 0, panel.width, panel.height), fill=DROPPED)
    draw.rectangle((0, bottom, right, panel.height), fill=DROPPED)
    for row in range(grid[0] + 1):
        y = min(row * token_size[0] * patch_height, panel.height - 1)
        draw.line((0, y, right, y), fill=LINE)
    for column in range(grid[1] + 1):
        x = min(column * token_size[1] * patch_width, panel.width - 1)
        draw.line((x, 0, x, bottom), fill=LINE)
    return panel
