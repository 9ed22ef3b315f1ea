"""The trained model of `examples/tiny_dpn`: its answers on the device beside those on the CPU, in the same dtype."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from benchmarks.gpu_quick.record import NotHereError, Recorder
from benchmarks.gpu_quick.settings import Settings
from dpn_rt import LLM, SamplingParams
from dpn_rt.builders.native import build_engine

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "examples" / "tiny_dpn" / "checkpoint"
QUESTIONS = ROOT / "build" / "gpu-quick-questions"
"""Questions that were drawn beforehand, for machines without the packages that draw them."""
MAX_TOKENS = 8


def run(settings: Settings, record: Recorder) -> None:
    with tempfile.TemporaryDirectory() as folder:
        questions = question_file(Path(folder), settings.scenes)
        rows = [json.loads(line) for line in questions.read_text(encoding="utf-8").splitlines()][: 10 * settings.scenes]
        engine = build_engine(CHECKPOINT, Path(folder) / "engine", dtype="bfloat16").path
        on_cpu = ask(LLM(engine, device="cpu"), questions.parent, rows)
        on_device = ask(LLM(engine, device=settings.device, gpu_memory_utilization=0.2), questions.parent, rows)
    right = {name: sum(a == row["answer"] for a, row in zip(found, rows, strict=True)) for name, found in
             (("cpu", on_cpu), ("device", on_device))}  # fmt: skip
    others = [
        {"question": row["text"], "expected": row["answer"], "cpu": a, "device": b}
        for row, a, b in zip(rows, on_cpu, on_device, strict=True)
        if a != b
    ]
    record.put(questions=len(rows), right=right, others=others)
    record.say(
        f"{len(rows)} questions: {right['cpu']} right on the CPU, {right['device']} on the device; "
        f"{len(others)} answers differ"
    )
    for other in others[:5]:
        record.say(f"  {other}")


def question_file(folder: Path, scenes: int) -> Path:
    """`questions.jsonl` with its pictures: drawn beforehand, or now."""
    if (QUESTIONS / "questions.jsonl").exists():
        return QUESTIONS / "questions.jsonl"
    try:
        from examples.tiny_dpn.export_questions import export
    except ModuleNotFoundError as error:
        raise NotHereError(
            f"questions cannot be drawn without {error.name}: expected `python -m examples.tiny_dpn.export_questions "
            f"{QUESTIONS.relative_to(ROOT)} --scenes {scenes}` beforehand, on a machine that has it"
        ) from error
    return export(folder, scenes)


def ask(llm: LLM, folder: Path, rows: list[dict[str, str]]) -> list[str]:
    """Greedy answers."""
    conversations = [
        [{"role": "user", "content": [{"type": "image", "image": folder / "images" / row["image"]},
                                      {"type": "text", "text": row["text"]}]}]
        for row in rows
    ]  # fmt: skip
    outputs = llm.chat(conversations, SamplingParams(temperature=0, max_tokens=MAX_TOKENS))
    return [output.outputs[0].text.strip() for output in outputs]
