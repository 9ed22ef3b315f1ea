"""`python -m dpn_rt.build`: a checkpoint directory to an engine directory.

Exit codes: 0 built, 1 an error in the checkpoint or the output, 2 an error in the command line, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, TypeVar, get_args

from dpn_rt.errors import ConfigError, DpnError
from dpn_rt.format.plans import BuiltPlans, Flavor, PlanLimits
from dpn_rt.schema.dtypes import DType, Quantize
from dpn_rt.schema.files import real_path
from dpn_rt.terminal import check_text, ending_signals, escape_output, exit_status, file_failed, output_failed

if TYPE_CHECKING:
    from tqdm import tqdm

    from dpn_rt.format.config import ModelConfig
    from dpn_rt.format.engine_dir import EngineDir

T = TypeVar("T")

DEFAULT_PLAN_ROWS = 2048
"""Rows of a sequence in a plan's caches: 1 GB per sequence of a 7B model."""
DEFAULT_PLAN_BATCH = 8
"""Sequences that run together."""
NO_MEMORY = (
    "not enough memory to build an engine: expected room for twice its largest weight and about 0.5 GB, for the "
    "largest shard of a checkpoint in .bin files, and for the whole model with --report "
    "(is there a limit, such as that of ulimit -v?)"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    escape_output()
    options = _parse(arguments)
    engines: list[EngineDir] = []

    def interrupted() -> str:
        left = f"{options.output} is built, without its report" if engines else "nothing was left behind"
        return f"interrupted; {left}"

    return exit_status(
        lambda: _build_and_report(options, engines.append),
        no_memory=lambda: f"{options.checkpoint}: {NO_MEMORY}",
        interrupted=interrupted,
        system_error=lambda error: file_failed(error, options.checkpoint),
    )


def _build_and_report(options: argparse.Namespace, built: Callable[[EngineDir], None]) -> int:
    """The command; `built` is told of the engine before there is its report."""
    check_text(options)
    if options.report is not None:
        _check_report_file(options)
    with _one_interrupt():
        engine = _build(options)
        built(engine)
        if options.report is not None:
            try:
                _report(options, engine)
            except DpnError as error:
                raise type(error)(f"{options.output} is built, without its report: {error}") from error
    if not options.quiet:
        size = sum(record.bytes for record in engine.files.values())
        try:
            print(f"{options.output}: {size / 1e9:.2f} GB, {_describe(engine)}", flush=True)
        except OSError as error:
            output_failed(error)  # told, but the engine is built
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dpn_rt.build", description="Build an engine directory from a LLaVA or DPN checkpoint."
    )
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="DIR", help="original LLaVA/DPN layout, or Hugging Face LLaVA"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the engine directory to write")
    parser.add_argument(
        "--vision-tower", type=Path, metavar="DIR", help="CLIP vision tower, for a checkpoint that does not hold one"
    )
    parser.add_argument(
        "--dtype",
        choices=get_args(DType),
        help="of the weights (default: float32 for a float32 checkpoint, else bfloat16)",
    )
    parser.add_argument(
        "--reduce",
        metavar="SPEC",
        help="training-free reduction by default, such as fastv:k=2,ratio=0.5",
    )
    parser.add_argument(
        "--quantize",
        choices=get_args(Quantize),
        help="int8: linear layers in integers of 8 bits; int4: those of the decoder in 4, others in 8 (CPUs alone); "
        "fp8: in floats of 8 bits, for GPUs from capability 8.9 on (default: int8 for a W8A8 checkpoint, else none)",
    )
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help="write the error of each quantised layer, on a few prompts, as JSON; needs memory for the whole model",
    )
    _add_backend(parser)
    parser.add_argument("--list-models", action=_ListModels, help="print the models that are supported, and end")
    parser.add_argument("--force", action="store_true", help="replace an existing engine")
    parser.add_argument("--quiet", action="store_true", help="print errors only")
    return parser.parse_args(arguments)


