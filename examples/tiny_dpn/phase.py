"""One phase of training: optimizer, losses, resumable loop and log."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from dpn_rt.reference import Boundary, EagerDpn
from examples.tiny_dpn import batch, data
from examples.tiny_dpn.early_answers import EarlyAnswers
from examples.tiny_dpn.encoding import Encoder, Scene
from examples.tiny_dpn.model import POOLING_LAYERS
from examples.tiny_dpn.patch_labels import PatchHead, patch_labels
from examples.tiny_dpn.practice import practice_of
from examples.tiny_dpn.recipe import Phase, Routing
from examples.tiny_dpn.routing import compression_loss, evenness_loss, policy_loss

SAVE_EVERY = 50
LOG_EVERY = 10
GRADIENT_LIMIT = 1.0
BETAS = (0.9, 0.98)
WEIGHT_DECAY = 0.01
LAST_LEARNING_RATE = 0.02
"""Learning rate at the end of the cosine, as a share of the highest."""


class TrainingError(Exception):
    """Training cannot start or continue; the message says why."""


class Trainer:
    """Runs the steps of one phase. A step depends on (seed, step) only, so a resumed run gives the same weights."""

    def __init__(self, model: EagerDpn, phase: Phase, encoder: Encoder, folder: Path, seed: int) -> None:
        self.model, self.phase, self.encoder, self.folder, self.seed = model, phase, encoder, folder, seed
        assert model.config.vision is not None and model.vision is not None
        decoder = model.config.decoder
        self.patch_head = PatchHead(model.config.vision.hidden_size)
        self.early_answers = EarlyAnswers(len(POOLING_LAYERS), decoder.hidden_size, decoder.vocab_size)
        self.heads = nn.ModuleList((self.patch_head, self.early_answers)).to(model.device)
        tower = list(model.vision.parameters())
        routers = list(model.boundaries.parameters())
        known = {id(parameter) for parameter in (*tower, *routers)}
        others = [p for p in [*model.parameters(), *self.heads.parameters()] if id(p) not in known]
        self.weights = [*tower, *others]
        groups: list[dict[str, Any]] = [
            {"params": others, "highest": phase.learning_rate},
            {"params": tower, "highest": phase.tower_learning_rate},
        ]
        if phase.routing is not None:
            predictors = [p for name, p in model.boundaries.named_parameters() if "predictor" in name]
            hidden = [p for name, p in model.boundaries.named_parameters() if "predictor" not in name]
            groups.append({"params": predictors, "highest": phase.routing.learning_rate, "weight_decay": 0.0})
            groups.append({"params": hidden, "highest": phase.routing.hidden_learning_rate, "weight_decay": 0.0})
            for boundary in model.boundaries:
                cast(Boundary, boundary).detach_router_input = phase.routing.detach
                cast(Boundary, boundary).min_drawn_visual_tokens = phase.routing.min_drawn_visual_tokens
        self.optimizer = torch.optim.AdamW(
            groups, lr=phase.learning_rate, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
        )

    @property
    def state_file(self) -> Path:
        """The file with the last saved step."""
        return self.folder / "state.pt"

    # Starting

    def load_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Load the weights of a model without routers; the routers keep theirs.

        Raises:
            TrainingError: weights are missing that are not a router's, or some do not belong to this model.
        """
        try:
            found = self.model.load_state_dict(weights, strict=False)
        except RuntimeError as error:
            raise TrainingError(f"phase {self.phase.name}: weights of another model: {error}") from error
        wrong = [*found.unexpected_keys, *(key for key in found.missing_keys if not key.startswith("boundaries."))]
        if wrong:
            raise TrainingError(f"phase {self.phase.name}: weights missing or too many: {', '.join(wrong)}")

    def load_state(self, file: Path) -> None:
        """Load weights and heads from the last state of another phase."""
        state = _read(file, self.model.device)
        self.load_weights(state["model"])
        self.heads.load_state_dict(state["heads"])

    # Running

    def run(self) -> None:
        """Train from the last saved step to the end.

        Raises:
            TrainingError: the saved state is damaged.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        first, seconds = self._resume()
        self.model.train()
        started = time.perf_counter()
        steps = range(first, self.phase.steps)
        gathered: dict[str, list[float]] = defaultdict(list)
        with (
            SummaryWriter(str(self.folder), purge_step=first) as log,
            tqdm(steps, initial=first, total=self.phase.steps, desc=self.phase.name) as bar,
        ):
            for step in bar:
                for name, value in self.step(step).items():
                    gathered[name].append(value)
                if (step + 1) % LOG_EVERY == 0:
                    means = {name: float(np.mean(values)) for name, values in gathered.items()}
                    gathered.clear()
                    for name, mean in means.items():
                        log.add_scalar(name, mean, step + 1)
                    bar.set_postfix({name: f"{mean:.3f}" for name, mean in means.items() if "/" not in name})
                if (step + 1) % SAVE_EVERY == 0 or step + 1 == self.phase.steps:
                    self._save(step + 1, seconds + time.perf_counter() - started)

    def _resume(self) -> tuple[int, float]:
        if not self.state_file.is_file():
            return 0, 0.0
        state = _read(self.state_file, self.model.device)
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.optimizer.load_state_dict(state["optimizer"])
        return state["step"], state["seconds"]

    def _save(self, step: int, seconds: float) -> None:
        part = self.state_file.with_suffix(".part")
        state = {
            "step": step,
            "seconds": seconds,
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        torch.save(state, part)
        part.replace(self.state_file)

    def step(self, step: int) -> dict[str, float]:
        """One step of the optimizer. Returns the values to log."""
        phase = self.phase
        rng = np.random.default_rng([self.seed, step])
        torch.manual_seed(int(rng.integers(2**62)))
        for group in self.optimizer.param_groups:
            group["lr"] = group["highest"] * learning_rate_factor(step, phase)
        first = step * (phase.scenes + phase.practice_scenes)
        count = phase.scenes + (phase.practice_scenes if step < phase.practice_until else 0)
        samples = [data.sample("train", first + i, self.seed) for i in range(count)]
        scenes = [self._ask(sample, i, rng) for i, sample in enumerate(samples)]
        with torch.autocast(self.model.device.type, torch.bfloat16):
            loss, stats = self._loss(step, scenes, samples)
        loss.backward()
        stats["gradient"] = nn.utils.clip_grad_norm_(self.weights, GRADIENT_LIMIT).item()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return stats

    def _ask(self, sample: data.Sample, index: int, rng: np.random.Generator) -> Scene:
        kinds = tuple(data.KINDS) if index < self.phase.scenes else practice_of(index).kinds
        asked = [question for question in sample.questions if question.kind in kinds]
        chosen = rng.permutation(len(asked))[: self.phase.questions]
        return self.encoder.scene(sample.image, [asked[i] for i in chosen])

    # Losses

    def _loss(
        self, step: int, scenes: list[Scene], samples: list[data.Sample]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        phase = self.phase
        features, visual = batch.encode_images(self.model, scenes)
        loss = torch.zeros((), device=visual.device)
        stats: dict[str, float] = {}
        if phase.patch_weight:
            labels = torch.stack([patch_labels(sample.scene) for sample in samples]).to(visual.device)
            readings = self.patch_head.losses(features, labels)
            stats |= {f"patch/{name}": value.item() for name, value in readings.items()}
            loss = loss + phase.patch_weight * torch.stack(list(readings.values())).mean()
        if phase.questions:
            draws = 1 if phase.routing is None else phase.routing.draws
            kinds = [turn.kind for scene in scenes for turn in scene.turns for _ in range(draws)]
            shown = self._thin_out(visual, samples)
            read_after = POOLING_LAYERS if phase.early_answer_weight else ()
            output = batch.forward(self.model, shown, self.encoder.before_image, scenes, draws, read_after)
            language = output.losses.sum() / output.num_tokens.sum()
            loss = loss + language
            stats["language"] = language.item()
            stats |= _answer_statistics(output, kinds)
            if phase.early_answer_weight:
                early = self.early_answers.loss(output.router_rows, _first_tokens(scenes).to(visual.device))
                assert output.early_rows is not None and output.targets is not None
                answer = self.early_answers.answer_loss(output.early_rows, output.targets)
                stats |= {"early/router": early.item(), "early/answer": answer.item()}
                loss = loss + phase.early_answer_weight * (early + answer)
            if phase.routing is not None:
                if step >= phase.routing.first_step:
                    loss = loss + self._routing_loss(phase.routing, output, stats)
                stats |= _routing_statistics(output, kinds)
        return loss, stats

    def _thin_out(self, visual: torch.Tensor, samples: list[data.Sample]) -> list[torch.Tensor]:
        """The visual rows of each picture; practice pictures keep only some of them."""
        rows = list(visual)
        for index in range(self.phase.scenes, len(rows)):
            rows[index] = rows[index][practice_of(index).rows(samples[index]).to(visual.device)]
        return rows

    def _routing_loss(self, routing: Routing, output: batch.BatchOutput, stats: dict[str, float]) -> torch.Tensor:
        compression = compression_loss(output.records, routing.target, routing.score)
        stats["compression"] = compression.item()
        loss = routing.compression_weight * compression
        loss = loss + routing.evenness_weight * evenness_loss(output.records)
        if routing.policy_weight:
            loss = loss + routing.policy_weight * policy_loss(output.losses, output.records, routing.draws)
        return loss


def learning_rate_factor(step: int, phase: Phase) -> float:
    """Linear warmup, then a cosine."""
    if step < phase.warmup_steps:
        return (step + 1) / phase.warmup_steps
    done = (step - phase.warmup_steps) / max(1, phase.steps - phase.warmup_steps)
    return LAST_LEARNING_RATE + (1 - LAST_LEARNING_RATE) * 0.5 * (1 + math.cos(math.pi * done))


def _read(file: Path, device: torch.device) -> dict[str, Any]:
    try:
        return dict(torch.load(file, map_location=device, weights_only=True))
    except Exception as error:  # a damaged file raises anything from RuntimeError to UnpicklingError
        raise TrainingError(f"{file}: not a state that training saved ({error}); remove it to start anew") from error


def _first_tokens(scenes: list[Scene]) -> torch.Tensor:
    return torch.tensor([turn.ids[turn.answer_start] for scene in scenes for turn in scene.turns])


def _answer_statistics(output: batch.BatchOutput, kinds: list[str]) -> dict[str, float]:
    """Share of right answers, of all questions and per question kind."""
    right = output.is_right.float().cpu()
    stats = {"right": right.mean().item()}
    for kind in data.KINDS:
        chosen = [i for i, other in enumerate(kinds) if other == kind]
        if chosen:
            stats[f"right/{kind}"] = right[chosen].mean().item()
    return stats


def _routing_statistics(output: batch.BatchOutput, kinds: list[str]) -> dict[str, float]:
    """Mean visual tokens in the last stage and mean probability of every expert, per level of difficulty."""
    stats = {}
    for level in data.LEVELS:
        chosen = [i for i, kind in enumerate(kinds) if data.KINDS[kind] == level]
        if chosen:
            stats[f"tokens/{level}"] = float(np.mean([output.visual_tokens[i] for i in chosen]))
        for b in range(len(output.records[0])):
            probs = [p for i in chosen if (p := output.records[i][b].probs) is not None]
            if probs:
                means = torch.stack(probs).detach().mean(0).tolist()
                stats |= {f"boundary {b}/{level}/expert {e}": mean for e, mean in enumerate(means)}
    return stats
