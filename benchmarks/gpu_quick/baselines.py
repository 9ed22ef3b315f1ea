"""transformers (dense) and the eager DPN beside the runtime, round by round; the report is that of `latency.py`."""

from __future__ import annotations

from benchmarks import latency
from benchmarks.comparison.measure import measure
from benchmarks.comparison.report import print_table
from benchmarks.gpu_quick.record import Recorder
from benchmarks.gpu_quick.settings import Settings

ROUNDS, STEPS = 3, 8


def run(settings: Settings, record: Recorder) -> None:
    batches = [str(batch) for batch in settings.baseline_batches]
    arguments = ["--shape", settings.shape, "--device", settings.device, "--dtype", settings.dtype, "--batch", *batches]
    arguments += [
        "--mix",
        "40-40-20",
        "--repeats",
        str(min(ROUNDS, settings.rounds)),
        "--tokens",
        str(min(STEPS, settings.tokens)),
    ]
    report = measure(latency.parse_arguments([*arguments, "--subjects", "transformers", "eager", "dpn_rt"]))
    record.put(report=report)
    print_table(report)
    for row in report["rows"]:
        prefill, step = (row[name]["median"] * 1e3 for name in ("prefill", "decode_step"))
        faster = [
            f"{ratio['prefill']['median']:.2f}x and {ratio['decode_step']['median']:.2f}x {other}"
            for other, ratio in row["ratios"].items()
            if other.startswith(("transformers", "eager")) and row["subject"] == "dpn_rt"
        ]
        name = f"{row['subject']} {row['routes']} x{row['batch']}"
        record.say(f"{name}: prefill {prefill:.2f}, decode {step:.2f} ms" + "".join(f", {each}" for each in faster))
