"""Pretraining of the vision tower: what every patch shows. It stands for the pretrained CLIP of the publication."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from examples.tiny_dpn.materials import PHOTOS
from examples.tiny_dpn.scenes import COLORS, GRID, NUMBER_LENGTH, Placed, Scene

READINGS = ("thing", "color", "character", "place")
THINGS = ("background", "number", "word", "digit", "circle", "square", "triangle", "star", *PHOTOS)
GLYPHS = ("", *"0123456789", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ", *(f"written {digit}" for digit in range(10)))
IGNORE = -100


class PatchHead(nn.Module):
    """Reads thing, color, character and place in the label off a patch; thrown away after pretraining."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.sizes = (len(THINGS), len(COLORS), len(GLYPHS), NUMBER_LENGTH)
        self.linear = nn.Linear(hidden_size, sum(self.sizes))

    def losses(self, features: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Cross entropy of every reading; features [..., hidden], labels [..., 4] int64."""
        parts = self.linear(features).float().split(self.sizes, dim=-1)
        return {
            name: F.cross_entropy(part.flatten(0, -2), labels[..., index].flatten(), ignore_index=IGNORE)
            for index, (name, part) in enumerate(zip(READINGS, parts, strict=True))
        }


def patch_labels(scene: Scene) -> torch.Tensor:
    """[patches, 4] int64: thing, color, character, place in the label; -100 where a patch has none."""
    colors, glyphs = list(COLORS), list(GLYPHS)
    labels = torch.full((GRID, GRID, 4), IGNORE)
    labels[..., 0], labels[..., 1] = 0, colors.index(scene.background)
    _fill(labels, scene.photo_place, THINGS.index(scene.photo), IGNORE)
    for shape in scene.shapes:
        _fill(labels, shape.place, THINGS.index(shape.kind), colors.index(shape.color))
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


def _fill(labels: torch.Tensor, place: Placed, thing: int, color: int) -> None:
    box = labels[place.row : place.row + place.height, place.column : place.column + place.width]
    box[..., 0], box[..., 1] = thing, color
