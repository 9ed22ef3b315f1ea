"""`python -m dpn_rt.build`: one-line errors, exit codes, and no files left by a process that is stopped."""

from __future__ import annotations

import io
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dpn_rt import LLM, SamplingParams
from dpn_rt.build import _one_interrupt, main
from dpn_rt.builders import clip_config, decoder_families, hr_tower, huggingface_layout
from dpn_rt.builders.native import build_engine
from dpn_rt.errors import ConfigError, EngineError
from dpn_rt.format.engine_dir import EngineDir
from dpn_rt.model.reduction.spec import parse_spec
from dpn_rt.reference import quantization_report
from tests.builders.checkpoints import OriginalCheckpoint
from tests.builders.test_memory import large_checkpoint

ROOT = Path(__file__).parents[1]


def test_build_and_build_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = OriginalCheckpoint().fill().write(tmp_path / "c")
    arguments = ["--checkpoint", str(path), "--output", str(tmp_path / "e")]
    assert main([*arguments, "--dtype", "bfloat16"]) == 0
    assert EngineDir.open(tmp_path / "e").model.dtype == "bfloat16"
    captured = capsys.readouterr()
    assert (
        captured.out == f"{tmp_path / 'e'}: 0.00 GB, bfloat16, 4 layers, adaptive pooling, 3 stages, 28-pixel images\n"
    )
    assert "100%" in captured.err
    assert "note: no tokenizer files" in captured.err
    assert main(arguments) == 1
    assert capsys.readouterr().err.splitlines()[-1].endswith("replace it with --force (force=True)")
    assert main([*arguments, "--force", "--quiet"]) == 0
    assert EngineDir.open(tmp_path / "e").model.dtype == "float32"
    assert capsys.readouterr() == ("", "")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["c", "e"]


