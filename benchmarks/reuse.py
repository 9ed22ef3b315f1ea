"""Time to the first token of a first, a second and a third question about one image, over HTTP.

python -m benchmarks.reuse --engine DIR --scenes 40

Every scene is new to the server. Its questions are asked one after another, in random order and streaming, so that no
request waits for another one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
from pathlib import Path

import numpy as np

from benchmarks.load.http_questions import Question
from benchmarks.load.loops import closed_loop
from benchmarks.load.server_process import serving
from dpn_rt.terminal import escape_output
from examples.tiny_dpn import data

QUESTIONS = 3
WARM_UP_SCENES = 3


def measure(engine: Path, scenes: int, seed: int) -> list[list[float]]:
    """Seconds to the first token, `[scenes][QUESTIONS]`."""
    draw = random.Random(seed)
    extra = {"stream": True, "stream_options": {"include_usage": True}}
    times: list[list[float]] = []
    with serving(engine) as (url, _):
        for index in range(WARM_UP_SCENES + scenes):
            sample = data.sample("test", index)
            asked = [Question(sample.image, q.text) for q in draw.sample(sample.questions, QUESTIONS)]
            round_ = asyncio.run(closed_loop(url, [q.body(engine.resolve().name, **extra) for q in asked], 1))
            failed = [timing.error for timing in round_.timings if timing.error]
            if failed:
                raise RuntimeError(failed[0])
            times.append([timing.first for timing in round_.timings])
    return times[WARM_UP_SCENES:]


def main() -> int:
    escape_output()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    times = 1000 * np.asarray(measure(options.engine, options.scenes, options.seed))
    ratios = times[:, 0] / times[:, 1]
    low, high = np.percentile(ratios, [5, 95])
    result = {
        "scenes": options.scenes,
        "first_token_ms_median": [round(float(ms), 2) for ms in np.median(times, axis=0)],
        "first_over_second": {"median": float(np.median(ratios)), "p5": float(low), "p95": float(high)},
    }
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
