"""Prompts of every form become checked ids, pixels and row numbers."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dpn_rt.errors import DpnError, EngineError, ImageError, RequestError
from dpn_rt.model.reduction.reduction import NoReduction
from dpn_rt.model.vision.preprocessing import pad_to_square
from dpn_rt.prompts.image import MAX_PIXELS
from dpn_rt.prompts.processor import Processor
from dpn_rt.schema.weights import TORCH_DTYPES
from tests.prompts.conftest import Setup
from tests.prompts.models import (
    CLIP_MEAN,
    CLIP_STD,
    HIDDEN_SIZE,
    IMAGE_SIZE,
    PYRAMID,
    embeds,
    make_model,
    write_image_processor,
)

QUESTION = "USER: <image>\nWhat is in the picture?<ROUTER> ASSISTANT:"
NUM_VISUAL = 16


def picture(width: int = 50, height: int = 30, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.fixture(scope="module")
def bare() -> Processor:
    """An engine without tokenizer and tower: ids and embeddings only; 199 is the router token."""
    return Processor(None, make_model(vision=False, router_id=199))


def bare_with(**changes: Any) -> Processor:
    return Processor(None, make_model(vision=False, **{"router_id": 199, **changes}))


def test_text_around_the_image_is_tokenised_piece_by_piece(original: Setup) -> None:
    """As LLaVA does: each piece by itself, one start token."""
    result = original.processor.process({"prompt": QUESTION, "multi_modal_data": {"image": picture()}})
    tokenizer = original.processor.tokenizer
    assert tokenizer is not None
    before, after = (tokenizer._ids(piece) for piece in QUESTION.split("<image>"))
    assert before[0] == after[0] == original.tokenizer.bos_id
    assert result.token_ids.tolist() == [*before, -200, *after[1:]]
    assert result.image_starts == (len(before),)
    assert result.num_rows == len(result.token_ids) + NUM_VISUAL - 1
    assert result.num_text_rows == len(result.token_ids) - 1
    router = result.token_ids.tolist().index(original.tokenizer.router_id)
    assert result.router_rows.tolist() == [router + NUM_VISUAL - 1]
    assert result.text == QUESTION and result.grids == ((4, 4),)
    assert not result.token_ids.flags.writeable


def test_the_tokenizers_own_image_token_is_the_placeholder(huggingface: Setup) -> None:
    prompt = {"prompt": QUESTION, "multi_modal_data": {"image": picture()}}
    result = huggingface.processor.process(prompt)
    tokenizer, image_id = huggingface.processor.tokenizer, huggingface.tokenizer.image_id
    assert tokenizer is not None
    ids = tokenizer._ids(QUESTION)
    assert result.token_ids.tolist() == [-200 if token_id == image_id else token_id for token_id in ids]
    for repeats in (1, NUM_VISUAL):
        at = ids.index(image_id)
        given = [*ids[:at], *[image_id] * repeats, *ids[at + 1 :]]
        again = huggingface.processor.process({"prompt_token_ids": given, "multi_modal_data": {"image": picture()}})
        assert again.token_ids.tolist() == result.token_ids.tolist()
    with pytest.raises(ImageError, match=r"repeats the image token 3 times: expected it once, .* \(16\)"):
        huggingface.processor.process(
            {"prompt_token_ids": [1, *[image_id] * 3, 5], "multi_modal_data": {"image": picture()}}
        )
    with pytest.raises(ImageError, match="2 image placeholders for 1 images"):
        huggingface.processor.process(
            {"prompt_token_ids": [1, image_id, 5, image_id], "multi_modal_data": {"image": picture()}}
        )


def test_pixels_are_clips_of_the_padded_image(original: Setup) -> None:
    """Against Pillow and numpy: pad, bicubic resize, scale, normalise."""
    image = picture(50, 30)
    result = original.processor.process({"prompt": QUESTION, "multi_modal_data": {"image": image}})
    assert [image.embeds for image in result.images] == [None]
    resized = pad_to_square(image, MAX_PIXELS).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    expected = (np.asarray(resized) / 255.0 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
    assert result.images[0].views[0].dtype == torch.float32
    np.testing.assert_allclose(result.images[0].views[0].numpy(), expected.transpose(2, 0, 1), atol=1e-5)


def test_the_hugging_face_layout_crops_the_centre(huggingface: Setup) -> None:
    image = picture(60, 30)
    result = huggingface.processor.process({"prompt": QUESTION, "multi_modal_data": {"image": image}})
    resized = image.resize((56, 28), Image.Resampling.BICUBIC).crop((14, 0, 42, 28))
    expected = (np.asarray(resized) / 255.0 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
    np.testing.assert_allclose(result.images[0].views[0].numpy(), expected.transpose(2, 0, 1), atol=1e-5)


def test_a_damaged_image_is_named_by_its_place(original: Setup, tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:-2000])
    with (tmp_path / "cut.png").open("rb") as file:
        for given in (Image.open(file), [Image.open(file)]):
            with pytest.raises(ImageError, match="^image 0: truncated or damaged$"):
                original.processor.process({"prompt": QUESTION, "multi_modal_data": {"image": given}})
        with pytest.raises(ImageError, match="^image 1: truncated or damaged$"):
            original.processor.image(Image.open(file), "image 1")
    with pytest.raises(ImageError, match=r"^image '.*cut\.png': truncated or damaged$"):
        original.processor.process({"prompt": QUESTION, "multi_modal_data": {"image": tmp_path / "cut.png"}})


def test_an_image_may_be_a_path_or_a_list_of_one(original: Setup, tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    results = [
        original.processor.process({"prompt": QUESTION, "multi_modal_data": {"image": image}})
        for image in (picture(), tmp_path / "a.png", str(tmp_path / "a.png"), [picture()])
    ]
    first = results[0].images[0]
    assert first is not None
    for result in results[1:]:
        assert torch.equal(result.images[0].views[0], first.views[0])


def test_ids_and_embeddings(bare: Processor) -> None:
    ids = np.array([1, 5, -200, 7, 199, 9, 199])
    for given in (ids, ids.tolist(), tuple(ids.tolist()), torch.from_numpy(ids)):
        result = bare.process({"prompt_token_ids": given, "multi_modal_data": {"image_embeds": embeds().double()}})
        assert result.prompt_token_ids == tuple(ids.tolist())
        assert (result.image_starts, result.num_rows, result.grids) == ((2,), 22, ((4, 4),))
        assert result.router_rows.tolist() == [19, 21]
        assert torch.equal(result.images[0].embeds, embeds())


def test_embeddings_may_be_an_array(bare: Processor) -> None:
    given = embeds().numpy()[::-1]  # torch takes no negative strides
    result = bare.process({"prompt_token_ids": [-200, 199], "multi_modal_data": {"image_embeds": given}})
    np.testing.assert_array_equal(result.images[0].embeds.numpy(), given)


def test_a_grid_at_either_level(bare: Processor) -> None:
    media = {"image_embeds": embeds(12)}
    prompt = {"prompt_token_ids": [-200, 199], "multi_modal_data": media}
    assert bare.process({**prompt, "image_grid": (3, 4)}).grids == ((3, 4),)
    assert bare.process({**prompt, "multi_modal_data": {**media, "image_grid": [2, 6]}}).grids == ((2, 6),)


def test_text_alone_needs_no_router_token(original: Setup) -> None:
    result = original.processor.process("What is the colour of the sky?")
    assert result.images == result.image_starts == result.grids == ()
    assert result.router_rows.tolist() == [] and result.num_rows == result.num_text_rows == len(result.token_ids)


def test_without_router_token_the_last_row_is_read() -> None:
    pyramid = dataclasses.replace(PYRAMID, use_router_token=False)
    prompt = {"prompt_token_ids": [4, -200, 5, 6], "multi_modal_data": {"image_embeds": embeds(9)}}
    assert bare_with(reduction=pyramid).process(prompt).router_rows.tolist() == [11]
    for no_router in (dataclasses.replace(PYRAMID, pooling_type="random"), NoReduction()):
        assert bare_with(reduction=no_router).process(prompt).router_rows.tolist() == []


def test_a_dense_model_takes_any_number_of_rows() -> None:
    prompt = {"prompt_token_ids": [4, -200, 5], "multi_modal_data": {"image_embeds": embeds(17)}}
    assert bare_with(reduction=NoReduction()).process(prompt).num_rows == 19


def test_routes(bare: Processor) -> None:
    prompt = {"prompt_token_ids": [4, -200, 199], "multi_modal_data": {"image_embeds": embeds()}}
    assert bare.process(prompt).route is None
    assert bare.process({**prompt, "route": [2, None]}).route == (2, None)
    assert bare.process({**prompt, "route": np.array([0, 1])}).route == (0, 1)


def test_one_start_token_where_the_text_brings_its_own(original: Setup) -> None:
    with_own = original.processor.process("<s>What is it?")
    assert with_own.prompt_token_ids.count(original.tokenizer.bos_id) == 1


IMAGE = {"image": picture()}
EMBEDS = {"image_embeds": embeds()}


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("", "prompt is empty"),
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt_token_ids": []}, "prompt is empty"),
        ({}, 'expected one of "prompt" and "prompt_token_ids"'),
        (7, "expected a string or a dict, got int"),
        ({"prompt": 7}, "prompt: expected a string, got int"),
        ({"prompt": "a", "images": []}, r"unknown keys \['images'\]"),
        ({"prompt": "a", "multi_modal_data": {"video": 1}}, r"multi_modal_data: unknown keys \['video'\]"),
        ({"prompt": "a", "multi_modal_data": [1]}, "multi_modal_data: expected a dict"),
        ({"prompt_token_ids": "abc"}, "prompt_token_ids: expected a list of integers, got str"),
        ({"prompt_token_ids": [1, 2.5]}, r"prompt_token_ids\[1\]=2.5: expected an integer"),
        ({"prompt_token_ids": [True]}, r"prompt_token_ids\[0\]=True"),
        ({"prompt_token_ids": [1, 100_000]}, r"prompt_token_ids\[1\]=100000: expected 0 to \d+, or -200"),
        ({"prompt_token_ids": [1, -1]}, r"prompt_token_ids\[1\]=-1"),
        ({"prompt": "a", "multi_modal_data": IMAGE}, "no placeholder: expected <image>"),
        ({"prompt": "<image> a"}, "placeholder, but no image was given"),
        (
            {"prompt": "<image>" * 17 + " a", "multi_modal_data": IMAGE},
            "17 image placeholders: expected at most 16 per prompt",
        ),
        ({"prompt_token_ids": [-200, -200], "multi_modal_data": IMAGE}, "2 image placeholders for 1 images"),
        (
            {"prompt": "<image> a", "multi_modal_data": {"image": [picture()] * 17}},
            "17 images: expected at most 16 per prompt",
        ),
        ({"prompt": "<image> a", "multi_modal_data": {**IMAGE, **EMBEDS}}, "both image and image_embeds"),
        ({"prompt": "<image> a", "multi_modal_data": IMAGE}, "not the router token"),
        ({"prompt": "<ROUTER> a <image> b<ROUTER>", "multi_modal_data": IMAGE}, "before the image at"),
        ({"prompt": QUESTION, "multi_modal_data": {"image": "missing.png"}}, "'missing.png': no such file"),
        ({"prompt": QUESTION, "multi_modal_data": {"image": b"abc"}}, "expected a PIL image or a path, got bytes"),
        ({"prompt": QUESTION, "multi_modal_data": {**IMAGE, "image_grid": (2, 8)}}, r"the vision tower makes \(4, 4\)"),
        (
            {"prompt": QUESTION, "multi_modal_data": {"image_embeds": [[1.0]]}},
            "image_embeds: expected a floating-point tensor",
        ),
        (
            {"prompt": QUESTION, "multi_modal_data": {"image_embeds": torch.ones(4, 8, dtype=torch.int64)}},
            "torch.int64",
        ),
        (
            {"prompt": QUESTION, "multi_modal_data": {"image_embeds": embeds()[:, :7]}},
            r"\[num_visual_tokens, 8\], got \[16, 7\]",
        ),
        ({"prompt": QUESTION, "multi_modal_data": {"image_embeds": embeds()[:0]}}, r"got \[0, 8\]"),
        ({"prompt": QUESTION, "multi_modal_data": {"image_embeds": np.ones((4, 8), dtype=object)}}, "got ndarray"),
        ({"prompt": QUESTION, "multi_modal_data": {"image_embeds": embeds()[None]}}, r"got \[1, 16, 8\]"),
        ({"prompt": QUESTION, "multi_modal_data": {"image_embeds": embeds() / 0}}, "row 0 has NaN or infinite values"),
        ({"prompt": QUESTION, "multi_modal_data": {"image_embeds": embeds(12)}}, "12 rows, which is no square grid"),
        (
            {"prompt": QUESTION, "multi_modal_data": EMBEDS, "image_grid": (3, 5)},
            r"image_grid=\(3, 5\) for image_embeds of 16",
        ),
        ({"prompt": QUESTION, "multi_modal_data": EMBEDS, "image_grid": (-4, -4)}, "image_grid="),
        ({"prompt": QUESTION, "multi_modal_data": EMBEDS, "image_grid": 4}, "expected .rows, columns., two integers"),
        ({"prompt": "a", "route": [0]}, r"route=\[0\]: expected a list of 2 experts"),
        ({"prompt": "a", "route": 2}, "route=2: expected a list of 2"),
        ({"prompt": "a", "route": np.array(2)}, "route=2: expected a list of 2"),
        ({"prompt": "a", "route": [0, 2]}, r"route\[1\]=2: expected an expert from 0 to 1, or None"),
        ({"prompt": "a", "route": [-1, 0]}, r"route\[0\]=-1"),
        ({"prompt": "a", "route": [0.5, 0]}, r"route\[0\]=0.5"),
        ({"prompt": "a", "route": [True, 0]}, r"route\[0\]=True"),
        ({"prompt": "word " * 600}, r"expected at most 511, to leave room for one token"),
    ],
)
def test_refusals(original: Setup, prompt: Any, named: str) -> None:
    with pytest.raises(RequestError, match=named):
        original.processor.process(prompt)


@pytest.mark.parametrize("values", [(math.nan,), (math.inf,), (-math.inf,), (math.inf, -math.inf)], ids=str)
def test_one_value_that_is_not_finite_is_found(bare: Processor, values: tuple[float, ...]) -> None:
    rows = embeds()
    for column, value in enumerate(values):
        rows[11, column] = value
    with pytest.raises(ImageError, match="row 11 has NaN or infinite values"):
        bare.process({"prompt_token_ids": [-200, 1, 199], "multi_modal_data": {"image_embeds": rows}})


def test_values_whose_sum_is_infinite_are_finite(bare: Processor) -> None:
    rows = torch.full((16, HIDDEN_SIZE), torch.finfo(torch.float32).max)
    assert rows.sum().isinf()
    bare.process({"prompt_token_ids": [-200, 1, 199], "multi_modal_data": {"image_embeds": rows}})


def test_the_length_counts_the_images_rows() -> None:
    processor = bare_with(max_positions=20)
    prompt = {"prompt_token_ids": [-200, 1, 1, 199], "multi_modal_data": {"image_embeds": embeds(16)}}
    assert processor.process(prompt).num_rows == 19
    with pytest.raises(RequestError, match=r"20 rows \(5 token ids, the image as 16 rows\): expected at most 19"):
        processor.process({**prompt, "prompt_token_ids": [-200, 1, 1, 1, 199]})


def test_an_engine_without_tokenizer_or_tower(bare: Processor) -> None:
    with pytest.raises(RequestError, match="no tokenizer: expected prompt_token_ids"):
        bare.process("hello")
    with pytest.raises(RequestError, match="no tokenizer"):
        bare.chat([{"role": "user", "content": "hello"}])
    with pytest.raises(ImageError, match="no vision tower, expected image_embeds"):
        bare.process({"prompt_token_ids": [-200, 199], "multi_modal_data": IMAGE})


@pytest.mark.parametrize("size", [(2000, 1), (1, 2000)])
def test_a_very_long_image_does_not_explode(huggingface: Setup, size: tuple[int, int]) -> None:
    processor = Processor(huggingface.directory, huggingface.model, max_pixels=1_000_000)
    with pytest.raises(ImageError, match="scaled to a short side of 28"):
        processor.process({"prompt": QUESTION, "multi_modal_data": {"image": picture(*size)}})


def test_damaged_processor_files(original: Setup, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="tokenizer.json: missing, or no tokenizer"):
        Processor(tmp_path, original.model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((original.directory / name).read_bytes())
    with pytest.raises(EngineError, match="cannot load the image processor"):
        Processor(tmp_path, original.model)
    with pytest.raises(EngineError, match="expected their directory, got None"):
        Processor(None, original.model)
    write_image_processor(tmp_path, IMAGE_SIZE * 2)
    with pytest.raises(DpnError, match=r"gave pixel values \[3, 56, 56\], the vision tower takes \[3, 28, 28\]"):
        Processor(tmp_path, original.model).process({"prompt": QUESTION, "multi_modal_data": IMAGE})


@pytest.mark.parametrize("negative", [False, True])
def test_embeddings_are_a_copy(negative: bool) -> None:
    given = torch._neg_view(embeds()) if negative else embeds()
    result = bare_with().process({"prompt_token_ids": [-200, 199], "multi_modal_data": {"image_embeds": given}})
    expected = given.clone()
    given.zero_()
    assert torch.equal(result.images[0].embeds, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_embeddings_are_kept_in_the_model_s_dtype(dtype: str) -> None:
    processor = Processor(None, dataclasses.replace(make_model(vision=False, router_id=199), dtype=dtype))
    given = embeds().double()
    result = processor.process({"prompt_token_ids": [-200, 199], "multi_modal_data": {"image_embeds": given}})
    rows = result.images[0].embeds
    assert rows is not None and rows.dtype == TORCH_DTYPES[dtype]
    assert torch.equal(rows, given.float().to(rows.dtype))
    for number in (float("nan"), float("inf"), 1e300):
        given[3, 1] = number
        with pytest.raises(ImageError, match="image_embeds: row 3 has NaN or infinite values"):
            processor.process({"prompt_token_ids": [-200, 199], "multi_modal_data": {"image_embeds": given}})


@pytest.mark.parametrize("is_known", [True, False])
def test_keys_of_embeddings_are_computed_for_an_engine_that_compares_images(is_known: bool) -> None:
    processor = Processor(None, make_model(vision=False, router_id=199), keys_of_embeds=is_known)
    result = processor.process({"prompt_token_ids": [-200, 199], "multi_modal_data": {"image_embeds": embeds()}})
    assert ("key" in vars(result.images[0])) == is_known
