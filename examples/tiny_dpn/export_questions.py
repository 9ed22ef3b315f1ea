"""Write held-out questions as LLaVA's question file: python -m examples.tiny_dpn.export_questions DIR [--scenes N].

DIR gets questions.jsonl (question_id, image, text, category, answer) and the pictures in images/.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from dpn_rt.terminal import escape_output
from examples.tiny_dpn.data import sample


def export(folder: Path, scenes: int) -> Path:
    """Writes the questions of held-out scenes, ten each, and returns the question file."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, object]] = []
    for index in range(scenes):
        item = sample("test", index)
        name = f"scene_{index:04}.png"
        item.image.save(images / name)
        for question in item.questions:
            line = {"question_id": len(lines), "image": name, "text": question.text}
            lines.append(line | {"category": question.kind, "answer": question.answer})
    path = folder / "questions.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    escape_output()
    parser = argparse.ArgumentParser(description="Write held-out questions as LLaVA's question file.")
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--scenes", type=int, default=200, metavar="N", help="ten questions each (default 200)")
    options = parser.parse_args(arguments)
    print(export(options.folder, options.scenes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
