"""`python -m dpn_rt.train_routers`: a LLaVA checkpoint and conversations to a DPN checkpoint with trained routers.

Exit codes: 0 trained, 1 an error in the checkpoint, the data or the output, 2 an error in the command line, 130
interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from dpn_rt.model.reduction.pooling_config import PoolingFunction, RouterVersion
from dpn_rt.schema.weights import TORCH_DTYPES
from dpn_rt.terminal import check_text, count, escape_output, exit_status, file_failed, whole_number
from dpn_rt.training.options import MAX_LENGTH, WORK, LossOptions, Part, RouterOptions, RunOptions, TrainOptions

RUN, LOSS = RunOptions(), LossOptions()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    escape_output()
    given = _parser().parse_args(arguments)
    return exit_status(
        lambda: _train(given),
        no_memory=lambda: "not enough memory: expected more, or a smaller --batch-size, --recompute or --lora",
        interrupted=lambda: f"interrupted; {_what_is_left(given.output)}",
        system_error=lambda error: file_failed(error, given.output),
    )


def _what_is_left(output: Path) -> str:
    is_saved = any((output / WORK).glob("checkpoint-*"))
    return "the same command with --resume goes on from the last checkpoint" if is_saved else "nothing was saved yet"


def _train(given: argparse.Namespace) -> int:
    check_text(given)
    options = _options(given)
    from dpn_rt.training.run import train  # transformers' Trainer takes seconds to import

    try:
        train(options)
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, of a GPU
            raise MemoryError from error
        raise
    if not given.quiet:
        print(f"{given.output}: trained; python -m dpn_rt.build --checkpoint {given.output} makes an engine of it")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dpn_rt.train_routers",
        description="Train routers in a LLaVA checkpoint, by the published recipe of DPN unless options say otherwise.",
    )
    add = parser.add_argument
    add(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="DIR",
        help="LLaVA in either layout, or a DPN to train further",
    )
    add("--vision-tower", type=Path, metavar="DIR", help="vision tower, for a checkpoint that does not hold one")
    add("--data", type=Path, required=True, metavar="FILE", help="conversations, in LLaVA's JSON")
    add("--image-folder", type=Path, metavar="DIR", help="that names of images in the data are relative to")
    add("--skip-bad-rows", action="store_true", help="leave out rows that cannot be used, in place of an error")
    add(
        "--output", type=Path, required=True, metavar="DIR", help="the checkpoint to write; training/ in it is for work"
    )
    add("--resume", action="store_true", help="go on from the last checkpoint in OUTPUT/training")
    add(
        "--dtype", choices=tuple(TORCH_DTYPES), default="bfloat16", help="of the written weights (default: %(default)s)"
    )
    add("--quiet", action="store_true", help="print no progress bar")
    _add_routers(parser.add_argument_group("routers of a dense checkpoint (a DPN keeps its own)"))
    _add_trained(parser.add_argument_group("what is trained"))
    _add_run(parser.add_argument_group("steps"))
    return parser


def _add_routers(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--pooling-layers",
        type=_layers,
        metavar="7,15,23",
        help="decoder layers that boundaries follow (default: three that divide the decoder into equal stages)",
    )
    group.add_argument(
        "--kernels", type=_kernels, metavar="1x1,1x2,2x2", help="height x width of the experts (this is the default)"
    )
    group.add_argument("--router-version", choices=get_args(RouterVersion), help="default: v1")
    group.add_argument("--pooling-function", choices=get_args(PoolingFunction), help="default: max")


def _add_trained(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--freeze", type=_parts, default=(), metavar="PART[,PART...]",
        help=f"parts that stay as they are: {', '.join(get_args(Part))} (default: none; routers are always trained)",
    )  # fmt: skip
    group.add_argument("--lora", type=count, metavar="RANK", help="train the decoder through LoRA, merged in the end")
    group.add_argument(
        "--routing-weight",
        type=_positive,
        default=LOSS.routing_weight,
        metavar="X",
        help="of the routing loss (default: %(default)s)",
    )
    group.add_argument(
        "--routing-target",
        type=_positive,
        default=LOSS.routing_target,
        metavar="X",
        help="hinge of the routing loss: higher asks for more compression (default: %(default)s)",
    )
    group.add_argument(
        "--least-visual-tokens",
        type=count,
        default=LOSS.least_visual_tokens,
        metavar="N",
        help="experts that would leave fewer are not drawn (default: %(default)s)",
    )


def _add_run(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--epochs", type=_above_0, default=RUN.epochs, metavar="X", help="default: %(default)s")
    add("--max-steps", type=count, metavar="N", help="in place of --epochs")
    add(
        "--batch-size",
        type=count,
        default=RUN.batch_size,
        metavar="N",
        help="samples at a time (default: %(default)s)",
    )
    add(
        "--accumulate",
        type=count,
        default=RUN.accumulate,
        metavar="N",
        help="batches of a step (default: %(default)s)",
    )
    add("--learning-rate", type=_positive, default=RUN.learning_rate, metavar="X", help="default: %(default)s")
    add("--router-learning-rate", type=_positive, metavar="X", help="default: that of the other weights")
    add(
        "--warmup-ratio",
        type=_share,
        default=RUN.warmup_ratio,
        metavar="X",
        help="share of the steps (default: %(default)s)",
    )
    add("--weight-decay", type=_positive, default=RUN.weight_decay, metavar="X", help="default: %(default)s")
    add(
        "--max-length",
        type=count,
        metavar="N",
        help=f"rows of a sample, visual ones too (default: {MAX_LENGTH}, or the model's positions if fewer)",
    )
    add("--bf16", action="store_true", help="mixed precision; weights that are not trained become bfloat16")
    add("--recompute", action="store_true", help="compute activations twice: less memory, more time")
    add(
        "--save-steps",
        type=count,
        default=RUN.save_steps,
        metavar="N",
        help="steps between checkpoints (default: %(default)s)",
    )
    add("--keep", type=count, default=RUN.keep, metavar="N", help="checkpoints that stay (default: %(default)s)")
    add("--log-steps", type=count, default=RUN.log_steps, metavar="N", help="default: %(default)s")
    add(
        "--workers",
        type=whole_number,
        default=RUN.workers,
        metavar="N",
        help="processes that read images (default: %(default)s)",
    )
    add("--seed", type=whole_number, default=RUN.seed, metavar="N", help="default: %(default)s")
    add("--cpu", action="store_true", help="do not use a GPU")


def _options(given: argparse.Namespace) -> TrainOptions:
    values = dict(vars(given))

    def taken(kind: type[RouterOptions] | type[LossOptions] | type[RunOptions]) -> dict[str, object]:
        return {name: values.pop(name) for name in kind.__dataclass_fields__}

    routers = RouterOptions(**taken(RouterOptions))  # type: ignore[arg-type]
    loss, run = LossOptions(**taken(LossOptions)), RunOptions(**taken(RunOptions))  # type: ignore[arg-type]
    return TrainOptions(**values, routers=routers, loss=loss, run=run)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r:.100}: expected a number, 0 or more")
    return value


def _above_0(text: str) -> float:
    value = _positive(text)
    if not value:
        raise argparse.ArgumentTypeError(f"{text!r:.100}: expected a number above 0")
    return value


def _share(text: str) -> float:
    value = _positive(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text!r:.100}: expected a share from 0 to 1")
    return value


def _layers(text: str) -> tuple[int, ...]:
    return tuple(whole_number(part) for part in text.split(","))


def _kernels(text: str) -> tuple[tuple[int, int], ...]:
    return tuple(_kernel(part) for part in text.split(","))


def _kernel(text: str) -> tuple[int, int]:
    height, separator, width = text.partition("x")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r:.100}: expected height x width, such as 1x2")
    return count(height), count(width)


def _parts(text: str) -> tuple[str, ...]:
    known = get_args(Part)
    for part in text.split(","):
        if part not in known:
            raise argparse.ArgumentTypeError(f"{part!r:.100}: expected some of {', '.join(known)}")
    return tuple(text.split(","))


if __name__ == "__main__":
    sys.exit(main())
