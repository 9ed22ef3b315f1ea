"""Draw the pyramid of a request over its image: which patches each stage of the decoder saw as one visual token."""

from __future__ import annotations

from PIL import Image, ImageDraw

from dpn_rt.model.reduction.reduction import Grid
from dpn_rt.outputs import Pyramid

LINE = (255, 255, 255)
DROPPED = (0, 0, 0, 150)
"""Shade over patches that pooling dropped at the right and lower edge."""
CAPTION_HEIGHT = 18
GAP = 8


def draw_pyramid(image: Image.Image, pyramid: Pyramid, side: int = 336) -> Image.Image:
    """One panel per stage, left to right.

    Args:
        image: square, as the vision tower saw it.
        pyramid: of the request's output.
        side: width and height of a panel in pixels.

    Returns:
        An RGB image; without visual tokens, an empty one.
    """
    cells = merged_cells(pyramid)
    width = max(1, len(cells) * (side + GAP) - GAP)
    sheet = Image.new("RGB", (width, side + CAPTION_HEIGHT), "white")
    for stage, (cell, grid) in enumerate(zip(cells, pyramid.grids, strict=False)):
        if grid is None or pyramid.grids[0] is None:
            continue
        left = stage * (side + GAP)
        sheet.paste(_panel(image.resize((side, side)), pyramid.grids[0], grid, cell), (left, CAPTION_HEIGHT))
        caption = f"stage {stage}: {pyramid.visual_tokens[stage]} visual tokens"
        ImageDraw.Draw(sheet).text((left + 2, 3), caption, fill="black")
    return sheet


def merged_cells(pyramid: Pyramid) -> list[Grid]:
    """(rows, columns) of the tower's patches that one visual token of each stage stands for."""
    height, width = 1, 1
    cells = [(height, width)]
    for kernel in pyramid.kernels:
        if kernel is not None:
            height, width = height * kernel[0], width * kernel[1]
        cells.append((height, width))
    return cells


def _panel(image: Image.Image, patches: Grid, grid: Grid, cell: Grid) -> Image.Image:
    """The image with a line around every visual token."""
    panel = image.convert("RGB")
    draw = ImageDraw.Draw(panel, "RGBA")
    patch_height, patch_width = panel.height / patches[0], panel.width / patches[1]
    bottom, right = grid[0] * cell[0] * patch_height, grid[1] * cell[1] * patch_width
    draw.rectangle((right, 0, panel.width, panel.height), fill=DROPPED)
    draw.rectangle((0, bottom, right, panel.height), fill=DROPPED)
    for row in range(grid[0] + 1):
        y = min(row * cell[0] * patch_height, panel.height - 1)
        draw.line((0, y, right, y), fill=LINE)
    for column in range(grid[1] + 1):
        x = min(column * cell[1] * patch_width, panel.width - 1)
        draw.line((x, 0, x, bottom), fill=LINE)
    return panel
