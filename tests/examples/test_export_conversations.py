"""The exported training data holds every question of every scene once, and is data that the trainer takes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dpn_rt.training.rows import read_conversations
from examples.tiny_dpn.data import sample
from examples.tiny_dpn.export_conversations import export, main

SCENES, SEED = 3, 5


@pytest.mark.parametrize(("turns", "sizes"), [(1, [1] * 10), (4, [4, 4, 2]), (10, [10]), (99, [10])])
def test_every_question_is_asked_once(turns: int, sizes: list[int], tmp_path: Path) -> None:
    conversations, bad_rows = read_conversations(export(tmp_path, SCENES, turns, SEED), tmp_path / "images")
    assert not bad_rows
    assert [len(each.turns) // 2 for each in conversations] == sizes * SCENES
    for index in range(SCENES):
        item = sample("train", index, SEED)
        mine = [each for each in conversations if each.image == tmp_path / "images" / f"{index}.png"]
        for each in mine:
            with Image.open(str(each.image)) as image:
                assert np.array_equal(np.asarray(image), np.asarray(item.image))
            assert [text.startswith("<image>\n") for text in each.turns[::2]] == [True] + [False] * (
                len(each.turns) // 2 - 1
            )
        pairs = [pair for each in mine for pair in zip(each.turns[::2], each.turns[1::2], strict=True)]
        expected = [(question.text, question.answer) for question in item.questions]
        assert sorted((text.removeprefix("<image>\n"), answer) for text, answer in pairs) == sorted(expected)


def test_the_order_of_questions_differs_between_scenes_and_not_between_runs(tmp_path: Path) -> None:
    options = ["--scenes", "4", "--turns", "10", "--seed", "1"]
    texts = []
    for name in ("a", "b"):
        assert main([str(tmp_path / name), *options]) == 0
        texts.append((tmp_path / name / "conversations.json").read_text())
    assert texts[0] == texts[1]
    orders = [tuple(turn["value"].removeprefix("<image>\n") for turn in row["conversations"][::2])
              for row in json.loads(texts[0])]  # fmt: skip
    assert len(set(orders)) == 4