def test_models_are_listed_from_the_tables_themselves(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(clip_config.TOWER_KINDS, "new_vision_model", clip_config.TOWER_KINDS["clip_vision_model"])
    monkeypatch.setitem(decoder_families.FAMILIES, "new_decoder", decoder_families.FAMILIES["qwen3"])
    for arguments in (["--list-models"], ["--quiet", "--list-models", "--dtype", "float32"]):
        with pytest.raises(SystemExit) as info:
            main(arguments)
        assert info.value.code == 0
        out, err = capsys.readouterr()
        assert err == ""
        tables = {
            table.split(":")[0]: [line.split()[0] for line in table.splitlines()[1:]] for table in out.split("\n\n")
        }
        assert list(tables) == ["models", "decoders", "towers", "rotary rules"]
        original = [*decoder_families.ORIGINAL_FAMILIES, "(any"]
        assert tables["models"] == [*huggingface_layout.MODEL_KINDS, *original]
        assert tables["decoders"] == list(decoder_families.FAMILIES) and "new_decoder" in tables["decoders"]
        assert tables["towers"] == [*clip_config.TOWER_KINDS, *hr_tower.FAMILIES]
        assert "new_vision_model" in tables["towers"]
        assert max(map(len, out.splitlines())) <= 120 and not [
            line for line in out.splitlines() if line != line.rstrip()
        ]


def test_the_working_directory_as_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = OriginalCheckpoint().fill().write(tmp_path / "c")
    (tmp_path / "e").mkdir()
    monkeypatch.chdir(tmp_path / "e")
    for options in ([], ["--force"]):
        assert main(["--checkpoint", str(path), "--output", ".", "--quiet", *options]) == 0
        assert Path.cwd() == tmp_path / "e"
        EngineDir.open(Path())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["c", "e"]


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--checkpoint", str(tmp_path / "c"), "--output", str(tmp_path / "e")]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'c'}: not a directory\n"


def test_paths_that_are_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = OriginalCheckpoint().fill().write(tmp_path / "c")
    assert main(["--checkpoint", str(path), "--output", str(tmp_path / "e"), "--quiet"]) == 0
    for checkpoint, output, message in (
        (
            tmp_path / "e",
            tmp_path / "f",
            f"{tmp_path / 'e'}: is an engine, expected the checkpoint that it was built from",
        ),
        (path, path / "config.json" / "e", f"{path / 'config.json'} is not a directory; nothing was left behind"),
    ):
        assert main(["--checkpoint", str(checkpoint), "--output", str(output)]) == 1
        assert capsys.readouterr().err.splitlines()[-1].endswith(message)


@pytest.mark.parametrize(
    "option",
    [
        ["--tensorrt-flavor", "rtx"],
        ["--sm", "86"],
        ["--max-batch", "8"],
        ["--max-prefill-batch", "2"],
        ["--max-rows", "5"],
    ],
)
def test_options_without_an_effect(tmp_path: Path, option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    path = OriginalCheckpoint().fill().write(tmp_path / "c")
    assert main(["--checkpoint", str(path), "--output", str(tmp_path / "e"), *option]) == 1
    assert capsys.readouterr().err == f"error: {option[0]}: expected --backend tensorrt as well, which it is for\n"
    assert not (tmp_path / "e").exists()


def test_an_interrupted_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = OriginalCheckpoint().fill().write(tmp_path / "c")
    monkeypatch.setattr(quantization_report, "quantization_report", lambda *_: signal.raise_signal(signal.SIGINT))
    arguments = ["--checkpoint", str(path), "--output", str(tmp_path / "e"), "--quantize", "int8", "--dtype", "float32"]
    assert main([*arguments, "--report", str(tmp_path / "r.json")]) == 130
    assert capsys.readouterr().err.endswith(f"interrupted; {tmp_path / 'e'} is built, without its report\n")
    EngineDir.open(tmp_path / "e")


NOT_UTF8 = "caf\udce9"
"""What Python makes of the bytes `caf\\xe9` in an argument."""


@pytest.mark.parametrize("name", ["--checkpoint", "--output", "--vision-tower"])
def test_directories_whose_names_are_not_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """The libraries that read tokenizers and weights cannot open them."""
    path = OriginalCheckpoint().fill().write(tmp_path / "c")
    odd = tmp_path / NOT_UTF8
    path.rename(odd) if name == "--checkpoint" else odd.mkdir()
    arguments = {"--checkpoint": path, "--output": tmp_path / "e", name: odd}
    assert main([part for pair in arguments.items() for part in map(str, pair)]) == 1
    error = capsys.readouterr().err
    assert f"{str(odd)!r}: its name is not UTF-8" in error and "rename it" in error and "Traceback" not in error


def test_output_that_the_terminal_cannot_show_is_escaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = OriginalCheckpoint().fill().write(tmp_path / "c")
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert main(["--checkpoint", str(path), "--output", str(tmp_path / "caf\u00e9")]) == 0
    assert written.getvalue().decode("ascii").startswith(f"{tmp_path}/caf\\xe9: 0.00 GB")


@pytest.mark.parametrize("arguments", [[], ["--checkpoint", "x", "--output", "y", "--dtype", "int4"], ["--what"]])
def test_usage_errors(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as info:
        main(arguments)
    assert info.value.code == 2


def start(path: Path, output: Path, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "dpn_rt.build", "--checkpoint", str(path), "--output", str(output)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)  # type: ignore


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_build_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    path = large_checkpoint().write(tmp_path / "c")
    # A runner of tests that goes on without its terminal ignores hang-ups, and so would the build.
    process = start(path, tmp_path / "e", bufsize=0, preexec_fn=lambda: signal.signal(number, signal.SIG_DFL))
    assert process.stderr is not None
    seen = ""
    while "building" not in seen and process.poll() is None:
        seen += process.stderr.read(1)
    process.send_signal(number)
    process.send_signal(number)  # a second signal changes nothing
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1].endswith("interrupted; nothing was left behind")
    assert "Traceback" not in errors
    assert [file.name for file in tmp_path.iterdir()] == ["c"]


def test_a_closed_terminal_does_not_end_a_build_under_nohup() -> None:
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with _one_interrupt():
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_links_in_a_circle_as_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = OriginalCheckpoint().fill().write(tmp_path / "c")
    (tmp_path / "loop").symlink_to("loop")
    for output in (tmp_path / "loop", tmp_path / "loop" / "e"):
        assert main(["--checkpoint", str(path), "--output", str(output), "--quiet"]) == 1
        assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'loop'}")


@pytest.mark.parametrize(("name", "value"), [("dtype", "int8"), ("dtype", 3), ("quantize", "int2")])
def test_choices_that_there_are_not(tmp_path: Path, name: str, value: object) -> None:
    path = OriginalCheckpoint().fill().write(tmp_path / "c")
    with pytest.raises(ConfigError, match=f"^{name}={value!r}: expected one of "):
        build_engine(path, tmp_path / "e", **{name: value})  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="its name has a NUL character"):
        build_engine(path, f"{tmp_path}/e\0")


