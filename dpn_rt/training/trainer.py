"""Hugging Face's Trainer for models with routers: what it logs and saves."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from dpn_rt.errors import DpnError, TrainingError
from dpn_rt.format.config import stage_layers
from dpn_rt.reference.model import EagerDpn
from dpn_rt.reference.outputs import EagerBatchOutput
from dpn_rt.reference.trace import PyramidTrace
from dpn_rt.training.settings import Settings, check_settings, write_settings
from dpn_rt.training.trained import parameter_groups


class RouterTrainer(Trainer):
    """Logs the language loss, the routing loss and the share of visual tokens that are left.

    Its checkpoints hold the weights that are trained, and not those that the model was loaded with.
    """

    def __init__(self, model: EagerDpn, router_learning_rate: float, settings: Settings, **options: Any) -> None:
        """
        Args:
            model: whose weights have `requires_grad` set.
            router_learning_rate: the highest one of routers; that of other weights is in `args`.
            settings: kept in checkpoints; one with others is not gone on from.
            options: those of Trainer.
        """
        super().__init__(model=model, **options)
        self._dpn, self._router_learning_rate, self._settings = model, router_learning_rate, settings
        self._means: dict[str, list[float]] = defaultdict(list)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW, with the routers' own learning rate."""
        if self.optimizer is None:
            groups = parameter_groups(self._dpn, self._router_learning_rate, self.args.weight_decay)
            self.optimizer = torch.optim.AdamW(groups, lr=self.args.learning_rate)
        return self.optimizer

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """As Trainer's; notes what `log` adds.

        Raises:
            TrainingError: the training has diverged.
        """
        try:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        except (RuntimeError, DpnError) as error:
            if self.state.global_step and (_tells_overflow(error) or not has_finite_weights(self._dpn)):
                raise self._diverged() from error
            raise
        if not bool(torch.isfinite(loss)):
            raise self._diverged()
        assert isinstance(outputs, EagerBatchOutput)
        for name in ("language_loss", "routing_loss"):
            self._means[name].append(float(getattr(outputs, name).detach()))
        left = (visual_tokens_left(trace, self._dpn) for trace in outputs.traces)
        self._means["visual_tokens_left"] += [share for share in left if share is not None]
        return (loss, outputs) if return_outputs else loss

    def _diverged(self) -> TrainingError:
        return TrainingError(
            f"the training has diverged in step {self.state.global_step + 1}, where numbers are not finite any more: "
            "expected a lower --learning-rate or --router-learning-rate, or a higher --warmup-ratio"
        )

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """As Trainer's, with the means since the last call where there is a loss."""
        if "loss" in logs:
            logs |= {name: round(sum(values) / len(values), 6) for name, values in self._means.items() if values}
            self._means.clear()
        super().log(logs, *args, **options)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        trained = trained_names(self._dpn)
        state = self._dpn.state_dict() if state_dict is None else state_dict
        super()._save(output_dir, {name: tensor for name, tensor in state.items() if name in trained})
        checkpoint = output_dir or self.args.output_dir
        assert checkpoint is not None
        write_settings(Path(checkpoint), self._settings)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        except RuntimeError as error:  # sizes of weights differ
            raise TrainingError(
                f"{resume_from_checkpoint}: the checkpoint of another training, whose weights have other sizes: "
                "expected the options that it was begun with"
            ) from error
        check_settings(Path(resume_from_checkpoint), self._settings)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        missing = [name for name in load_result.missing_keys if name in trained_names(self._dpn)]
        if missing or load_result.unexpected_keys:
            raise TrainingError(
                f"{self.args.output_dir}: the checkpoint of another training ({len(missing)} weights are missing, "
                f"{len(load_result.unexpected_keys)} too many): expected the options that it was begun with"
            )


def trained_names(model: EagerDpn) -> set[str]:
    """Names of the parameters that the optimiser changes."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def _tells_overflow(error: Exception) -> bool:
    """Whether a step ended at a number that is infinite or NaN: at a check of ours, or where torch draws experts."""
    return any(word in str(error) for word in ("must be finite", "`nan`"))


def has_finite_weights(model: torch.nn.Module) -> bool:
    """Whether no weight is infinite or NaN."""
    return all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


def visual_tokens_left(trace: PyramidTrace, model: EagerDpn) -> float | None:
    """Mean over decoder layers of the share of an image's visual tokens that a layer sees; None without an image."""
    if not trace.visual_tokens[0]:
        return None
    layers = stage_layers(model.config.reduction.layers, model.config.decoder.num_layers)
    seen = sum(tokens * len(stage) for tokens, stage in zip(trace.visual_tokens, layers, strict=True))
    return seen / (trace.visual_tokens[0] * model.config.decoder.num_layers)
