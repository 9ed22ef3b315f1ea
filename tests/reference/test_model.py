"""The eager model against the published code's numbers and against examples computed by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from dpn_rt.errors import CheckpointError, ImageError, RequestError
from dpn_rt.format.config import IMAGE_PLACEHOLDER_ID
from dpn_rt.reference import EagerDpn
from tests.golden_cases import CASES, NUM_GENERATED, GoldenCase, case_named

LOGIT_TOLERANCE = 1e-4
PROB_TOLERANCE = 1e-5

golden = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def load(case: GoldenCase) -> EagerDpn:
    return EagerDpn.from_weights(case.config, case.canonical_weights().items())


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str) -> None:
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    error = (actual.double() - expected.double()).abs()
    if error.numel():
        worst = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
        assert error[worst] <= tolerance, f"{what}: {error[worst]:.2e} at {worst}, at most {tolerance:.0e} allowed"


@golden
def test_prefill_equals_the_published_code(case: GoldenCase) -> None:
    model = load(case)
    after: list[torch.Tensor] = []
    for boundary in model.boundaries:
        boundary.register_forward_hook(
            lambda _module, _args, out: after.append(out[0][out[1].image_start : out[1].image_end])
        )
    with torch.inference_mode():
        output = model(case.prompt_token_ids, image_embeds=case.image_embeds)
    assert_close(output.logits, case.tensor("logits"), LOGIT_TOLERANCE, "logits")
    assert list(output.trace.experts) == case.experts
    assert list(output.trace.visual_tokens) == case.visual_tokens
    assert list(output.trace.kv_lengths) == case.kv_lengths
    for probs, expected in zip(output.trace.probs, case.probs, strict=True):
        assert (probs is None) == (expected is None)
        if probs is not None and expected is not None:
            assert_close(torch.tensor(probs), torch.tensor(expected), PROB_TOLERANCE, "probs")
    for layer, visual in zip(case.meta["pool_at"], after, strict=True):
        assert_close(visual, case.tensor(f"vis_after_{layer}"), LOGIT_TOLERANCE, f"visual rows after layer {layer}")


@golden
def test_decode_equals_the_published_code(case: GoldenCase) -> None:
    model = load(case)
    output = model.generate(
        case.prompt_token_ids, image_embeds=case.image_embeds, max_new_tokens=NUM_GENERATED, ignore_eos=True
    )
    assert output.token_ids == case.generated_ids
    assert_close(output.logits, case.logits, LOGIT_TOLERANCE, "logits")
    assert list(output.kv_lengths) == case.arrays["decode_cache_len"][-1].tolist()


def test_a_forced_route_takes_the_experts_and_their_probabilities() -> None:
    case = case_named("c01_g24_r012")
    with torch.inference_mode():
        output = load(case)(case.prompt_token_ids, image_embeds=case.image_embeds, route=[2, 2, 1])
    assert output.trace.experts == (2, 2, 1)
    assert output.trace.kernels == ((2, 2), (2, 2), (1, 2))
    assert output.trace.visual_tokens == (576, 144, 36, 18)
    assert output.trace.probs[0] == pytest.approx(case.probs[0], abs=PROB_TOLERANCE)


def test_replaying_the_chosen_route_changes_nothing() -> None:
    case = case_named("c11_g5_r01s")
    model = load(case)
    chosen = model.generate(case.prompt_token_ids, image_embeds=case.image_embeds, max_new_tokens=2)
    forced = model.generate(
        case.prompt_token_ids, image_embeds=case.image_embeds, max_new_tokens=2, route=chosen.trace.experts
    )
    assert torch.equal(chosen.logits, forced.logits)


def test_a_prompt_that_ends_with_the_image_routes_on_its_last_row() -> None:
    case = case_named("c18_g12_lasttoken")
    ids = case.prompt_token_ids[: case.prompt_token_ids.index(IMAGE_PLACEHOLDER_ID) + 1]
    with torch.inference_mode():
        output = load(case)(ids, image_embeds=case.image_embeds, route=[2, 0, 0])
    assert output.trace.kv_lengths == (150, 42, 42, 42)


def test_bfloat16_stays_near_float32() -> None:
    case = case_named("c01_g24_r012")
    low = EagerDpn.from_weights(case.config, case.canonical_weights().items(), dtype=torch.bfloat16)
    assert low.boundaries[0].router.predictor.weight.dtype == torch.float32
    with torch.inference_mode():
        output = low(case.prompt_token_ids, image_embeds=case.image_embeds, route=[0, 1, 2])
    assert output.logits.dtype == torch.bfloat16
    assert_close(output.logits, case.tensor("logits"), 0.5, "logits")


def test_canonical_weights_round_trip() -> None:
    for name in ("c21_g7_conv", "c22_g12_routerv2"):
        case = case_named(name)
        written = dict(load(case).canonical_weights())
        expected = case.canonical_weights()
        assert written.keys() == expected.keys()
        assert all(torch.equal(written[key], expected[key]) for key in expected)


def test_weights_that_do_not_fit_are_reported_together() -> None:
    case = case_named("c22_g12_routerv2")
    weights = case.canonical_weights()
    del weights["norm.weight"]
    weights["layers.0.o.weight"] = torch.zeros(3, 3)
    weights["surplus"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as error:
        EagerDpn.from_weights(case.config, weights.items())
    for text in ("norm.weight is missing", "layers.0.o.weight has shape [3, 3], expected [32, 32]", "surplus"):
        assert text in str(error.value)


def test_bad_requests_say_what_is_wrong() -> None:
    case = case_named("c01_g24_r012")
    model, ids, image = load(case), case.prompt_token_ids, case.image_embeds
    assert image is not None
    at = ids.index(IMAGE_PLACEHOLDER_ID)
    router = case.meta["router_id"]
    without_router = [token for token in ids if token != router]
    bad = image.clone()
    bad[3, 4] = float("nan")
    for error, text, arguments in (
        (RequestError, "is empty", ([], None, None, None)),
        (RequestError, "token id 200 at index 1", ([1, 200], None, None, None)),
        (ImageError, "no image was given", (ids, None, None, None)),
        (ImageError, "0 image placeholders", ([1, router], None, image, None)),
        (ImageError, "2 image placeholders", ([*ids, IMAGE_PLACEHOLDER_ID], None, image, None)),
        (RequestError, "no <ROUTER> token", (without_router, None, image, None)),
        (RequestError, "before the image", ([router, *ids[at:]], None, image, None)),
        (ImageError, "not a square", (ids, None, image[:-1], None)),
        (ImageError, "finite", (ids, None, bad, None)),
        (ImageError, "expected shape", (ids, None, image[:, :-1], None)),
        (ImageError, "no vision tower", (ids, torch.zeros(3, 4, 4), None, None)),
        (RequestError, "labels", (ids, None, image, torch.zeros(3, dtype=torch.long))),
    ):
        with pytest.raises(error, match=text):
            model(*arguments)
    with pytest.raises(ImageError, match="does not have 576 cells"):
        model(ids, image_embeds=image, image_grid=(23, 24))
    for route in ([0, 0], [0, 0, 3], [0, -1, 0]):
        with pytest.raises(RequestError, match="route"):
            model(ids, image_embeds=image, route=route)
    with pytest.raises(RequestError, match="does not fit the grid"):
        model(ids, image_embeds=image, image_grid=(576, 1), route=[2, 0, 0])
    with pytest.raises(RequestError, match="max_new_tokens"):
        model.generate(ids, image_embeds=image, max_new_tokens=0)


@golden
def test_save_checkpoint_writes_the_published_names(case: GoldenCase, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    load(case).save_checkpoint(tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    expected = case.original_weights()
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[key], expected[key]) for key in expected)


def test_tied_embeddings_share_one_parameter() -> None:
    case = case_named("c22_g12_routerv2")
    decoder = dataclasses.replace(case.config.decoder, tie_word_embeddings=True)
    weights = case.canonical_weights()
    del weights["lm_head.weight"]
    model = EagerDpn.from_weights(dataclasses.replace(case.config, decoder=decoder), weights.items())
    assert model.lm_head.weight is model.language_model.embed_tokens.weight


def test_engine_round_trip(tmp_path: Path) -> None:
    from dpn_rt.format.engine_dir import EngineSource, write_engine

    case = case_named("c21_g7_conv")
    model = load(case)
    write_engine(tmp_path / "engine", case.config, EngineSource("0" * 64, "synthetic"), model.canonical_weights())
    for copy in (True, False):
        read = EagerDpn.from_engine(tmp_path / "engine", copy=copy)
        with torch.inference_mode():
            output = read(case.prompt_token_ids, image_embeds=case.image_embeds)
        assert_close(output.logits, case.tensor("logits"), LOGIT_TOLERANCE, "logits")
