"""CLIP's tower and projector against transformers' own, for any number of images."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModel

from dpn_rt.errors import ImageError
from dpn_rt.model.vision.clip.config import Activation, ClipConfig, SelectFeature
from dpn_rt.model.vision.clip.tower import CROPS_PER_CALL
from dpn_rt.model.vision.encoder import EncodedImage, ImageEncoder, load_encoder
from dpn_rt.model.vision.projector import ProjectorConfig
from dpn_rt.model.vision.visual_input import VisualInput
from dpn_rt.schema.bounds import bound_problems
from tests.engine.models import VISION, random_images

HIDDEN_SIZE = 48
PROJECTOR = ProjectorConfig("mlp2x_gelu", VISION.hidden_size)

LAYER_NAMES = {
    "norm1": ("layer_norm1",),
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.out_proj",),
    "norm2": ("layer_norm2",),
    "fc1": ("mlp.fc1",),
    "fc2": ("mlp.fc2",),
}


def reference_tower(config: ClipConfig, num_layers: int) -> CLIPVisionModel:
    """A random tower of transformers with layers to spare."""
    model = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=num_layers,
            num_attention_heads=config.num_heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
            layer_norm_eps=config.layer_norm_eps,
            hidden_act=config.activation,
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.15)
    return model


def canonical_weights(model: CLIPVisionModel, config: ClipConfig) -> dict[str, Tensor]:
    """The tower's weights under canonical names, and random weights of a projector."""
    published = {name.removeprefix("vision_model."): weight for name, weight in model.state_dict().items()}
    weights = {
        "vision.class_embedding": published["embeddings.class_embedding"],
        "vision.patch_embedding.weight": published["embeddings.patch_embedding.weight"].flatten(1),
        "vision.position_embedding.weight": published["embeddings.position_embedding.weight"],
    }
    for kind in ("weight", "bias"):
        weights[f"vision.pre_norm.{kind}"] = published[f"pre_layrnorm.{kind}"]
        for layer in range(config.num_layers):
            for name, parts in LAYER_NAMES.items():
                tensors = [published[f"encoder.layers.{layer}.{part}.{kind}"] for part in parts]
                weights[f"vision.layers.{layer}.{name}.{kind}"] = torch.cat(tensors)
    for name, spec in PROJECTOR.weight_specs(HIDDEN_SIZE, torch.float32):
        weights[name] = torch.randn(spec.shape) * 0.15
    return weights


def encode(config: ClipConfig, weights: dict[str, Tensor], images: list[VisualInput]) -> list[EncodedImage]:
    encoder = load_encoder(config, PROJECTOR, weights, prepack=False)
    assert encoder is not None
    with torch.inference_mode():
        return ImageEncoder(encoder).encode(images)


def project(features: Tensor, weights: dict[str, Tensor]) -> Tensor:
    x = functional.linear(features, weights["projector.0.weight"], weights["projector.0.bias"])
    return functional.linear(functional.gelu(x), weights["projector.2.weight"], weights["projector.2.bias"])


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("feature", ["patch", "cls_patch"])
@pytest.mark.parametrize("num_layers", [0, 1, 4])
def test_equals_transformers(activation: Activation, feature: SelectFeature, num_layers: int) -> None:
    config = dataclasses.replace(VISION, activation=activation, select_feature=feature, num_layers=num_layers)
    model = reference_tower(config, num_layers=4)
    weights = canonical_weights(model, config)
    images = random_images(3, config)
    encoded = encode(config, weights, images)
    with torch.inference_mode():
        states = model(torch.stack([image.views[0] for image in images]), output_hidden_states=True).hidden_states
        features = states[num_layers][:, 1:] if feature == "patch" else states[num_layers]
        expected = project(features, weights)
    for image, wanted in zip(encoded, expected, strict=True):
        assert image.grid == (4, 4)
        torch.testing.assert_close(image.rows, wanted, atol=1e-4, rtol=1e-4)


def test_pixels_beyond_the_last_patch_are_not_read() -> None:
    config = dataclasses.replace(VISION, image_size=60)  # four patches of 14 pixels and 4 more
    weights = canonical_weights(reference_tower(config, num_layers=2), config)
    (image,) = random_images(1, config)
    changed = image.views[0].clone()
    changed[:, 56:] = changed[:, :, 56:] = 7.0
    other = VisualInput.of_views((changed,), image.grid, image.num_visual_tokens)
    first, second = encode(config, weights, [image, other])
    assert first.grid == (4, 4)
    assert torch.equal(first.rows, second.rows)


