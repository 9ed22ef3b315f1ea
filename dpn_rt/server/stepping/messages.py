"""What a server and the process of its engine say to each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dpn_rt.engine.engine import StepResult
from dpn_rt.engine.loader import RuntimeConfig
from dpn_rt.prompts.processor import ProcessedPrompt
from dpn_rt.sampling.params import SamplingParams
from dpn_rt.server.stepping.stepper import Load


@dataclass(frozen=True, slots=True)
class LogConfig:
    """Logs of the engine's process, beside the server's own."""

    level: str = "info"
    as_json: bool = False


@dataclass(frozen=True, slots=True)
class EngineSource:
    """To the process, first of all: what to load. Who sends it verifies the files meanwhile."""

    path: Path
    device: str
    runtime: RuntimeConfig
    logs: LogConfig = LogConfig()


@dataclass(frozen=True, slots=True)
class Add:
    """To the process: queue a request."""

    call: int
    request_id: str
    prompt: ProcessedPrompt
    params: SamplingParams
    priority: int


@dataclass(frozen=True, slots=True)
class Abort:
    """To the process: end a request."""

    call: int
    request_id: str


@dataclass(frozen=True, slots=True)
class Loaded:
    """From the process, once: the engine is there, or why not."""

    load: Load
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class Answered:
    """From the process: the end of a call."""

    call: int
    value: object
    error: Exception | None


@dataclass(frozen=True, slots=True)
class Stepped:
    """From the process: the end of a step."""

    result: StepResult
    load: Load
    failure: str | None
    """What has ended the engine."""
