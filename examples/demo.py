"""Build an engine from a checkpoint and ask it about photographs: the job of `make demo`.

The checkpoint here is small and its weights are random, so the answers are not words; routes, rows and times are real.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from dpn_rt import LLM, SamplingParams
from dpn_rt.builders.native import build_engine
from dpn_rt.outputs import RequestOutput
from examples.random_checkpoint import write_checkpoint

IMAGES = Path(__file__).parent / "images"
QUESTIONS = [
    ("cat.jpg", "What animal is this?"),
    ("coffee.jpg", "How many cups are on the table, and what is written on them?"),
    ("astronaut.jpg", "What is the name on the suit?"),
    ("rocket.jpg", "Is there a rocket?"),
]


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        start = time.perf_counter()
        checkpoint = write_checkpoint(Path(directory) / "checkpoint")
        engine = build_engine(checkpoint, Path(directory) / "engine", dtype="float32")
        print(f"checkpoint written and engine built in {time.perf_counter() - start:.1f} s")
        llm = LLM(engine.path)
        conversations = [
            [{"role": "user", "content": [{"type": "image", "image": IMAGES / name}, {"type": "text", "text": text}]}]
            for name, text in QUESTIONS
        ]
        start = time.perf_counter()
        outputs = llm.chat(conversations, SamplingParams(temperature=0, max_tokens=12))
        print(f"{len(outputs)} questions answered in one batch in {time.perf_counter() - start:.2f} s\n")
        for (name, question), output in zip(QUESTIONS, outputs, strict=True):
            print(report(name, question, output))


def report(image: str, question: str, output: RequestOutput) -> str:
    pyramid = output.pyramid
    route = ", ".join("skipped" if kernel is None else f"{kernel[0]}x{kernel[1]}" for kernel in pyramid.kernels)
    return "\n".join(
        [
            f"{image}: {question}",
            f"  answer                  {output.outputs[0].text!r} (random weights)",
            f"  route                   {route}",
            f"  visual tokens per stage {', '.join(map(str, pyramid.visual_tokens))}",
            f"  KV rows per stage       {', '.join(map(str, pyramid.kv_lengths))}",
            f"  first token after       {output.metrics.time_to_first_token or 0:.3f} s\n",
        ]
    )


if __name__ == "__main__":
    main()
