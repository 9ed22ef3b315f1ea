"""Train the small DPN and its twins: tower, dense base, then dense, static and DPN from that base.

python -m examples.tiny_dpn.train                                   # everything, from nothing
python -m examples.tiny_dpn.train --phase dpn --base CHECKPOINT     # one variant, from a dense checkpoint

A killed run continues from its last saved step when the command is given again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from dpn_rt.errors import DpnError
from dpn_rt.reference import EagerDpn
from dpn_rt.terminal import escape_output
from examples.tiny_dpn.attention import use_training_attention
from examples.tiny_dpn.beginning import start_awake, start_on_a_grid, start_pooling_late
from examples.tiny_dpn.encoding import MEAN, STD, Encoder
from examples.tiny_dpn.model import model_config
from examples.tiny_dpn.phase import Trainer, TrainingError
from examples.tiny_dpn.recipe import PHASES, Phase, PhaseName
from examples.tiny_dpn.scenes import SIDE
from examples.tiny_dpn.tokenizer import train_tokenizer, write_tokenizer

DEFAULT_OUTPUT = Path("runs/tiny_dpn")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    escape_output()
    options = _parser().parse_args(arguments)
    phases = [PHASES[name] for name in PHASES if not options.phase or name in options.phase]
    try:
        check_writable(options.output)
        for phase in phases:
            run_phase(phase, options.output, base=options.base, device=options.device, seed=options.seed)
    except (DpnError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last saved step", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m examples.tiny_dpn.train", description="Train the small DPN.")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, metavar="DIR", help="default %(default)s")
    parser.add_argument("--phase", action="append", choices=list(PHASES), help="only these (repeat); default all")
    parser.add_argument("--base", type=Path, metavar="DIR", help="dense checkpoint that the variants start from")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def check_writable(folder: Path) -> None:
    """Fail at the start rather than after an hour of training.

    Raises:
        TrainingError: the folder is not writable.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise TrainingError(f"--output {folder}: cannot write there: {error.strerror or error}") from error


def run_phase(phase: Phase, output: Path, *, base: Path | None = None, device: str = "cpu", seed: int = 0) -> None:
    """Train one phase and write its checkpoint.

    Raises:
        TrainingError: the phase that this one starts from has not been trained.
        DpnError: `base` is not a valid checkpoint.
    """
    tokenizer = train_tokenizer()
    torch.manual_seed(seed)
    model = EagerDpn(model_config(phase.variant, tokenizer.get_vocab_size()))
    start_on_a_grid(model)
    start_awake(model)
    start_pooling_late(model)
    model.to(device)
    use_training_attention(model)
    trainer = Trainer(model, phase, Encoder(tokenizer, phase.router_token), output / phase.name, seed)
    if phase.start is not None and not trainer.state_file.is_file():
        _start_from(trainer, phase.start, output, base)
    trainer.run()
    save_checkpoint(model, output / phase.name / "checkpoint")


def _start_from(trainer: Trainer, start: PhaseName, output: Path, base: Path | None) -> None:
    if base is not None and start == "base":
        trainer.load_weights(EagerDpn.from_checkpoint(base, dtype=torch.float32).state_dict())
        return
    state = output / start / "state.pt"
    if not state.is_file():
        raise TrainingError(f"phase {trainer.phase.name} starts from phase {start}, but {state} does not exist")
    trainer.load_state(state)


def save_checkpoint(model: EagerDpn, path: Path) -> None:
    """Write the published layout in bfloat16; routers stay float32, the dtype in which they compute."""
    weights = EagerDpn(model.config, torch.bfloat16)
    weights.load_state_dict(model.state_dict())
    with tempfile.TemporaryDirectory() as directory:
        files = [*write_tokenizer(Path(directory)), _write_preprocessor(Path(directory))]
        weights.save_checkpoint(path, files)


def _write_preprocessor(folder: Path) -> Path:
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": {"height": SIDE, "width": SIDE},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": MEAN,
        "image_std": STD,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": SIDE},
    }
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    sys.exit(main())
