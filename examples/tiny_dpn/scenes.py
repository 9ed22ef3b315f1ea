"""Scenes drawn from a seed: what they contain and where, and their pictures.

A scene has a coloured background, a crop of a photograph, shapes, two small labels (a number and a word) and a note
with a handwritten digit. Things are placed on the 16 x 16 grid of the vision tower's patches. Small print has one
character per patch, up to two pixels off the grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeVar

import numpy as np
from PIL import Image, ImageDraw

from examples.tiny_dpn.materials import PHOTOS, load_materials

Split = Literal["train", "test"]
Shape = Literal["circle", "square", "triangle", "star"]
Item = TypeVar("Item")

PATCH = 14
GRID = 16
SIDE = PATCH * GRID
COLORS = {
    "red": (205, 45, 40),
    "orange": (240, 140, 30),
    "yellow": (235, 215, 50),
    "green": (50, 150, 60),
    "blue": (45, 80, 200),
    "purple": (135, 55, 165),
    "white": (240, 240, 240),
    "black": (25, 25, 25),
}
MAX_SQUARES = 4
NUMBER_LENGTH = 4
JITTER = 2
"""Largest shift of small print off the patch grid, in pixels."""
_CONSONANTS, _VOWELS = "BDGKLMNPRST", "AEIOU"
_TEST_SHARE = 0.1
_SPLIT_SEED = 20251


@dataclass(frozen=True, slots=True)
class Placed:
    """The place of a thing on the grid: its upper left patch and its size, in patches."""

    row: int
    column: int
    height: int
    width: int

    @property
    def center(self) -> tuple[float, float]:
        """(row, column)."""
        return self.row + self.height / 2, self.column + self.width / 2


@dataclass(frozen=True, slots=True)
class DrawnShape:
    kind: Shape
    color: str
    place: Placed


@dataclass(frozen=True, slots=True)
class Label:
    """Small print on a card; `place` is the place of the characters, without the card's margin."""

    text: str
    font: int
    place: Placed
    shift: tuple[int, int]
    """Shift (down, right) off the patch grid, in pixels."""


@dataclass(frozen=True, slots=True)
class Scene:
    background: str
    photo: str
    photo_place: Placed
    shapes: tuple[DrawnShape, ...]
    number: Label
    word: Label
    digit: int
    digit_index: int
    """Index into scikit-learn's digits."""
    digit_place: Placed
    digit_shift: tuple[int, int]
    drawing_seed: int
    """Seed of crops, shades and noise."""

    def count(self, kind: Shape) -> int:
        return sum(shape.kind == kind for shape in self.shapes)

    def only(self, kind: Shape) -> DrawnShape:
        """The shape of a kind that every scene has exactly once."""
        return next(shape for shape in self.shapes if shape.kind == kind)


@cache
def numbers(split: Split) -> tuple[str, ...]:
    """The four-digit numbers of a split; the splits are disjoint."""
    return _share([f"{n:0{NUMBER_LENGTH}d}" for n in range(10**NUMBER_LENGTH)], split)


@cache
def words(split: Split) -> tuple[str, ...]:
    """The words (consonant, vowel, consonant) of a split; the splits are disjoint."""
    return _share([a + b + c for a in _CONSONANTS for b in _VOWELS for c in _CONSONANTS], split)


@cache
def handwritten(split: Split) -> tuple[int, ...]:
    """Indices of the handwritten digits of a split; the splits are disjoint."""
    return _share(list(range(len(load_materials().digits))), split)


def _share(items: list[Item], split: Split) -> tuple[Item, ...]:
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(items))
    cut = round(len(items) * _TEST_SHARE)
    chosen = order[:cut] if split == "test" else order[cut:]
    return tuple(items[i] for i in chosen)


def make_scene(split: Split, index: int, seed: int = 0) -> Scene:
    """Scene number `index` of a split. Equal arguments give equal scenes on every machine."""
    rng = np.random.default_rng([seed, ("train", "test").index(split), index])
    background = str(rng.choice(list(COLORS)))
    while True:
        space = _Space(rng)
        side = int(rng.integers(5, 8))
        photo = space.place(side, side)
        kinds: list[Shape] = ["triangle", "star", *["square"] * int(rng.integers(0, MAX_SQUARES + 1))]
        if rng.random() < 0.5:
            kinds.append("circle")
        sizes = [int(rng.integers(2, 4)) for _ in kinds]
        places = [space.place(size, size) for size in sizes]
        number, word = (space.place(1, length, margin=1) for length in (NUMBER_LENGTH, 3))
        digit = space.place(1, 1, margin=1)
        if photo and all(places) and number and word and digit and _is_unambiguous(photo, places[0], places[1]):
            break
    others = [color for color in COLORS if color != background]
    shapes = tuple(DrawnShape(k, str(rng.choice(others)), p) for k, p in zip(kinds, places, strict=True) if p)
    chosen = int(rng.choice(handwritten(split)))
    return Scene(
        background=background,
        photo=str(rng.choice(PHOTOS)),
        photo_place=photo,
        shapes=shapes,
        number=Label(str(rng.choice(numbers(split))), int(rng.integers(4)), number, _shift(rng)),
        word=Label(str(rng.choice(words(split))), int(rng.integers(4)), word, _shift(rng)),
        digit=int(load_materials().digit_values[chosen]),
        digit_index=chosen,
        digit_place=digit,
        digit_shift=_shift(rng),
        drawing_seed=int(rng.integers(2**31)),
    )


