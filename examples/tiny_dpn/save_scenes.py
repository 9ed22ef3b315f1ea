"""Write held-out scenes as PNG: python -m examples.tiny_dpn.save_scenes OUTPUT_DIR INDEX [INDEX ...]."""

from __future__ import annotations

import sys
from pathlib import Path

from dpn_rt.terminal import escape_output
from examples.tiny_dpn.data import sample


def main(folder: Path, indices: list[int]) -> None:
    """Write scene_1.png, scene_2.png, ... in the order of the indices, and print their questions and answers."""
    escape_output()
    for number, index in enumerate(indices, 1):
        item = sample("test", index)
        path = folder / f"scene_{number}.png"
        item.image.save(path)
        for question in item.questions:
            print(f"{path.name}: {question.text} {question.answer}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(index) for index in sys.argv[2:]])