def test_disk_that_fills_up_leaves_nothing(tmp_path: Path) -> None:
    path = large_checkpoint().write(tmp_path / "c")

    def limit_file_size() -> None:  # above what an editable install writes when it is imported
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    process = start(path, tmp_path / "e", preexec_fn=limit_file_size)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.splitlines()[-1].startswith(f"error: {tmp_path / 'e'}: cannot be written: File too large")
    assert "Traceback" not in errors
    assert [file.name for file in tmp_path.iterdir()] == ["c"]


def test_directory_that_may_not_be_written(tmp_path: Path) -> None:
    path = OriginalCheckpoint().fill().write(tmp_path / "c")
    (tmp_path / "file").write_text("mine")
    process = start(path, tmp_path / "file" / "e")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in errors
    assert "cannot be written" in errors


def test_a_training_free_reduction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is the default of the engine; a checkpoint with a trained one refuses it."""
    dense, trained = ROOT / "examples/tiny_dpn/dense_checkpoint", ROOT / "examples/tiny_dpn/checkpoint"
    for spec, stages in (("fastv:k=2,ratio=0.5", 2), ("pool:kernel=2x2", 1), ("none", None)):
        output = tmp_path / spec.partition(":")[0]
        assert main(["--checkpoint", str(dense), "--output", str(output), "--reduce", spec]) == 0
        said = "dense" if stages is None else f"{parse_spec(spec, 8).spec}, {stages} stage"
        assert said in capsys.readouterr().out
        llm = LLM(output)
        scene = {"type": "image", "image": str(ROOT / "examples/images/scene_1.png")}
        messages = [{"role": "user", "content": [scene, {"type": "text", "text": "What is this?"}]}]
        pyramid = llm.chat(messages, SamplingParams(max_tokens=2))[0].pyramid
        assert pyramid.visual_tokens == {2: [256, 128], 1: [64], None: [256]}[stages]
    arguments = ["--checkpoint", str(trained), "--output", str(tmp_path / "x"), "--reduce", "fastv"]
    assert main(arguments) == 1 and "a trained reduction of its own" in capsys.readouterr().err
    arguments = ["--checkpoint", str(dense), "--output", str(tmp_path / "y"), "--reduce", "fastv:k=99"]
    assert main(arguments) == 1 and "k=99: expected 1 to" in capsys.readouterr().err
    assert not (tmp_path / "x").exists() and not (tmp_path / "y").exists()


def test_signals_that_come_together_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The later one finds a handler that is being replaced. Where that is SIG_IGN, Python prints a line about it."""
    printed: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)
    signals = {signal.SIGINT, signal.SIGTERM}
    with pytest.raises(KeyboardInterrupt), _one_interrupt():
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        for number in signals:
            signal.raise_signal(number)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    assert not printed


def test_a_library_may_answer_an_interrupt_with_an_error_of_its_own() -> None:
    with pytest.raises(KeyboardInterrupt), _one_interrupt():
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape") from None
    with pytest.raises(ValueError, match="no signal"), _one_interrupt():
        raise ValueError("no signal")
