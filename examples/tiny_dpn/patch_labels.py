"""Labels that say what every patch shows. They pretrain the vision tower, in place of the published pretrained CLIP."""

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
    """Predicts the labels of a patch (see `patch_labels`); dropped after pretraining."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.sizes = (len(THINGS), len(COLORS), len(GLYPHS), NUMBER_LENGTH, 2)
        self.linear = nn.Linear(hidden_size, sum(self.sizes))

    def losses(self, features: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Cross entropy per label; `features [..., hidden]`, `labels [..., len(READINGS)]` int64."""
        parts = self.linear(features).float().split(self.sizes, dim=-1)
        return {
            name: F.cross_entropy(part.flatten(0, -2), labels[..., index].flatten(), ignore_index=IGNORE)
            for index, (name, part) in enumerate(zip(READINGS, parts, strict=True))
        }


def patch_labels(scene: Scene) -> torch.Tensor:
    """Labels of all patches of a scene.

    Returns:
        `[num_patches, len(READINGS)]` int64: thing, color, character, place of the character in its word or number, and
        whether the patch is the upper left one of a shape (so that each shape counts once); -100 where a label does not
        apply.
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
    """[num_patches] bool: whether the patch shows a character or the handwritten digit."""
    return patch_labels(scene)[:, READINGS.index("character")] != IGNORE


def has_shape(scene: Scene) -> torch.Tensor:
    """[num_patches] bool: whether the patch belongs to a shape."""
    return patch_labels(scene)[:, READINGS.index("corner")] != IGNORE


def _box(labels: torch.Tensor, place: Placed) -> torch.Tensor:
    return labels[place.row : place.row + place.height, place.column : place.column + place.width]


def _fill(labels: torch.Tensor, place: Placed, thing: int, color: int) -> None:
    box = _box(labels, place)
    box[..., 0], box[..., 1] = thing, color
