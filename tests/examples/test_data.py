"""The data set is deterministic, its splits are disjoint, and its answers fit the pictures."""

from __future__ import annotations

from collections import Counter
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.tiny_dpn.data import KINDS, Sample, sample
from examples.tiny_dpn.materials import load_materials
from examples.tiny_dpn.patch_labels import GLYPHS, READINGS, THINGS, has_small_print, patch_labels
from examples.tiny_dpn.scenes import COLORS, GRID, PATCH, Label, Placed, Scene, handwritten, make_scene, numbers, words

indices = st.integers(0, 10**9)


@cache
def samples() -> tuple[Sample, ...]:
    return tuple(sample("test", index) for index in range(200))


@settings(max_examples=10, deadline=None)
@given(index=indices, seed=st.integers(0, 1000))
def test_the_same_arguments_give_the_same_picture(index: int, seed: int) -> None:
    first, second = sample("train", index, seed), sample("train", index, seed)
    assert first.scene == second.scene and first.questions == second.questions
    assert np.array_equal(np.asarray(first.image), np.asarray(second.image))
    assert sample("train", index + 1, seed).scene != first.scene
    assert sample("test", index, seed).scene != first.scene


def test_train_and_test_share_no_number_word_or_digit() -> None:
    for items in (numbers, words, handwritten):
        train, test = set(items("train")), set(items("test"))
        assert train and test and not train & test
    assert len(set(numbers("train")) | set(numbers("test"))) == 10**4
    assert len(set(handwritten("train")) | set(handwritten("test"))) == len(load_materials().digits)


@settings(max_examples=50, deadline=None)
@given(index=indices)
def test_scenes_take_from_their_own_split(index: int) -> None:
    for split in ("train", "test"):
        scene = make_scene(split, index)
        assert scene.number.text in numbers(split)
        assert scene.word.text in words(split)
        assert scene.digit_index in handwritten(split)
        assert scene.digit == load_materials().digit_values[scene.digit_index]


@settings(max_examples=100, deadline=None)
@given(index=indices)
def test_things_lie_inside_and_apart(index: int) -> None:
    scene = make_scene("test", index)
    taken = np.zeros((GRID, GRID), int)
    for place in places(scene):
        assert min(place.row, place.column) >= 0
        assert max(place.row + place.height, place.column + place.width) <= GRID
        taken[place.row : place.row + place.height, place.column : place.column + place.width] += 1
    assert taken.max() == 1


def places(scene: Scene) -> list[Placed]:
    small_print = [scene.number.place, scene.word.place, scene.digit_place]
    return [scene.photo_place, *(shape.place for shape in scene.shapes), *small_print]


def test_answers_follow_from_the_scene() -> None:
    for item in samples():
        scene = item.scene
        answers = {question.kind: question.answer for question in item.questions}
        assert list(answers) == list(KINDS)
        kinds = Counter(shape.kind for shape in scene.shapes)
        assert answers["circle"] == ("yes" if kinds["circle"] else "no")
        assert answers["count"] == str(kinds["square"])
        triangle, star = (next(s for s in scene.shapes if s.kind == kind) for kind in ("triangle", "star"))
        assert answers["color"] == triangle.color
        left = triangle.place.column + triangle.place.width / 2 < star.place.column + star.place.width / 2
        assert answers["side"] == ("left" if left else "right")
        middle_row = scene.photo_place.row + scene.photo_place.height / 2
        middle_column = scene.photo_place.column + scene.photo_place.width / 2
        vertical, horizontal = answers["where"].split()
        assert (vertical == "top") == (middle_row < GRID / 2) and (horizontal == "left") == (middle_column < GRID / 2)
        assert (answers["number"], answers["word"], answers["photo"]) == (
            scene.number.text,
            scene.word.text,
            scene.photo,
        )


def test_colors_are_those_of_the_picture() -> None:
    for item in samples()[:50]:
        pixels = np.asarray(item.image).astype(int)
        free = np.ones((GRID, GRID), bool)
        for place in places(item.scene):
            free[place.row - 1 if place.row else 0 : place.row + place.height + 1, :] = False
        row, column = np.argwhere(free)[0] if free.any() else (0, 0)
        if free.any():
            patch = pixels[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
            assert nearest_color(patch.mean((0, 1))) == item.scene.background
        for shape in item.scene.shapes:
            top = (shape.place.row * 2 + shape.place.height) * PATCH // 2
            left = (shape.place.column * 2 + shape.place.width) * PATCH // 2
            assert nearest_color(pixels[top - 2 : top + 3, left - 2 : left + 3].mean((0, 1))) == shape.color


def nearest_color(rgb: np.ndarray) -> str:
    return min(COLORS, key=lambda name: float(np.abs(np.array(COLORS[name]) - rgb).sum()))


def test_small_print_is_drawn_where_the_scene_says() -> None:
    for item in samples()[:50]:
        pixels = np.asarray(item.image.convert("L")).astype(int)
        for label in (item.scene.number, item.scene.word):
            assert ink(pixels, label) > 0.02, "each character, even I, leaves dark pixels on a light card"


def ink(pixels: np.ndarray, label: Label) -> float:
    """Least share of dark pixels in any character's patch."""
    shares = []
    for position in range(len(label.text)):
        top = label.place.row * PATCH + label.shift[0]
        left = (label.place.column + position) * PATCH + label.shift[1]
        cell = pixels[top : top + PATCH, left : left + PATCH]
        assert (cell > 200).mean() > 0.3, "the card is light"
        shares.append(float((cell < 100).mean()))
    return min(shares)


@pytest.mark.parametrize("kind", KINDS)
def test_no_answer_is_right_by_itself(kind: str) -> None:
    answers = Counter(q.answer for item in samples() for q in item.questions if q.kind == kind)
    most = answers.most_common(1)[0][1] / answers.total()
    assert len(answers) > 1
    assert most < (0.65 if kind in ("circle", "side") else 0.45), answers.most_common(3)


@pytest.mark.parametrize("index", range(20))
def test_patch_labels_say_what_stands_where(index: int) -> None:
    scene = make_scene("train", index)
    labels = dict(zip(READINGS, patch_labels(scene).unflatten(0, (GRID, GRID)).unbind(-1), strict=True))
    is_square = labels["thing"] == THINGS.index("square")
    assert int((is_square & (labels["corner"] == 1)).sum()) == scene.count("square")
    label = scene.word
    cells = [(label.place.row, label.place.column + i) for i in range(len(label.text))]
    assert "".join(GLYPHS[labels["character"][cell]] for cell in cells) == label.text
    assert [int(labels["place"][cell]) for cell in cells] == [0, 1, 2]
    assert int(has_small_print(scene).sum()) == len(scene.number.text) + len(label.text) + 1
