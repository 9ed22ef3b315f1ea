"""Draws the pyramid of a request over its image: the patches that each visual token of each stage stands for."""

from __future__ import annotations

from PIL import Image, ImageDraw

from dpn_rt.model.reduction.grid import Grid
from dpn_rt.outputs import Pyramid

LINE = (255, 255, 255)
DROPPED = (0, 0, 0, 150)
"""Shade over the patches that pooling dropped at the right and lower edges."""
CAPTION_HEIGHT = 18
GAP = 8


def draw_pyramid(image: Image.Image, pyramid: Pyramid, side: int = 336) -> Image.Image:
    """Draws one panel per stage, from left to right.

    Args:
        image: square, as the vision encoder saw it.
        pyramid: of the request's output.
        side: width and height of a panel in pixels.

    Returns:
        An RGB image, empty if there were no visual tokens.
    """
    token_sizes = patches_per_token(pyramid)
    width = max(1, len(token_sizes) * (side + GAP) - GAP)
    sheet = Image.new("RGB", (width, side + CAPTION_HEIGHT), "white")
    for stage, (token_size, grid) in enumerate(zip(token_sizes, pyramid.grids, strict=False)):
        if grid is None or pyramid.grids[0] is None:
            continue
        left = stage * (side + GAP)
        sheet.paste(_panel(image.resize((side, side)), pyramid.grids[0], grid, token_size), (left, CAPTION_HEIGHT))
        caption = f"stage {stage}: {pyramid.visual_tokens[stage]} visual tokens"
        ImageDraw.Draw(sheet).text((left + 2, 3), caption, fill="black")
    return sheet


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
