"""Compare training-free reductions on drawn scenes: python -m examples.compare_reducers [--scenes N] [--output DIR].

An engine of the small dense checkpoint answers every question with every SPEC, and what each one kept of a picture is
drawn.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from dpn_rt import LLM, SamplingParams
from dpn_rt.builders.native import build_engine
from dpn_rt.drawing import draw_pyramids
from dpn_rt.evaluate.dataframe import rows_of
from dpn_rt.terminal import count, escape_output
from examples.tiny_dpn.answers import MAX_TOKENS, chat_messages
from examples.tiny_dpn.data import sample

CHECKPOINT = Path(__file__).parent / "tiny_dpn" / "dense_checkpoint"
SPECS = ("none", "fastv:k=2,ratio=0.5", "pyramiddrop:layers=2-4-6,ratios=0.5-0.25-0.125", "pool:kernel=2x2,layer=2")
DRAWN_QUESTION = 7
"""What number is printed on the label?"""


def main(arguments: Sequence[str] | None = None) -> None:
    escape_output()
    parser = argparse.ArgumentParser(prog="python -m examples.compare_reducers", description=__doc__.split("\n\n")[0])
    parser.add_argument("--scenes", type=count, default=3, metavar="N", help="ten questions each (default 3)")
    parser.add_argument("--output", type=Path, default=Path(), metavar="DIR", help="for the picture (default here)")
    options = parser.parse_args(arguments)
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output {options.output}: {error.strerror}")
    scenes = [sample("test", index) for index in range(options.scenes)]
    asked = [(scene, question) for scene in scenes for question in scene.questions]
    conversations = [chat_messages(scene.image, question.text) for scene, question in asked]
    with tempfile.TemporaryDirectory() as folder:
        llm = LLM(build_engine(CHECKPOINT, Path(folder) / "engine", dtype="float32").path, reduce=SPECS)
        drawn = []
        print(f"{'right':>7}{'FLOPs':>8}  reduction")
        for spec in SPECS:
            outputs = llm.chat(conversations, SamplingParams(temperature=0, max_tokens=MAX_TOKENS), reduce=spec)
            rows = rows_of(outputs)  # `dpn_rt.evaluate.to_dataframe(outputs)` has the same as a table of pandas
            right = [row["text"] == question.answer for row, (_, question) in zip(rows, asked, strict=True)]
            print(f"{100 * fmean(right):5.0f} %{100 * fmean(1 - row['flops_saved'] for row in rows):6.0f} %  {spec}")
            drawn.append((outputs[DRAWN_QUESTION].pyramid, str(rows[DRAWN_QUESTION]["text"])))
    scene, question = asked[DRAWN_QUESTION]
    path = options.output / "compare_reducers.png"
    draw_pyramids(scene.image, drawn, side=224, question=question.text).save(path)
    print(path)


if __name__ == "__main__":
    main()
