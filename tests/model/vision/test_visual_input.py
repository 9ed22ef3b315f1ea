"""Keys of images depend on their content."""

from __future__ import annotations

import hashlib

import pytest
import torch

from dpn_rt.errors import ImageError
from dpn_rt.model.vision.visual_input import VisualInput, check_view_shapes


def test_equal_content_has_equal_keys() -> None:
    views = torch.randn(3, 4, 4), torch.randn(3, 2, 2)
    image = VisualInput.of_views(views, (2, 2), 4)
    assert image.key == VisualInput.of_views([view.clone() for view in views], (2, 2), 4).key
    assert image.nbytes == (3 * 16 + 3 * 4) * 4


def test_other_content_has_another_key() -> None:
    a, b, rows = torch.randn(3, 4, 4), torch.randn(3, 4, 4), torch.randn(4, 12)
    changed = a.clone()
    changed[0, 0, 0] += 1e-6
    images = [
        VisualInput.of_views((a,), (2, 2), 4),
        VisualInput.of_views((changed,), (2, 2), 4),
        VisualInput.of_views((a,), (1, 4), 4),
        VisualInput.of_views((a.reshape(3, 2, 8),), (2, 2), 4),
        VisualInput.of_views((a, b), (2, 2), 4),
        VisualInput.of_views((b, a), (2, 2), 4),
        VisualInput.of_views((torch.stack((a, b)),), (2, 2), 4),
        VisualInput.of_embeds(rows, (2, 2)),
        VisualInput.of_embeds(rows, (1, 4)),
        VisualInput.of_views((rows,), (2, 2), 4),
    ]
    assert len({image.key for image in images}) == len(images)


def test_embeddings_are_read_only_where_their_key_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    digests: list[bytes] = []
    sha256 = hashlib.sha256
    monkeypatch.setattr(hashlib, "sha256", lambda start: digests.append(start) or sha256(start))
    rows = torch.randn(4, 12)
    image, other = VisualInput.of_embeds(rows, (2, 2)), VisualInput.of_embeds(rows, (2, 2))
    assert image.handle == image.handle != other.handle and not digests
    assert image.key == other.key and len(digests) == 2
    assert VisualInput.of_embeds(rows.bfloat16(), (2, 2)).key != image.key
    picture = VisualInput.of_views((rows,), (2, 2), 4)
    assert len(digests) == 4, "a picture's key is computed where it is prepared"
    assert picture.handle == VisualInput.of_views((rows.clone(),), (2, 2), 4).handle


def test_embeddings_count_their_rows() -> None:
    image = VisualInput.of_embeds(torch.randn(6, 8), (2, 3))
    assert (image.views, image.num_visual_tokens, image.nbytes) == ((), 6, 6 * 8 * 4)


@pytest.mark.parametrize(
    ("shapes", "named"),
    [
        ([], "image: embeddings, expected pixels [3, 4, 4] and [3, 2, 2]"),
        ([(3, 4, 4)], "image: pixels [3, 4, 4], expected pixels [3, 4, 4] and [3, 2, 2]"),
        ([(3, 2, 2), (3, 4, 4)], "image: pixels [3, 2, 2] and [3, 4, 4], expected pixels [3, 4, 4] and [3, 2, 2]"),
    ],
)
def test_views_of_other_shapes_are_refused(shapes: list[tuple[int, ...]], named: str) -> None:
    views = [torch.zeros(shape) for shape in shapes]
    image = VisualInput.of_views(views, (1, 1), 1) if views else VisualInput.of_embeds(torch.zeros(1, 8), (1, 1))
    expected = [(3, 4, 4), (3, 2, 2)]
    with pytest.raises(ImageError) as error:
        check_view_shapes(image, expected)
    assert str(error.value) == named
    check_view_shapes(VisualInput.of_views([torch.zeros(shape) for shape in expected], (1, 1), 1), expected)
