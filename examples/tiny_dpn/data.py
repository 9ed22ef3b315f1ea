"""Questions of known difficulty about drawn scenes: deterministic by seed, with disjoint train and test splits.

Coarse questions need a glance (a colour, whether something is there), middle ones a look at several things and their
places, and fine ones the reading of small print.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from PIL import Image

from examples.tiny_dpn.scenes import Scene, Split, draw, make_scene

Level = Literal["coarse", "middle", "fine"]
LEVELS: tuple[Level, ...] = ("coarse", "middle", "fine")

KINDS: dict[str, Level] = {
    "background": "coarse",
    "photo": "coarse",
    "circle": "coarse",
    "count": "middle",
    "color": "middle",
    "where": "middle",
    "side": "middle",
    "number": "fine",
    "word": "fine",
    "handwritten": "fine",
}
"""Question kind -> difficulty."""

QUESTIONS: dict[str, str] = {
    "background": "What color is the background?",
    "photo": "What does the photograph show?",
    "circle": "Is there a circle in the picture?",
    "count": "How many squares are there?",
    "color": "What color is the triangle?",
    "where": "Where in the picture is the photograph?",
    "side": "Is the triangle to the left or to the right of the star?",
    "number": "What number is printed on the label?",
    "word": "What word is printed on the label?",
    "handwritten": "Which digit is written by hand?",
}


@dataclass(frozen=True, slots=True)
class Question:
    kind: str
    text: str
    answer: str

    @property
    def level(self) -> Level:
        return KINDS[self.kind]


@dataclass(frozen=True, slots=True)
class Sample:
    """A scene, its picture (RGB, 224 x 224) and one question of every kind, in the order of KINDS."""

    scene: Scene
    image: Image.Image
    questions: tuple[Question, ...]


def sample(split: Split, index: int, seed: int = 0) -> Sample:
    """Scene number `index` of a split. Equal arguments give equal samples."""
    scene = make_scene(split, index, seed)
    return Sample(scene, draw(scene), questions(scene))


def questions(scene: Scene) -> tuple[Question, ...]:
    """One question of every kind, in the order of KINDS."""
    answers = {
        "background": scene.background,
        "photo": scene.photo,
        "circle": "yes" if scene.count("circle") else "no",
        "count": str(scene.count("square")),
        "color": scene.only("triangle").color,
        "where": _quadrant(scene),
        "side": _side(scene),
        "number": scene.number.text,
        "word": scene.word.text,
        "handwritten": str(scene.digit),
    }
    return tuple(Question(kind, QUESTIONS[kind], answers[kind]) for kind in KINDS)


def _quadrant(scene: Scene) -> str:
    row, column = scene.photo_place.center
    return f"{'top' if row < 8 else 'bottom'} {'left' if column < 8 else 'right'}"


def _side(scene: Scene) -> str:
    triangle, star = scene.only("triangle").place, scene.only("star").place
    return "left" if triangle.center[1] < star.center[1] else "right"
