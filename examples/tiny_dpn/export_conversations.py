"""Write training scenes as LLaVA's conversations: python -m examples.tiny_dpn.export_conversations DIR [--scenes N].

DIR gets conversations.json and the pictures in images/. A scene's ten questions are asked in random order, --turns of
them in a conversation: the model then reads a picture once for several answers. No test scene is among them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dpn_rt.terminal import escape_output
from examples.tiny_dpn.data import Question, sample


def export(folder: Path, scenes: int, turns: int = 1, seed: int = 0) -> Path:
    """Writes the conversations of training scenes and returns their file."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []
    for index in range(scenes):
        item = sample("train", index, seed)
        name = f"{index}.png"
        item.image.save(images / name)
        order = np.random.default_rng([seed, index]).permutation(len(item.questions))
        for start in range(0, len(order), turns):
            asked = [item.questions[place] for place in order[start : start + turns]]
            rows.append({"id": f"{index}-{start // turns}", "image": name, "conversations": conversation(asked)})
    path = folder / "conversations.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def conversation(questions: Sequence[Question]) -> list[dict[str, str]]:
    """Questions and answers in turns; the picture comes before the first question."""
    entries: list[dict[str, str]] = []
    for number, question in enumerate(questions):
        picture = "" if number else "<image>\n"
        entries.append({"from": "human", "value": picture + question.text})
        entries.append({"from": "gpt", "value": question.answer})
    return entries


def main(arguments: Sequence[str] | None = None) -> int:
    escape_output()
    parser = argparse.ArgumentParser(description="Write training scenes as LLaVA's conversations.")
    add = parser.add_argument
    parser.add_argument("folder", type=Path, metavar="DIR")
    add("--scenes", type=int, default=1600, metavar="N", help="ten questions each (default 1600)")
    add("--turns", type=int, default=1, metavar="N", help="questions of a conversation (default 1)")
    add("--seed", type=int, default=0, metavar="N", help="other scenes for another seed (default 0)")
    options = parser.parse_args(arguments)
    print(export(options.folder, options.scenes, options.turns, options.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
