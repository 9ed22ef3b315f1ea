"""`python -m dpn_rt.builders.tensorrt_llm`: an engine directory to TensorRT-LLM checkpoints, and engines if asked.

Exit codes: 0 written, 1 an error in the engine, the output or the package, 2 an error in the command line.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dpn_rt.builders.tensorrt_llm.engines import build_stages
from dpn_rt.builders.tensorrt_llm.export import export_checkpoints
from dpn_rt.errors import DpnError
from dpn_rt.format.engine_dir import EngineDir
from dpn_rt.format.plans import PlanLimits, check_limits
from dpn_rt.terminal import escape_output


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    escape_output()
    parser = argparse.ArgumentParser(prog="python -m dpn_rt.builders.tensorrt_llm", description=__doc__)
    parser.add_argument("--engine", type=Path, required=True, metavar="DIR", help="as dpn_rt.build made it")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="gets checkpoints/ and engines/")
    parser.add_argument("--build", action="store_true", help="build engines too; needs tensorrt_llm and a GPU")
    parser.add_argument("--max-batch", type=int, default=8, metavar="N")
    parser.add_argument("--max-rows", type=int, default=2048, metavar="N", help="rows of one sequence in any stage")
    options = parser.parse_args(arguments)
    try:
        model = EngineDir.open(options.engine).model
        num_stages = len(model.stage_layers)
        rows = min(options.max_rows, model.decoder.max_position_embeddings)
        limits = PlanLimits(options.max_batch, options.max_batch, (rows,) * num_stages)
        check_limits(limits, num_stages, model.decoder.max_position_embeddings)
        checkpoints = export_checkpoints(EngineDir.open(options.engine, verify=False), options.output / "checkpoints")
        built = build_stages(checkpoints, options.output / "engines", limits) if options.build else []
    except DpnError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for directory in (*checkpoints, *built):
        print(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
