"""One training from its options to the written checkpoint."""

from __future__ import annotations

import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from transformers import TrainingArguments, set_seed

from dpn_rt.errors import TrainingError
from dpn_rt.model.reduction.pooling_config import PoolingConfig
from dpn_rt.schema.text import few
from dpn_rt.schema.weights import TORCH_DTYPES
from dpn_rt.training.checkpoints import last_checkpoint
from dpn_rt.training.collator import collate
from dpn_rt.training.optional import need
from dpn_rt.training.options import MAX_LENGTH, RunOptions, TrainOptions
from dpn_rt.training.rows import BadRow, Conversation, read_conversations
from dpn_rt.training.samples import Conversations
from dpn_rt.training.settings import settings_of
from dpn_rt.training.start import Start, cast_parameters, load_start
from dpn_rt.training.trained import add_lora, freeze
from dpn_rt.training.trainer import RouterTrainer, has_finite_weights

CONFIG = "config.json"


def train(options: TrainOptions) -> None:
    """Train routers and write the checkpoint.

    Raises:
        TrainingError: the data, the options or the files of an earlier run are wrong, or a package is missing.
        DpnError: the checkpoint is wrong, as the build command says it.
        OSError: the output cannot be written.
    """
    need("accelerate", "training")
    if options.lora is not None:
        need("peft", f"--lora {options.lora}")
    last = _check_output(options)
    with _work_directory(options), tempfile.TemporaryDirectory(prefix="dpn_rt-train-") as directory:
        conversations, bad_rows = read_conversations(options.data, options.image_folder)
        _report_bad_rows(bad_rows, options)
        set_seed(options.run.seed)
        start = load_start(
            options.checkpoint, options.vision_tower, options.routers, options.loss, Path(directory), _note
        )
        merge = _choose_trained(start, options)
        trainer = _make_trainer(start, conversations, options)
        try:
            trainer.train(resume_from_checkpoint=last)
        except TrainingError as error:  # torch puts the trace of a process that reads images before its message
            raise TrainingError(str(error).rpartition(f"{TrainingError.__name__}: ")[2].rstrip()) from error
        merge()
        model = start.model.cpu().eval()
        cast_parameters(model, TORCH_DTYPES[options.dtype], frozen_only=False)
        if not has_finite_weights(model):
            raise TrainingError(
                f"the trained weights are not finite in {options.dtype}, and were not written: expected a lower "
                "--learning-rate, or --dtype bfloat16"
            )
        model.save_checkpoint(options.output, start.files)


def _check_output(options: TrainOptions) -> str | None:
    """Refuse an output that holds anything else; the checkpoint to go on from, None for a new training."""
    output = options.output
    if (output / CONFIG).is_file():
        raise TrainingError(
            f"--output {output}: holds a checkpoint, expected a directory that does not exist or is empty"
        )
    last = last_checkpoint(options.work, _note)
    if options.resume and last is None:
        raise TrainingError(f"--resume: {options.work} has no checkpoint of a training to go on from")
    if not options.resume and output.is_dir() and not _is_empty(options):
        more = ", or --resume to go on from its last checkpoint" if last else ""
        raise TrainingError(
            f"--output {output}: is not empty, expected a directory that does not exist or is empty{more}"
        )
    return None if last is None else str(last)


def _is_empty(options: TrainOptions) -> bool:
    """Whether an output has nothing but what a training leaves that was killed before its first checkpoint."""
    work = options.work
    return all(path == work and path.is_dir() and not any(path.iterdir()) for path in options.output.iterdir())


@contextmanager
def _work_directory(options: TrainOptions) -> Iterator[None]:
    """Make the directory of Trainer's checkpoints. If the training ends without one, what was made goes again, so that
    the command may be given once more."""
    made = [path for path in (options.work, *options.work.parents) if not path.exists()]
    options.work.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path in made:
            with suppress(OSError):  # those that are not empty stay
                path.rmdir()
        raise


def _report_bad_rows(bad_rows: Sequence[BadRow], options: TrainOptions) -> None:
    if not bad_rows:
        return
    found = f"{options.data}: {len(bad_rows):,} rows cannot be used: {few([str(row) for row in bad_rows], '; ')}"
    if not options.skip_bad_rows:
        raise TrainingError(f"{found}: mend them, or leave them out by --skip-bad-rows")
    _note(found)


def _note(line: str) -> None:
    print(f"note: {line}", file=sys.stderr)


def _choose_trained(start: Start, options: TrainOptions) -> Callable[[], None]:
    """Freeze weights and add LoRA; what merges it in the end."""
    merge: Callable[[], None] = lambda: None  # noqa: E731
    if options.lora is None:
        freeze(start.model, options.freeze)
    else:
        merge = add_lora(start.model, options.lora, options.freeze)
    if options.run.recompute:
        start.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    if options.run.bf16:
        cast_parameters(start.model, torch.bfloat16, frozen_only=True)
    return merge


def _make_trainer(start: Start, conversations: list[Conversation], options: TrainOptions) -> RouterTrainer:
    run = options.run
    max_length = _max_length(start, run)
    arguments = _arguments(options, len(conversations))
    if arguments.n_gpu > 1:
        raise TrainingError(
            f"{arguments.n_gpu} GPUs in one process: expected CUDA_VISIBLE_DEVICES with one of them, or torchrun"
        )
    pooling = start.model.config.reduction
    assert isinstance(pooling, PoolingConfig)
    router_rate = run.learning_rate if run.router_learning_rate is None else run.router_learning_rate
    return RouterTrainer(
        start.model,
        router_rate,
        settings_of(options, pooling, max_length, router_rate, len(conversations)),
        args=arguments,
        train_dataset=Conversations(
            conversations, start.processor, max_length, _note if options.skip_bad_rows else None
        ),
        data_collator=collate,
    )


def _max_length(start: Start, run: RunOptions) -> int:
    positions = start.model.config.decoder.max_position_embeddings
    if run.max_length is None:
        return min(MAX_LENGTH, positions)
    if run.max_length > positions:
        raise TrainingError(f"--max-length {run.max_length}: the model has {positions} positions, expected no more")
    return run.max_length


def _arguments(options: TrainOptions, num_samples: int) -> TrainingArguments:
    run = options.run
    return TrainingArguments(
        output_dir=str(options.work),
        num_train_epochs=run.epochs,
        max_steps=-1 if run.max_steps is None else run.max_steps,
        per_device_train_batch_size=run.batch_size,
        gradient_accumulation_steps=run.accumulate,
        learning_rate=run.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(run.warmup_ratio * num_steps(run, num_samples)),
        weight_decay=run.weight_decay,
        bf16=run.bf16,
        logging_steps=run.log_steps,
        save_steps=run.save_steps,
        save_total_limit=run.keep,
        seed=run.seed,
        dataloader_num_workers=run.workers,
        disable_tqdm=options.quiet,
        use_cpu=run.cpu,
        report_to=[],
        remove_unused_columns=False,
        ddp_find_unused_parameters=True,  # a batch without images runs no router
    )


def num_steps(run: RunOptions, num_samples: int) -> int:
    """Steps of the optimiser."""
    if run.max_steps is not None:
        return run.max_steps
    batches = math.ceil(num_samples / (run.batch_size * int(os.environ.get("WORLD_SIZE", "1"))))
    return math.ceil(run.epochs * math.ceil(batches / run.accumulate))
