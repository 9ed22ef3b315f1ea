"""Pretraining of the vision tower: what every patch shows. It stands for the pretrained CLIP of the publication."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from examples.tiny_dpn.materials import PHOTOS
from examples.tiny_dpn.scenes import COLORS, GRID, NUMBER_LENGTH, Placed, Scene

READINGS = ("thing", "color", "character", "place", "corner")
THINGS = ("background", "number", "word", "digit", "circle", "square", "triangle", "star", *PHOTOS)
GLYPHS = ("", *"0123456789", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ", *(f"written {digit}" for digit in range(10)))
IGNORE = -100


class PatchHead(nn.Module):
    """Reads a patch (see `patch_labels`); thrown away after pretraining."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.sizes = (len(THINGS), len(COLORS), len(GLYPHS), NUMBER_LENGTH, 2)
        self.linear = nn.Linear(hidden_size, sum(self.sizes))

    def losses(self, features: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Cross entropy of every reading; features [..., hidden], labels [..., readings] int64."""
        parts = self.linear(features).float().split(self.sizes, dim=-1)
        return {
            name: F.cross_entropy(part.flatten(0, -2), labels[..., index].flatten(), ignore_index=IGNORE)
            for index, (name, part) in enumerate(zip(READINGS, parts, strict=True))
        }


def patch_labels(scene: Scene) -> torch.Tensor:
    """What every patch shows.

    Returns:
        [patches, readings] int64: thing, color, character, place in the label, whether the patch is the upper left one
        of a shape (what is counted once); -100 where a patch has none.
    """
    colors, glyphs = list(COLORS), list(GLYPHS)
    labels = torch.full((GRID, GRID, len(READINGS)), IGNORE)
    labels[..., 0], labels[..., 1] = 0, colors.index(scene.background)
    _fill(labels, scene.photo_place, THINGS.index(scene.photo), IGNORE)
    for shape in scene.shapes:
        _fill(labels, shape.place, THINGS.index(shape.kind), colors.index(shape.color))
        box = _box(labels, shape.place)
        box[..., 4] = 0
        box[0, 0, 4] = 1
    for thing, label in (("number", scene.number), ("word", scene.word)):
        _fill(labels, label.place, THINGS.index(thing), IGNORE)
        for index, character in enumerate(label.text):
            cell = labels[label.place.row, label.place.column + index]
            cell[2], cell[3] = glyphs.index(character), index
    _fill(labels, scene.digit_place, THINGS.index("digit"), IGNORE)
    labels[scene.digit_place.row, scene.digit_place.column, 2] = glyphs.index(f"written {scene.digit}")
    return labels.flatten(0, 1)


def has_small_print(scene: Scene) -> torch.Tensor:
    """[patches] bool: whether a character or the handwritten digit stands there."""
    return patch_labels(scene)[:, READINGS.index("character")] != IGNORE


def has_shape(scene: Scene) -> torch.Tensor:
    """[patches] bool: whether a shape stands there."""
    return patch_labels(scene)[:, READINGS.index("corner")] != IGNORE


def _box(labels: torch.Tensor, place: Placed) -> torch.Tensor:
    return labels[place.row : place.row + place.height, place.column : place.column + place.width]


def _fill(labels: torch.Tensor, place: Placed, thing: int, color: int) -> None:
    box = _box(labels, place)
    box[..., 0], box[..., 1] = thing, color
