"""Training of the small DPN: a batch gives the results of single samples, routers learn, a killed run continues."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from dpn_rt import LLM
from dpn_rt.builders.native import build_engine
from dpn_rt.format.config import IMAGE_PLACEHOLDER_ID
from dpn_rt.model.reduction.pooling_config import PoolingConfig, PoolingFunction
from dpn_rt.reference import BoundaryRecord, EagerDpn
from examples.tiny_dpn import batch, data, train
from examples.tiny_dpn.answers import chat_messages
from examples.tiny_dpn.attention import use_training_attention
from examples.tiny_dpn.beginning import BEGINNING_ODDS, start_pooling_late
from examples.tiny_dpn.early_answers import EarlyAnswers
from examples.tiny_dpn.encoding import Encoder, Scene, Turn, pixels
from examples.tiny_dpn.model import VARIANTS, Variant, model_config
from examples.tiny_dpn.phase import Trainer, TrainingError
from examples.tiny_dpn.practice import PRACTICES, practice_of
from examples.tiny_dpn.recipe import PHASES, Phase
from examples.tiny_dpn.routing import compression_loss, evenness_loss, policy_loss
from examples.tiny_dpn.tokenizer import ROUTER, train_tokenizer

TOKENIZER = train_tokenizer()
ENCODER = Encoder(TOKENIZER)


def random_model(variant: Variant, pooling_function: PoolingFunction = "max") -> EagerDpn:
    config = model_config(variant, TOKENIZER.get_vocab_size())
    if isinstance(config.reduction, PoolingConfig):
        reduction = dataclasses.replace(config.reduction, pooling_function=pooling_function)
        config = dataclasses.replace(config, reduction=reduction)
    model = EagerDpn(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 8.0 if "predictor" in name else parameter.shape[-1] ** -0.5)
    return model


def scenes(count: int, questions: int) -> list[Scene]:
    result = []
    for index in range(count):
        item = data.sample("train", index)
        result.append(ENCODER.scene(item.image, item.questions[index : index + questions]))
    return result


@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_batch_gives_every_question_what_the_published_order_gives(variant: Variant) -> None:
    model, items = random_model(variant), scenes(3, 4)
    _, visual = batch.encode_images(model, items)
    output = batch.forward(model, visual, ENCODER.before_image, items)
    expected, experts = [], []
    for item in items:
        for turn in item.turns:
            ids = [*ENCODER.before_image, IMAGE_PLACEHOLDER_ID, *turn.ids]
            labels = torch.full((len(ids),), -100)
            answer = turn.ids[turn.answer_start :]
            labels[-len(answer) :] = torch.tensor(answer)
            alone = model(ids, item.pixels, labels=labels)
            expected.append(alone.language_loss * len(answer))
            experts.append(alone.trace.experts)
    torch.testing.assert_close(output.losses, torch.stack(expected), rtol=1e-5, atol=1e-4)
    if variant == "dpn":
        assert [tuple(r.expert for r in records) for records in output.records] == experts
        assert len(set(experts)) > 1, "one route only would not test mixed batches"


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_attention_gives_the_losses_and_gradients_of_sdpa(variant: Variant) -> None:
    """Some scenes get fewer image rows, so that a group shares fewer rows than its longest sequence has."""
    # Average pooling: with maxima, rounding decides which of two nearly equal rows is taken and gets the gradient.
    model, items = random_model(variant, "avg"), scenes(3, 4)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        _, visual = batch.encode_images(model, items)
        rows = [part[: len(part) - 5 * i] if variant == "dense" else part for i, part in enumerate(visual)]
        losses = batch.forward(model, rows, ENCODER.before_image, items).losses
        losses.sum().backward()
        return losses.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    wanted_losses, wanted_gradients = run()
    use_training_attention(model)
    losses, gradients = run()
    torch.testing.assert_close(losses, wanted_losses, atol=1e-4, rtol=1e-5)
    assert (gradients - wanted_gradients).norm() < 1e-5 * wanted_gradients.norm()
    used = {module.config._attn_implementation for module in model.modules() if hasattr(module, "is_causal")}
    assert used == {"tiny_dpn"}


@torch.inference_mode()
def test_router_rows_are_those_of_the_decoder_after_the_layer() -> None:
    model, items = random_model("dense"), scenes(2, 3)
    _, visual = batch.encode_images(model, items)
    output = batch.forward(model, visual, ENCODER.before_image, items, read_after=(0, 3))
    answers = [turn.ids[turn.answer_start :] for item in items for turn in item.turns]
    assert output.targets is not None and output.targets.tolist() == [token for ids in answers for token in ids]
    assert output.early_rows is not None and len(output.early_rows) == len(output.targets)
    turns = [(index, turn) for index, item in enumerate(items) for turn in item.turns]
    assert [rows.shape for rows in output.router_rows] == [(len(turns), model.config.decoder.hidden_size)] * 2
    for layer, rows in zip((0, 3), output.router_rows, strict=True):
        for row, (index, turn) in zip(rows, turns, strict=True):
            rows_of_turn = turn_rows(model, visual[index], turn, layer)
            torch.testing.assert_close(row, rows_of_turn[turn.ids.index(ROUTER)], rtol=1e-4, atol=1e-4)
    first = 0
    for (index, turn), ids in zip(turns, answers, strict=True):
        predicting = turn_rows(model, visual[index], turn, 3)[turn.answer_start - 1 : -1]
        torch.testing.assert_close(output.early_rows[first : first + len(ids)], predicting, rtol=1e-4, atol=1e-4)
        first += len(ids)


def turn_rows(model: EagerDpn, visual: torch.Tensor, turn: Turn, layer: int) -> torch.Tensor:
    """`[ids of the turn, hidden]`: rows of the turn after a layer."""
    decoder = model.language_model
    embed = decoder.embed_tokens
    rows = torch.cat((embed(torch.tensor(ENCODER.before_image)), visual, embed(torch.tensor(turn.ids))))[None]
    positions = torch.arange(rows.shape[1])[None]
    for module in decoder.layers[: layer + 1]:
        rows = module(rows, position_ids=positions, position_embeddings=decoder.rotary_emb(rows, positions))
    return rows[0, len(ENCODER.before_image) + len(visual) :]


def test_early_answers_by_hand() -> None:
    early = EarlyAnswers(2, 4, 3)
    for guess in (*early.guesses, early.answer):
        guess[1].weight.data.zero_()  # type: ignore[index]
        guess[1].bias.data.copy_(torch.tensor([0.0, 0.0, 50.0]))  # type: ignore[index]
    rows = [torch.randn(2, 4)] * 2
    assert early.loss(rows, torch.tensor([2, 2])).item() == pytest.approx(0.0)
    assert early.loss(rows, torch.tensor([2, 0])).item() == pytest.approx(25.0)
    assert early.answer_loss(rows[0], torch.tensor([1, 2])).item() == pytest.approx(25.0)


def test_routers_begin_with_given_odds_whatever_is_asked() -> None:
    model = random_model("dpn")
    start_pooling_late(model)
    rows = torch.randn(50, model.config.decoder.hidden_size)
    for boundary, odds in zip(model.boundaries, BEGINNING_ODDS, strict=True):
        probs = torch.stack([boundary.router(row[None]) for row in rows])  # type: ignore[operator, union-attr]
        torch.testing.assert_close(probs.mean(0), torch.tensor(odds), rtol=0, atol=0.05)


@pytest.mark.parametrize("variant", VARIANTS)
def test_ids_are_those_of_the_runtime(variant: Variant, tmp_path: Path) -> None:
    train.save_checkpoint(random_model(variant), tmp_path / "checkpoint")
    engine = build_engine(tmp_path / "checkpoint", tmp_path / "engine").path
    llm, item, phase = LLM(engine), data.sample("train", 5), PHASES[variant]
    encoder = Encoder(TOKENIZER, phase.router_token)
    for question in item.questions:
        prompt = llm.processor.process(llm.processor.chat(chat_messages(item.image, question.text)))
        turn = encoder.turn(question)
        expected = [*encoder.before_image, IMAGE_PLACEHOLDER_ID, *turn.ids[: turn.answer_start]]
        assert prompt.token_ids.tolist() == expected
        torch.testing.assert_close(prompt.images[0].views[0], pixels(item.image), rtol=0, atol=1e-5)


def record(probs: list[float], expert: int) -> BoundaryRecord:
    return BoundaryRecord(expert, None, torch.tensor(probs, requires_grad=True), (0, 1, 2))


def test_policy_loss_prefers_the_draw_with_the_smaller_loss() -> None:
    good, bad = record([0.25, 0.25, 0.5], 0), record([0.25, 0.25, 0.5], 2)
    policy_loss(torch.tensor([0.25, 0.75]), [(good,), (bad,)], draws=2).backward()
    assert good.probs is not None and bad.probs is not None
    # mean over 2 sequences of advantage * log p: advantages -0.5 and +0.5, d log p / dp = 1 / p.
    assert good.probs.grad is not None and good.probs.grad.tolist() == [-0.5 / 0.25 / 2, 0, 0]
    assert bad.probs.grad is not None and bad.probs.grad.tolist() == [0, 0, 0.5 / 0.5 / 2]


def test_policy_loss_compares_draws_of_the_same_question_alone() -> None:
    records = [(record([0.5, 0.5, 0.0], e),) for e in (0, 1, 0, 1)]
    policy_loss(torch.tensor([0.1, 0.1, 0.9, 0.9]), records, draws=2).backward()
    assert all(r.probs is not None and r.probs.grad is not None and not r.probs.grad.any() for (r,) in records)


def test_policy_loss_leaves_out_skipped_boundaries() -> None:
    skipped = BoundaryRecord(None, None, None, (0, 1, 2))
    assert policy_loss(torch.tensor([1.0, 2.0]), [(skipped,), (skipped,)], draws=2).item() == 0.0


def test_compression_loss_by_hand() -> None:
    records = [(record([0.2, 0.3, 0.5], 0),), (record([0.9, 0.1, 0.0], 0),)]
    # Expected ranks 1.3 and 0.1; of the most probable expert alone 2 * 0.5 and 0 * 0.9.
    assert compression_loss(records, 1.5, "expected").item() == pytest.approx(1.5 - 0.7)
    assert compression_loss(records, 1.5, "best").item() == pytest.approx(1.5 - 0.5)
    assert compression_loss(records, 0.6, "expected").item() == 0.0


def test_only_the_expected_score_moves_a_router_that_keeps_every_token() -> None:
    for score, moves in (("best", False), ("expected", True)):
        keeps = record([0.9, 0.1, 0.0], 0)
        compression_loss([(keeps,)], 1.5, score).backward()  # type: ignore[arg-type]
        assert keeps.probs is not None and keeps.probs.grad is not None
        assert bool(keeps.probs.grad.any()) is moves


def test_practice_keeps_what_matters() -> None:
    item = data.sample("train", 3)
    for index, practice in enumerate(PRACTICES):
        assert practice_of(index) is practice
        rows, matters = practice.rows(item), practice.matters(item.scene)
        assert rows[matters].all()
        assert 0 < int((rows & ~matters).sum()) < 0.25 * len(rows)
        assert set(practice.kinds) <= set(data.KINDS)


def test_evenness_loss_pulls_even_where_a_router_is_certain() -> None:
    certain = record([0.999, 0.0005, 0.0005], 0)
    evenness_loss([(certain,)]).backward()
    assert certain.probs is not None and certain.probs.grad is not None
    assert certain.probs.grad.tolist() == pytest.approx([-1 / 3 / 0.999, -1 / 3 / 0.0005, -1 / 3 / 0.0005], rel=1e-4)
    assert evenness_loss([(record([1 / 3] * 3, 0),)]).item() == pytest.approx(np.log(3))
    assert evenness_loss([(BoundaryRecord(None, None, None, (0, 1, 2)),)]).item() == 0.0


def test_a_wrong_answer_counts_no_more_than_wrong() -> None:
    records = [(record([0.5, 0.5, 0.0], 0),), (record([0.5, 0.5, 0.0], 1),)]
    assert policy_loss(torch.tensor([0.0, 1.0]), records, 2) == policy_loss(torch.tensor([0.0, 50.0]), records, 2)


def tiny_phase(name: str = "dpn", **changes: object) -> Phase:
    return dataclasses.replace(PHASES[name], steps=4, scenes=1, questions=2, warmup_steps=1, **changes)  # type: ignore[index, arg-type]


def trainer(folder: Path, phase: Phase, seed: int = 0) -> Trainer:
    torch.manual_seed(1)  # the same weights at every call; a training sets a seed of its own
    model = EagerDpn(model_config(phase.variant, TOKENIZER.get_vocab_size()))
    return Trainer(model, phase, ENCODER, folder, seed)


class KilledError(Exception):
    pass


def test_killed_training_continues_as_if_nothing_had_happened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("examples.tiny_dpn.phase.SAVE_EVERY", 2)
    whole = trainer(tmp_path / "whole", tiny_phase())
    whole.run()
    first = trainer(tmp_path / "killed", tiny_phase())
    step = first.step

    def killed_step(number: int) -> dict[str, float]:
        if number == 3:
            raise KilledError
        return step(number)

    monkeypatch.setattr(first, "step", killed_step)
    with pytest.raises(KilledError):
        first.run()
    second = trainer(tmp_path / "killed", tiny_phase())
    second.run()
    for (name, expected), value in zip(
        whole.model.state_dict().items(), second.model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(value, expected, rtol=0, atol=0, msg=name)


def test_damaged_state_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "state.pt").write_bytes(b"not a state")
    with pytest.raises(TrainingError, match="state.pt"):
        trainer(tmp_path, tiny_phase()).run()


def test_variant_needs_its_base(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="starts from phase base"):
        train.run_phase(tiny_phase(), tmp_path)


def test_unwritable_output_fails_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    assert train.main(["--output", str(tmp_path / "file" / "run")]) == 1
    assert "cannot write" in capsys.readouterr().err


def test_damaged_base_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    assert train.main(["--output", str(tmp_path / "run"), "--phase", "dpn", "--base", str(base)]) == 1
    assert "base" in capsys.readouterr().err


def test_checkpoint_is_read_back_by_runtime_and_eager(tmp_path: Path) -> None:
    model = random_model("dpn")
    train.save_checkpoint(model, tmp_path)
    again = EagerDpn.from_checkpoint(tmp_path, dtype=torch.float32)
    for (name, expected), value in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        stored = expected if ".router." in name else expected.to(torch.bfloat16).float()
        torch.testing.assert_close(value, stored, rtol=0, atol=0, msg=name)