class _ListModels(argparse.Action):
    """Prints the tables of supported models in place of a build."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        """Takes what argparse gives to every action."""
        from dpn_rt.builders.supported import supported_models

        try:
            print(supported_models(), flush=True)
        except OSError as error:
            parser.exit(output_failed(error))
        parser.exit()


def _add_backend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend", choices=("native", "tensorrt"), default="native", help="what runs the engine (default: native)"
    )
    group = parser.add_argument_group("with --backend tensorrt (docs/tensorrt.md)")
    group.add_argument("--tensorrt-flavor", choices=get_args(Flavor), help="TensorRT-RTX, or TensorRT (default: rtx)")
    group.add_argument(
        "--sm", type=_list_of(str), metavar="86,89", help="compute capabilities of the GPUs to build for"
    )
    group.add_argument("--max-batch", type=int, metavar="N", help="sequences that run together (default: 8)")
    group.add_argument(
        "--max-prefill-batch", type=int, metavar="N", help="sequences that are prefilled together (default: up to 4)"
    )
    group.add_argument(
        "--max-rows",
        type=_list_of(int),
        metavar="N[,N...]",
        help="rows of one sequence, one number or one per stage (default: the model's length, at most 2048)",
    )


def _list_of(kind: type[T]) -> Callable[[str], list[T]]:
    def items(text: str) -> list[T]:
        try:
            return [kind(item) for item in text.split(",")]  # type: ignore[call-arg]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r:.100}: expected whole numbers separated by commas") from None

    return items


def _plan_maker(options: argparse.Namespace, note: Callable[[str], None]) -> Callable[[ModelConfig], BuiltPlans] | None:
    if options.backend == "native":
        _check_native(options)
        return None
    from dpn_rt.builders.tensorrt.plans import build_plans

    def make_plans(model: ModelConfig) -> BuiltPlans:
        num_stages = len(model.stage_layers)
        rows: list[int] = options.max_rows or [min(DEFAULT_PLAN_ROWS, model.decoder.max_position_embeddings)]
        batch = DEFAULT_PLAN_BATCH if options.max_batch is None else options.max_batch
        prefill_batch = min(4, batch) if options.max_prefill_batch is None else options.max_prefill_batch
        stage_rows = tuple(rows * num_stages if len(rows) == 1 else rows)
        limits = PlanLimits(batch, prefill_batch, stage_rows)
        flavor: Flavor = options.tensorrt_flavor or "rtx"
        return build_plans(model, flavor, options.sm or [], limits, lambda name: note(f"built {name}"))

    return make_plans


def _check_native(options: argparse.Namespace) -> None:
    """Refuse options that would have no effect.

    Raises:
        ConfigError: naming the first of them.
    """
    for name in ("tensorrt_flavor", "sm", "max_batch", "max_prefill_batch", "max_rows"):
        if getattr(options, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')}: expected --backend tensorrt as well, which it is for")


def _build(options: argparse.Namespace) -> EngineDir:
    # Imported here: --help and a wrong option should not wait for torch.
    from tqdm import tqdm

    from dpn_rt.builders.native import build_engine

    quiet: bool = options.quiet
    with contextlib.ExitStack() as stack:
        bar: tqdm | None = None

        def show_progress(written: int, total: int) -> None:
            nonlocal bar
            if bar is None:  # only at the first byte, so that earlier errors are not printed after an empty bar
                bar = tqdm(total=total, desc="building", unit="B", unit_scale=True, disable=quiet)
                stack.enter_context(bar)
            bar.update(written)

        def show_note(line: str) -> None:
            if not quiet:
                print(f"note: {line}", file=sys.stderr)

        return build_engine(
            options.checkpoint,
            options.output,
            dtype=options.dtype,
            vision_tower=options.vision_tower,
            force=options.force,
            progress=show_progress,
            note=show_note,
            make_plans=_plan_maker(options, show_note),
            reduce=options.reduce,
            quantize=options.quantize,
            check=partial(_check_report_has_layers, options),
        )


def _check_report_file(options: argparse.Namespace) -> None:
    """Refuse a file that could not be written, that the engine would not be one with, or that is part of a checkpoint,
    before anything is built."""
    from dpn_rt.evaluate.writing import check_target

    report: Path = options.report
    places = {real_path(report), real_path(report.parent) / report.name}  # the second one may be a link elsewhere
    for name in ("output", "checkpoint", "vision_tower"):
        directory: Path | None = getattr(options, name)
        if directory is not None and any(place.is_relative_to(real_path(directory)) for place in places):
            option = f"--{name.replace('_', '-')} {directory}"
            raise ConfigError(f"--report {report}: is within {option}, expected a place beside it")
    if not report.parent.is_dir():
        raise ConfigError(f"--report: {report.parent}: not a directory")
    check_target(report)


def _check_report_has_layers(options: argparse.Namespace, model: ModelConfig) -> None:
    """Refuse `--report` of an engine that would have nothing to report."""
    if options.report is not None and model.quantize == "none":
        raise ConfigError(
            f"--report {options.report}: no layer of this engine is quantised, expected --quantize int8, int4 or fp8"
        )


def _report(options: argparse.Namespace, engine: EngineDir) -> None:
    """Write `--report`; a line names the layer with the largest error."""
    from dpn_rt.evaluate.writing import write_whole
    from dpn_rt.reference.model import EagerDpn
    from dpn_rt.reference.modules import sees_images
    from dpn_rt.reference.quantization_report import quantization_report
    from dpn_rt.schema.weights import TORCH_DTYPES

    dense = EagerDpn.from_checkpoint(
        options.checkpoint,
        dtype=TORCH_DTYPES[engine.model.dtype],
        vision_tower=options.vision_tower,
        with_images=sees_images(engine.model),
    )
    found = quantization_report(dense, engine)
    write_whole(options.report, (json.dumps(found, indent=1) + "\n").encode())
    if not options.quiet:
        worst = found["layers"][0]
        print(f"{options.report}: {len(found['layers'])} layers, at most {worst['error']:.1%} off ({worst['module']})")


def _describe(engine: EngineDir) -> str:
    model = engine.model
    stages = len(model.stage_layers)
    plural = "s" if stages > 1 else ""
    pooling = f"{model.reduction.summary}, {stages} stage{plural}" if model.reduction.needs_grid else "dense"
    tower = model.vision.summary if model.vision else "image embeddings only"
    plans = "" if engine.plans is None else f", TensorRT plans for {', '.join(engine.plans.compute_capabilities)}"
    form = model.dtype if model.quantize == "none" else f"{model.quantize} and {model.dtype}"
    return f"{form}, {model.decoder.num_layers} layers, {pooling}, {tower}{plans}"


@contextlib.contextmanager
def _one_interrupt() -> Iterator[None]:
    """Turn the first signal of `ending_signals` into KeyboardInterrupt; ignore later ones, which would cut the cleanup
    short."""
    signals = ending_signals()
    received: list[int] = []

    def ignore(number: int, frame: FrameType | None) -> None:
        pass

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for later in signals:
            signal.signal(later, ignore)  # SIG_IGN prints a line about a signal that has come already
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, interrupt) for number in signals}
    try:
        yield
    except Exception as error:
        if received:  # a library that was interrupted says so by an error of its own
            raise KeyboardInterrupt from error
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