@pytest.mark.parametrize("count", [0, 1, 3, CROPS_PER_CALL, CROPS_PER_CALL + 1, 2 * CROPS_PER_CALL + 3])
def test_any_number_of_images(count: int) -> None:
    weights = canonical_weights(reference_tower(VISION, num_layers=2), VISION)
    images = random_images(count)
    encoded = encode(VISION, weights, images)
    assert len(encoded) == count
    for image, together in zip(images, encoded, strict=True):
        (alone,) = encode(VISION, weights, [image])
        assert together.rows.shape == (VISION.num_visual_tokens, HIDDEN_SIZE)
        torch.testing.assert_close(together.rows, alone.rows, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("shapes", "named"),
    [
        ([(3, 28, 28)], r"image: pixels \[3, 28, 28\], expected pixels \[3, 56, 56\]"),
        ([(1, 56, 56)], r"image: pixels \[1, 56, 56\], expected pixels \[3, 56, 56\]"),
        ([(1, 3, 56, 56)], r"image: pixels \[1, 3, 56, 56\], expected pixels \[3, 56, 56\]"),
        ([(3, 56, 56)] * 2, r"image: pixels \[3, 56, 56\] and \[3, 56, 56\], expected pixels \[3, 56, 56\]$"),
    ],
)
def test_other_views_are_refused(shapes: list[tuple[int, ...]], named: str) -> None:
    views = [torch.randn(shape) for shape in shapes]
    weights = canonical_weights(reference_tower(VISION, num_layers=2), VISION)
    bad = VisualInput.of_views(views, VISION.grid, VISION.num_visual_tokens)
    with pytest.raises(ImageError, match=named):
        encode(VISION, weights, [*random_images(1), bad])


def test_embeddings_and_other_grids_are_refused() -> None:
    with pytest.raises(ImageError, match=r"image: embeddings, expected pixels \[3, 56, 56\]"):
        VISION.check_views(VisualInput.of_embeds(torch.zeros(16, HIDDEN_SIZE), (4, 4)))
    finer = dataclasses.replace(VISION, patch_size=7)
    with pytest.raises(ImageError, match=r"64 visual tokens on the grid \(8, 8\), expected 16 on \(4, 4\)"):
        VISION.check_views(*random_images(1, finer))


@pytest.mark.parametrize("feature", ["patch", "cls_patch"])
def test_the_configuration_counts_rows(feature: SelectFeature) -> None:
    config = dataclasses.replace(VISION, select_feature=feature)
    assert (config.num_patches, config.num_rows) == (16, 17)
    assert config.num_visual_tokens == config.max_visual_tokens == (16 if feature == "patch" else 17)
    assert config.view_shapes == ((3, 56, 56),) and config.head_dims == (16,)
    assert config.summary == "56-pixel images"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, []),
        ({"num_heads": 0}, ["vision.num_heads must be positive, got 0"]),
        ({"layer_norm_eps": float("inf")}, ["vision.layer_norm_eps must be a finite number, got inf"]),
        (
            {"num_layers": -1, "hidden_size": 2**21},
            ["vision.hidden_size must be at most 1048576, got 2097152", "vision.num_layers must be at least 0, got -1"],
        ),
        (
            {"num_heads": 5, "image_size": 13},
            [
                "vision hidden_size 32 is not a multiple of its num_heads 5",
                "vision image_size 13 is smaller than its patch_size 14",
            ],
        ),
    ],
)
def test_contradictions_are_named(changes: dict[str, float], named: list[str]) -> None:
    config = dataclasses.replace(VISION, **changes)  # type: ignore[arg-type]
    assert (list(bound_problems(config, "vision")) or list(config.problems(needs_grid=True))) == named


def test_a_class_row_has_no_place_in_a_grid() -> None:
    config = dataclasses.replace(VISION, select_feature="cls_patch")
    assert list(config.problems(needs_grid=False)) == []
    assert len(list(config.problems(needs_grid=True))) == 1
