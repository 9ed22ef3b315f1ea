"""Build an engine from the trained checkpoint and ask easy and hard questions about pictures: `make demo`."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dpn_rt import LLM, SamplingParams
from dpn_rt.builders.native import build_engine
from dpn_rt.format.config import ModelConfig
from dpn_rt.format.flops import prefill_flops
from dpn_rt.outputs import RequestOutput
from dpn_rt.terminal import escape_output

EXAMPLES = Path(__file__).parent
CHECKPOINT = EXAMPLES / "tiny_dpn" / "checkpoint"
IMAGES = EXAMPLES / "images"
MAX_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Asked:
    """A question about a picture in examples/images, and its right answer."""

    image: str
    question: str
    expected: str


BACKGROUND = "What color is the background?"
PHOTO = "What does the photograph show?"
CIRCLE = "Is there a circle in the picture?"
COUNT = "How many squares are there?"
WHERE = "Where in the picture is the photograph?"
NUMBER = "What number is printed on the label?"
WORD = "What word is printed on the label?"
HANDWRITTEN = "Which digit is written by hand?"

QUESTIONS = (
    Asked("scene_1.png", BACKGROUND, "blue"),
    Asked("scene_1.png", PHOTO, "cat"),
    Asked("scene_1.png", COUNT, "2"),
    Asked("scene_1.png", NUMBER, "7948"),
    Asked("scene_2.png", CIRCLE, "yes"),
    Asked("scene_2.png", WHERE, "top left"),
    Asked("scene_2.png", WORD, "TIN"),
    Asked("scene_2.png", HANDWRITTEN, "2"),
    Asked("scene_3.png", BACKGROUND, "purple"),
    Asked("scene_3.png", COUNT, "3"),
    Asked("scene_3.png", NUMBER, "2477"),
    Asked("scene_3.png", WORD, "DEL"),
)


def main() -> int:
    escape_output()
    if not (CHECKPOINT / "config.json").is_file():
        print(f"{CHECKPOINT} has no checkpoint; make one with: python -m examples.tiny_dpn.train", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as directory:
        start = time.perf_counter()
        engine = build_engine(CHECKPOINT, Path(directory) / "engine", dtype="float32")
        llm = LLM(engine.path)
        print(f"engine built and loaded in {time.perf_counter() - start:.1f} s\n")
        conversations = [conversation(asked) for asked in QUESTIONS]
        params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
        start = time.perf_counter()
        outputs = llm.chat(conversations, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        print(table(llm.model, outputs))
        right = sum(text_of(output) == asked.expected for asked, output in zip(QUESTIONS, outputs, strict=True))
        print(f"\n{right} of {len(QUESTIONS)} right; one batch with mixed routes, {seconds:.2f} s")
    return 0


def conversation(asked: Asked) -> list[dict[str, object]]:
    content = [{"type": "image", "image": IMAGES / asked.image}, {"type": "text", "text": asked.question}]
    return [{"role": "user", "content": content}]


def text_of(output: RequestOutput) -> str:
    return output.outputs[0].text.strip()


def table(model: ModelConfig, outputs: Sequence[RequestOutput]) -> str:
    """One line per question, columns aligned."""
    header = ("picture", "question", "answer", "right", "route", "visual tokens", "FLOPs saved", "first token")
    lines = [header, *(line(model, asked, output) for asked, output in zip(QUESTIONS, outputs, strict=True))]
    widths = [max(len(cells[column]) for cells in lines) for column in range(len(header))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)).rstrip() for cells in lines)


def line(model: ModelConfig, asked: Asked, output: RequestOutput) -> tuple[str, ...]:
    pyramid = output.pyramid
    rows = [len(output.prompt_token_ids) - 1 + visual for visual in pyramid.visual_tokens]
    saved = 1 - prefill_flops(model, rows) / prefill_flops(model, [rows[0]] * len(rows))
    return (
        asked.image,
        asked.question,
        text_of(output),
        "yes" if text_of(output) == asked.expected else f"no: {asked.expected}",
        " ".join("skipped" if kernel is None else f"{kernel[0]}x{kernel[1]}" for kernel in pyramid.kernels),
        ", ".join(map(str, pyramid.visual_tokens)),
        f"{100 * saved:.0f} %",
        f"{output.metrics.time_to_first_token or 0:.2f} s",
    )


if __name__ == "__main__":
    sys.exit(main())