def _is_unambiguous(photo: Placed, triangle: Placed, star: Placed) -> bool:
    """Whether left and right, top and bottom are clear without measuring."""
    off_middle = all(abs(center - GRID / 2) >= 1 for center in photo.center)
    return off_middle and abs(triangle.center[1] - star.center[1]) >= 1


def _shift(rng: np.random.Generator) -> tuple[int, int]:
    down, right = rng.integers(-JITTER, JITTER + 1, 2)
    return int(down), int(right)


class _Space:
    """Keeps track of free patches."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._taken = np.zeros((GRID, GRID), bool)

    def place(self, height: int, width: int, margin: int = 0, tries: int = 40) -> Placed | None:
        """A free rectangle at least `margin` patches from the edge and from other things; None if none is found."""
        for _ in range(tries):
            row = int(self._rng.integers(margin, GRID - height - margin + 1))
            column = int(self._rng.integers(margin, GRID - width - margin + 1))
            box = np.s_[row - margin : row + height + margin, column - margin : column + width + margin]
            if not self._taken[box].any():
                self._taken[box] = True
                return Placed(row, column, height, width)
        return None


def draw(scene: Scene) -> Image.Image:
    """The picture, RGB, `SIDE` x `SIDE`."""
    rng = np.random.default_rng(scene.drawing_seed)
    picture = Image.new("RGB", (SIDE, SIDE), _shade(rng, scene.background))
    picture.paste(_photo(rng, scene), _corner(scene.photo_place))
    pen = ImageDraw.Draw(picture)
    for shape in scene.shapes:
        _draw_shape(pen, shape, _shade(rng, shape.color))
    for label in (scene.number, scene.word):
        _draw_label(pen, label)
    _draw_digit(picture, scene)
    noise = rng.normal(0, 3, (SIDE, SIDE, 3))
    return Image.fromarray(np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8))


def _shade(rng: np.random.Generator, color: str) -> tuple[int, int, int]:
    red, green, blue = np.clip(np.array(COLORS[color]) + rng.integers(-15, 16, 3), 0, 255)
    return int(red), int(green), int(blue)


def _corner(place: Placed) -> tuple[int, int]:
    return place.column * PATCH, place.row * PATCH


def _photo(rng: np.random.Generator, scene: Scene) -> Image.Image:
    photo = load_materials().photos[scene.photo]
    size = int(rng.integers(110, min(photo.size) + 1))
    left, top = (int(rng.integers(0, length - size + 1)) for length in photo.size)
    side = scene.photo_place.height * PATCH
    return photo.resize((side, side), Image.Resampling.BILINEAR, box=(left, top, left + size, top + size))


def _draw_shape(pen: ImageDraw.ImageDraw, shape: DrawnShape, color: tuple[int, int, int]) -> None:
    left, top = _corner(shape.place)
    size = shape.place.height * PATCH
    box = (left + 2, top + 2, left + size - 3, top + size - 3)
    if shape.kind == "circle":
        pen.ellipse(box, fill=color)
    elif shape.kind == "square":
        pen.rectangle(box, fill=color)
    elif shape.kind == "triangle":
        pen.polygon([(left + size // 2, box[1]), (box[2], box[3]), (box[0], box[3])], fill=color)
    else:
        pen.polygon(_star(left + size / 2, top + size / 2, size / 2 - 1), fill=color)


def _star(x: float, y: float, radius: float) -> list[tuple[float, float]]:
    corners = []
    for corner in range(10):
        length = radius if corner % 2 == 0 else radius * 0.45
        angle = math.pi * (corner / 5 - 0.5)
        corners.append((x + length * math.cos(angle), y + length * math.sin(angle)))
    return corners


def _draw_label(pen: ImageDraw.ImageDraw, label: Label) -> None:
    left, top = _corner(label.place)
    left, top = left + label.shift[1], top + label.shift[0]
    width = label.place.width * PATCH
    pen.rectangle((left - 4, top - 4, left + width + 3, top + PATCH + 3), fill=(250, 250, 245), outline=(90, 90, 90))
    font = load_materials().fonts[label.font]
    for position, character in enumerate(label.text):
        center = left + position * PATCH + PATCH / 2
        pen.text((center, top + PATCH / 2), character, fill=(20, 20, 20), font=font, anchor="mm")


def _draw_digit(picture: Image.Image, scene: Scene) -> None:
    left, top = _corner(scene.digit_place)
    left, top = left + scene.digit_shift[1], top + scene.digit_shift[0]
    ImageDraw.Draw(picture).rectangle((left - 4, top - 4, left + PATCH + 3, top + PATCH + 3), fill=(255, 240, 150))
    digit = Image.fromarray(load_materials().digits[scene.digit_index])
    ink = digit.resize((PATCH, PATCH), Image.Resampling.BICUBIC)
    picture.paste((30, 30, 120), (left, top), ink)
