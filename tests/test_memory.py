"""Too little memory of the host is told in our words, whichever library noticed it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dpn_rt import build, generate, serve, train_routers
from dpn_rt.errors import CapacityError, EngineError
from dpn_rt.evaluate import __main__ as evaluate
from dpn_rt.memory import lacks_memory
from dpn_rt.server.engine_client import worker
from dpn_rt.server.engine_client.messages import EngineSource, Loaded
from dpn_rt.settings import EngineOptions


def caused(error: Exception, cause: Exception) -> Exception:
    try:
        raise error from cause
    except Exception as raised:
        return raised


LACKS: dict[str, Exception] = {
    "Python": MemoryError(),
    "the system": OSError(12, "Cannot allocate memory"),
    "torch": RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"),
    "the loader": ImportError("libtorch_cpu.so: failed to map segment from shared object"),
    "C++": RuntimeError("std::bad_alloc"),
    "a cause": caused(EngineError("processor: cannot load"), caused(ValueError("no"), MemoryError())),
}
OTHERS = (RuntimeError("shape"), OSError(2, "No such file"), EngineError("no engine"), None)


def test_lacks_of_memory_are_recognised() -> None:
    assert all(map(lacks_memory, LACKS.values())) and not any(map(lacks_memory, OTHERS))


def raising(error: Exception) -> Any:
    def function(*arguments: object, **options: object) -> None:
        raise error

    return function


EXPECTED = "error: nowhere: not enough memory to load the engine: expected room for its files (0 bytes), its KV cache"


@pytest.mark.parametrize("name", LACKS)
def test_commands_say_so(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(serve, "_serve", raising(LACKS[name]))
    assert serve.main(["--engine", "nowhere"]) == 1
    assert capsys.readouterr().err.startswith(EXPECTED)
    monkeypatch.setattr(generate, "_prompt", raising(LACKS[name]))
    assert generate.main(["--engine", "nowhere", "--prompt", "a"]) == 1
    assert capsys.readouterr().err.startswith(EXPECTED)
    monkeypatch.setattr(evaluate, "_run", raising(LACKS[name]))
    files = ["--question-file", "questions.jsonl", "--answers-file", "answers.jsonl"]
    assert evaluate.main(["run", "--engine", "nowhere", *files]) == 1
    assert capsys.readouterr().err.startswith(EXPECTED)
    monkeypatch.setattr(build, "_build", raising(LACKS[name]))
    assert build.main(["--checkpoint", "nowhere", "--output", "engine"]) == 1
    assert capsys.readouterr().err.startswith("error: nowhere: not enough memory to build an engine: expected room for")
    monkeypatch.setattr(train_routers, "_options", raising(LACKS[name]))
    assert train_routers.main(["--checkpoint", "c", "--data", "d", "--output", "o"]) == 1
    assert capsys.readouterr().err.startswith("error: not enough memory: expected more, or a smaller --batch-size")


def test_commands_leave_other_errors_as_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve, "_serve", raising(caused(CapacityError("lower kv_cache_bytes"), MemoryError())))
    assert serve.main(["--engine", "nowhere"]) == 1
    assert capsys.readouterr().err == "error: lower kv_cache_bytes\n"
    monkeypatch.setattr(serve, "_serve", raising(RuntimeError("a defect")))
    with pytest.raises(RuntimeError, match="a defect"):
        serve.main(["--engine", "nowhere"])


@pytest.mark.parametrize("name", LACKS)
def test_the_engines_process_tells_the_server(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights").write_bytes(bytes(1234))
    sent: list[Loaded] = []

    class Channel:
        def send(self, message: Loaded) -> None:
            sent.append(message)

    monkeypatch.setattr(worker, "set_up_logs", lambda level, as_json: None)
    monkeypatch.setattr(worker, "load_bare_engine", raising(LACKS[name]))
    assert worker._load(EngineSource(tmp_path, "cpu", EngineOptions()), Channel()) is None  # type: ignore[arg-type]
    assert isinstance(sent[0].error, CapacityError) and "its files (1,234 bytes)" in str(sent[0].error)
