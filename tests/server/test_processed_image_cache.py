from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dpn_rt import LLM, SamplingParams
from dpn_rt.errors import ImageError
from dpn_rt.model.vision.visual_input import VisualInput
from dpn_rt.server.processed_image_cache import ProcessedImageCache
from tests.server.conftest import Ask, RunningServer

NUM_BYTES = 3 * 4 * 4 * 4


def visual(file: bytes) -> VisualInput:
    return VisualInput.of_views((torch.full((3, 4, 4), float(len(file))),), (1, 1), 1)


def test_a_file_is_processed_once() -> None:
    cache = ProcessedImageCache(10 * NUM_BYTES)
    seen: list[bytes] = []

    def process(file: bytes) -> VisualInput:
        seen.append(file)
        return visual(file)

    first = cache.get(b"a", process)
    assert cache.get(b"a", process) is first
    assert cache.get(b"bb", process) is not first
    assert cache.get(b"a", process, among_others=True) is not first
    assert seen == [b"a", b"bb", b"a"]
    assert (cache.queries, cache.hits) == (4, 1)


def test_a_broken_file_is_refused_each_time() -> None:
    cache = ProcessedImageCache(10 * NUM_BYTES)

    def refuse(_: bytes) -> VisualInput:
        raise ImageError("truncated")

    for _ in range(2):
        with pytest.raises(ImageError, match="truncated"):
            cache.get(b"a", refuse)
    assert cache.get(b"a", visual).views


@pytest.mark.parametrize(("room", "hits"), [(0, 0), (NUM_BYTES - 1, 0), (NUM_BYTES, 1), (2 * NUM_BYTES, 2)])
def test_it_keeps_as_many_as_fit(room: int, hits: int) -> None:
    cache = ProcessedImageCache(room)
    for file in (b"a", b"bb", b"bb", b"a"):
        cache.get(file, visual)
    assert cache.hits == hits


def test_threads_get_the_same_answer() -> None:
    cache = ProcessedImageCache(4 * NUM_BYTES)
    files = [bytes(number % 7 + 1) for number in range(700)]
    with ThreadPoolExecutor(8) as pool:
        pictures = list(pool.map(lambda file: cache.get(file, visual), files))
    assert all(picture.views[0][0, 0, 0] == len(file) for file, picture in zip(files, pictures, strict=True))


def test_an_image_asked_about_again_is_not_decoded_again(
    server: RunningServer, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask, again = Ask(3), Ask(3, "How many shapes are there?")
    assert server.post(ask.body()).status_code == 200

    def refuse(*_: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr("dpn_rt.server.preparation.decode_image", refuse)
    reply = server.post(again.body())
    expected = llm.chat(again.local_messages, SamplingParams(temperature=0, max_tokens=8))[0].outputs[0].text
    assert reply.json()["choices"][0]["message"]["content"] == expected
