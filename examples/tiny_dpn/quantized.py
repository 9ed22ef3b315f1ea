"""What 8 and 4 bits cost: answers of quantised engines beside those of the same checkpoint in bfloat16.

python -m examples.tiny_dpn.quantized --checkpoint examples/tiny_dpn/checkpoint --output docs/tiny_dpn
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import get_args

from dpn_rt import LLM
from dpn_rt.builders.native import build_engine
from dpn_rt.errors import DpnError
from dpn_rt.evaluate.writing import write_whole
from dpn_rt.format.weight_spec import weight_spec
from dpn_rt.schema.dtypes import Quantize
from dpn_rt.terminal import escape_output
from examples.tiny_dpn.answers import Answer, ask_runtime
from examples.tiny_dpn.data import LEVELS, Sample, sample
from examples.tiny_dpn.metrics import Group, group
from examples.tiny_dpn.phase import TrainingError
from examples.tiny_dpn.report import percent, table
from examples.tiny_dpn.train import check_writable


@dataclass(frozen=True, slots=True)
class Row:
    """One engine's answers."""

    quantize: Quantize
    num_bytes: int
    """Of its weights."""
    overall: Group
    levels: dict[str, Group]
    same_answers: float
    """Share of questions with the same tokens as in bfloat16."""
    same_routes: float
    """Share of questions with the same route as in bfloat16."""
    lost: int
    """Questions that bfloat16 answers right and this engine does not."""
    won: int
    """Questions that this engine answers right and bfloat16 does not."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    escape_output()
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="python -m examples.tiny_dpn.quantized", description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="for the table")
    parser.add_argument("--scenes", type=int, default=200, metavar="N", help="ten questions each (default 200)")
    options = parser.parse_args(given)
    try:
        check_writable(options.output)
        rows = compare(options.checkpoint, [sample("test", index) for index in range(options.scenes)])
    except (DpnError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    result = {
        "command": shlex.join(["python", "-m", "examples.tiny_dpn.quantized", *given]),
        "versions": {name: version(name) for name in ("dpn_rt", "torch")},
        "rows": [asdict(row) for row in rows],
    }
    write_whole(options.output / "quantized.json", (json.dumps(result, indent=1) + "\n").encode())
    write_whole(options.output / "quantized.md", markdown(rows).encode())
    print(markdown(rows))
    return 0


def compare(checkpoint: Path, samples: Sequence[Sample]) -> list[Row]:
    """The same questions through an engine of each form."""
    rows: list[Row] = []
    expected: list[Answer] = []
    with tempfile.TemporaryDirectory() as directory:
        for quantize in get_args(Quantize):
            engine = build_engine(checkpoint, Path(directory) / quantize, dtype="bfloat16", quantize=quantize)
            answers = ask_runtime(LLM(engine.path), samples, quantize)
            expected = expected or answers
            pairs = list(zip(answers, expected, strict=True))
            rows.append(
                Row(
                    quantize=quantize,
                    num_bytes=sum(spec.num_bytes for spec in weight_spec(engine.model).values()),
                    overall=group(answers),
                    levels={level: group([each for each in answers if each.level == level]) for level in LEVELS},
                    same_answers=sum(a.token_ids == b.token_ids for a, b in pairs) / len(pairs),
                    same_routes=sum(a.route == b.route for a, b in pairs) / len(pairs),
                    lost=sum(b.is_right and not a.is_right for a, b in pairs),
                    won=sum(a.is_right and not b.is_right for a, b in pairs),
                )
            )
    return rows


def markdown(rows: Sequence[Row]) -> str:
    """One line an engine."""
    header = ["weights", "MB", "right", *LEVELS, "same answers", "same routes", "lost, won", "FLOPs / dense"]
    lines = [
        [
            "bfloat16" if row.quantize == "none" else row.quantize,
            f"{row.num_bytes / 1e6:.1f}",
            percent(row.overall.accuracy),
            *(percent(row.levels[level].accuracy) for level in LEVELS),
            percent(row.same_answers),
            percent(row.same_routes),
            f"{row.lost}, {row.won}",
            f"{row.overall.flops_ratio:.3f}",
        ]
        for row in rows
    ]
    return table(header, lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
