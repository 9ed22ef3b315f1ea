"""`python -m dpn_rt.generate` with a fake engine: its requests, its output and its exit codes."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import dpn_rt
from dpn_rt.drawing import draw_pyramid, draw_pyramids
from dpn_rt.errors import EngineError, RequestError
from dpn_rt.generate import main
from dpn_rt.outputs import (
    CompletionOutput,
    PrefillFlops,
    Pyramid,
    ReductionStep,
    RequestMetrics,
    RequestOutput,
    StreamDelta,
)
from tests.prompts.conftest import Setup, original

__all__ = ["original"]

OUTPUT = RequestOutput(
    request_id="0",
    prompt_token_ids=[1, 5, -200, 7],
    outputs=[CompletionOutput(0, "A boat.", [8, 9, 2], None, None, "stop", None)],
    metrics=RequestMetrics(arrival=10.0, queue=0.0, first_token=10.5, finish=11.0),
    pyramid=Pyramid(
        [2, None],
        [(2, 2), None],
        [[0.1, 0.2, 0.7], None],
        [16, 4, 4],
        [19, 7, 7],
        [(4, 4), (2, 2), (2, 2)],
        image_grid=(4, 4),
        patches_per_token=[(1, 1), (2, 2), (2, 2)],
    ),
)

FASTV = "fastv:k=2,ratio=0.5"
REDUCED = {
    spec: dataclasses.replace(
        OUTPUT.pyramid,
        experts=[None, None],
        kernels=[None, None],
        visual_tokens=counts,
        kv_lengths=[3 + count for count in counts],
        kept=kept,
        steps=[ReductionStep(1, spec)] * len(kept),
        reduction=spec,
        patches_per_token=[(1, 1)] * 3,
        flops=PrefillFlops(600, 1000, saved),
    )
    for spec, counts, kept, saved in ((FASTV, [16, 2, 2], [[3, 8]], 0.4), ("none", [16, 16, 16], [], 0.0))
}
"""What the fake engine answers by a prompt's reduction."""


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, original: Setup) -> Callable[..., list[Any]]:
    """Replaces LLM by a fake; returns the list of its calls."""

    def put(
        failure: BaseException | None = None,
        load_failure: BaseException | None = None,
        lead: Sequence[str] = ("A ",),
        text: str = "boat.",
    ) -> list[Any]:
        calls: list[Any] = []

        class StandIn:
            def __init__(
                self, engine: str, device: str, verify: bool, reduce: Any = None, tensor_parallel_size: int = 1
            ) -> None:
                if load_failure is not None:
                    raise load_failure
                calls.append((engine, device, verify) if reduce is None else (engine, device, verify, reduce))
                self.processor = original.processor

            def stream(self, prompt: Any, params: Any) -> Iterator[StreamDelta]:
                calls.append((prompt, params))
                for delta in lead:
                    yield StreamDelta(delta)
                if failure is not None:
                    raise failure
                completion = dataclasses.replace(OUTPUT.outputs[0], text="".join(lead) + text)
                output = dataclasses.replace(OUTPUT, outputs=[completion])
                pyramid = REDUCED.get(prompt.get("reduce"), OUTPUT.pyramid)
                yield StreamDelta(text, output=dataclasses.replace(output, pyramid=pyramid))

        monkeypatch.setitem(dpn_rt.__dict__, "LLM", StandIn)
        return calls

    return put


def test_it_streams_the_answer_and_reports(
    install: Callable[..., list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    calls = install()
    arguments = ["--engine", "e", "--image", "a.jpg", "--prompt", "What?", "--max-tokens", "5", "--route", "2,none"]
    assert main(arguments) == 0
    assert calls[0] == ("e", "auto", True)
    prompt, params = calls[1]
    assert prompt["prompt"].endswith("USER: <image>\nWhat?<ROUTER> ASSISTANT:")
    assert prompt["multi_modal_data"] == {"image": "a.jpg"} and prompt["route"] == [2, None]
    assert params.max_tokens == 5 and params.is_greedy
    answer, *report = capsys.readouterr().out.splitlines()
    assert answer == "A boat."
    assert report == [
        "route           2x2, skipped",
        "rows per stage  19, 7, 7",
        "KV rows at end  21, 9, 9",
        "time            first token 0.500 s, 3 tokens in 1.000 s, 250.0 ms per token",
    ]


@pytest.mark.parametrize("arguments", [["--raw", "--prompt", "plain text"], ["--prompt", "<image> what?"]])
def test_raw_prompts_get_no_template(install: Callable[..., list[Any]], arguments: list[str]) -> None:
    calls = install()
    assert main(["--engine", "e", *arguments]) == 0
    assert calls[1][0] == {"prompt": arguments[-1]}


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_an_answer_that_the_terminal_cannot_show_is_escaped(
    install: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    install(text="caf\u00e9 \U0001f408.")
    for encoding, errors in (("ascii", "strict"), ("ascii", "surrogateescape"), ("latin-1", "strict")):
        written = io.BytesIO()
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding=encoding, errors=errors))
        assert main(["--engine", "e", "--prompt", "Hi", *arguments]) == 0
        text = written.getvalue().decode(encoding)
        if arguments:
            assert json.loads(text)["text"] == "A caf\u00e9 \U0001f408."
        else:
            assert text.startswith("A caf\u00e9" if encoding == "latin-1" else "A caf\\xe9 \\U0001f408.\n")


NOT_UTF8 = "caf\udce9"
"""What Python makes of the bytes `caf\\xe9` in an argument."""


@pytest.mark.parametrize("options", [["--prompt", NOT_UTF8], ["--prompt", "Hi", "--device", NOT_UTF8]])
def test_an_argument_that_is_not_utf8(
    install: Callable[..., list[Any]], capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    calls = install()
    assert main(["--engine", "e", *options]) == 1
    assert capsys.readouterr().err == f"error: {options[-2]} 'caf\\udce9': not UTF-8, expected text in UTF-8\n"
    assert not calls


def test_files_may_have_any_name(install: Callable[..., list[Any]], tmp_path: Path) -> None:
    calls = install()
    image, drawn = tmp_path / f"{NOT_UTF8}.png", tmp_path / f"{NOT_UTF8} drawn.png"
    Image.new("RGB", (20, 20)).save(image)
    assert main(["--engine", NOT_UTF8, "--image", str(image), "--prompt", "?", "--show-pyramid", str(drawn)]) == 0
    assert calls[0][0] == NOT_UTF8 and drawn.is_file()


def test_checksums_can_be_skipped(install: Callable[..., list[Any]]) -> None:
    calls = install()
    assert main(["--engine", "e", "--prompt", "Hi", "--skip-verify"]) == 0
    assert calls[0] == ("e", "auto", False)


def test_output_that_cannot_be_written(install: Callable[..., list[Any]], capfd: pytest.CaptureFixture[str]) -> None:
    install(failure=BrokenPipeError(32, "Broken pipe"))
    assert main(["--engine", "e", "--prompt", "Hi"]) == 1
    assert capfd.readouterr().err == "error: standard output: Broken pipe\n"


def test_json_is_one_object(install: Callable[..., list[Any]], capsys: pytest.CaptureFixture[str]) -> None:
    install()
    assert main(["--engine", "e", "--prompt", "Hi", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["text"] == "A boat." and result["experts"] == [2, None] and result["rows"] == [19, 7, 7]
    assert result["seconds"] == {"queue": 0.0, "first_token": 0.5, "total": 1.0}


def test_the_pyramid_is_drawn_over_the_image_as_the_tower_saw_it(
    install: Callable[..., list[Any]], tmp_path: Path, original: Setup
) -> None:
    install()
    wide, drawn = tmp_path / "wide.png", tmp_path / "pyramid.png"
    Image.new("RGB", (60, 20), (200, 0, 0)).save(wide)
    assert main(["--engine", "e", "--image", str(wide), "--prompt", "What?", "--show-pyramid", str(drawn)]) == 0
    seen = original.processor.seen_image(original.processor.chat(question_about(wide)))
    expected = draw_pyramid(seen, OUTPUT.pyramid, question="What?", answer="A boat.")
    with Image.open(drawn) as picture:
        assert np.array_equal(np.asarray(picture), np.asarray(expected))
    # Padded to a square with CLIP's mean colour above and below the red band.
    assert np.abs(np.asarray(seen)[0, 0].astype(int) - (122, 116, 104)).max() <= 1
    assert np.abs(np.asarray(seen)[seen.height // 2, seen.width // 2].astype(int) - (200, 0, 0)).max() <= 1


def test_several_reductions_are_compared(
    install: Callable[..., list[Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str], original: Setup
) -> None:
    calls = install()
    image, drawn = tmp_path / "image.png", tmp_path / "drawn.png"
    Image.new("RGB", (60, 20), (200, 0, 0)).save(image)
    arguments = ["--engine", "e", "--image", str(image), "--prompt", "What?", "--reduce", FASTV, "none"]
    assert main([*arguments, "--show-pyramid", str(drawn)]) == 0
    assert calls[0] == ("e", "auto", True, [FASTV, "none"])
    assert [prompt["reduce"] for prompt, _ in calls[1:]] == [FASTV, "none"]
    time = "time            first token 0.500 s, 3 tokens in 1.000 s, 250.0 ms per token"
    assert capsys.readouterr().out.splitlines() == [
        "A boat.",
        f"reduction       {FASTV}",
        "visual tokens   16, 2, 2",
        "FLOPs saved     40.0 % of the prefill",
        "rows per stage  19, 5, 5",
        "KV rows at end  21, 7, 7",
        time,
        "",
        "A boat.",
        "reduction       none",
        "visual tokens   16, 16, 16",
        "FLOPs saved     0.0 % of the prefill",
        "rows per stage  19, 19, 19",
        "KV rows at end  21, 21, 21",
        time,
        f"picture         {drawn}",
    ]
    seen = original.processor.seen_image(original.processor.chat(question_about(image)))
    answers = [(REDUCED[spec], "A boat.") for spec in (FASTV, "none")]
    with Image.open(drawn) as picture:
        assert np.array_equal(np.asarray(picture), np.asarray(draw_pyramids(seen, answers, question="What?")))
    assert main([*arguments, "--json"]) == 0
    replies = json.loads(capsys.readouterr().out)["answers"]
    assert [(each["reduction"], each["kept"], each["flops_saved"]) for each in replies] == [
        (FASTV, [[3, 8]], 0.4),
        ("none", [], 0.0),
    ]


def test_one_reduction_is_the_engines_default(
    install: Callable[..., list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    calls = install()
    assert main(["--engine", "e", "--prompt", "Hi", "--json", "--reduce", FASTV]) == 0
    assert calls[0] == ("e", "auto", True, [FASTV]) and "reduce" not in calls[1][0]
    assert json.loads(capsys.readouterr().out)["text"] == "A boat."


@pytest.mark.parametrize("position", ["last", "before another option"])
def test_the_picture_has_a_default_name(
    install: Callable[..., list[Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    position: str,
) -> None:
    install()
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "photos" / "my.cat.png")
    monkeypatch.chdir(tmp_path)
    options = ["--prompt", "What?", "--image", "photos/my.cat.png"]
    drawing = ["--show-pyramid"]
    assert main(["--engine", "e", *(options + drawing if position == "last" else drawing + options)]) == 0
    assert (tmp_path / "my.cat-pyramid.png").is_file()
    assert capsys.readouterr().out.splitlines()[-1] == "picture         my.cat-pyramid.png"
    assert main(["--engine", "e", "--prompt", "What?", "--show-pyramid"]) == 1
    assert capsys.readouterr().err == "error: --show-pyramid: there is no image to draw over, expected --image\n"


@pytest.mark.parametrize("lead", [[" A"], [" ", "A"], ["", " \n", " A"]])
def test_spaces_at_the_beginning_of_an_answer_are_not_shown(
    install: Callable[..., list[Any]], capsys: pytest.CaptureFixture[str], lead: list[str]
) -> None:
    install(lead=lead, text=" boat. ")
    assert main(["--engine", "e", "--prompt", "Hi"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "A boat. "
    assert main(["--engine", "e", "--prompt", "Hi", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == "".join(lead) + " boat. "


def question_about(image: Path) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image", "image": str(image)}, {"type": "text", "text": "What?"}]}]


@pytest.mark.parametrize(
    ("target", "with_image", "named"),
    [
        ("pyramid.png", False, "there is no image to draw over"),
        ("pyramid.txt", True, "expected a name that ends in .png"),
        ("missing/pyramid.png", True, "cannot write there"),
    ],
)
def test_a_picture_that_cannot_be_drawn_is_refused_before_the_engine_loads(
    install: Callable[..., list[Any]],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    target: str,
    with_image: bool,
    named: str,
) -> None:
    calls = install()
    image = ["--image", "a.png"] if with_image else []
    assert main(["--engine", "e", "--prompt", "Hi", "--show-pyramid", str(tmp_path / target), *image]) == 1
    assert named in capsys.readouterr().err
    assert not calls


@pytest.mark.parametrize(
    ("options", "failures", "status", "named"),
    [
        (["--prompt", "Hi", "--max-tokens", "0"], {}, 1, "error: max_tokens=0"),
        (["--prompt", " "], {}, 1, "error: --prompt is empty"),
        (["--prompt", "Hi"], {"load_failure": EngineError("e: no engine.json")}, 1, "error: e: no engine.json"),
        (["--prompt", "Hi", "--json"], {"failure": RequestError("too long")}, 1, "error: too long"),
        (["--prompt", "Hi"], {"failure": KeyboardInterrupt()}, 130, "interrupted"),
        (["--prompt", "Hi"], {"load_failure": KeyboardInterrupt()}, 130, "interrupted"),
    ],
)
def test_errors_are_one_line(
    install: Callable[..., list[Any]],
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    failures: dict[str, BaseException],
    status: int,
    named: str,
) -> None:
    install(**failures)
    assert main(["--engine", "e", *options]) == status
    captured = capsys.readouterr()
    assert captured.err.startswith(named) and captured.err.count("\n") == 1
    assert "{" not in captured.out


def test_a_wrong_route_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--engine", "e", "--prompt", "Hi", "--route", "2,x"])
    assert caught.value.code == 2
    assert "expected experts separated by commas" in capsys.readouterr().err
