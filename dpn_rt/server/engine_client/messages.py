"""What the server and the engine's process say to each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from dpn_rt.engine.engine import Engine, StepResult
from dpn_rt.prompts.processor import ProcessedPrompt
from dpn_rt.sampling.params import SamplingParams
from dpn_rt.settings import EngineOptions


@dataclass(frozen=True)
class Load:
    """What the engine had to do when it last reported."""

    unfinished: int = 0
    """Requests that wait or run."""
    running: int = 0
    """Sequences that hold blocks of the KV cache."""
    waiting: int = 0
    """Sequences that wait for blocks or for a place among the running ones."""
    kv_blocks_used: int = 0
    kv_blocks: int = 0
    preemptions: int = 0
    """Since the start, like all fields after this one."""
    prompt_rows: int = 0
    """Of the prompts that have got a first token."""
    generated_tokens: int = 0
    prefix_queries: int = 0
    """Rows of prompts."""
    prefix_hits: int = 0
    """Rows of prompts that had been computed before."""
    image_queries: int = 0
    """Images of prompts."""
    image_hits: int = 0
    """Images of prompts that did not go through the vision tower."""
    prefix_evictions: int = 0
    """Prefixes that gave way to others."""

    @classmethod
    def of(cls, engine: Engine) -> Load:
        """The load of an engine now."""
        cache = engine.runner.cache
        return cls(
            engine.num_unfinished,
            engine.num_running,
            engine.num_waiting,
            cache.num_blocks - cache.num_free_blocks,
            cache.num_blocks,
            engine.num_preemptions,
            engine.num_prompt_rows,
            engine.num_generated_tokens,
            *engine.runner.reuse_statistics(),
        )


@dataclass(frozen=True)
class LogConfig:
    """Logs of the engine's process; the server's own are set up alike."""

    level: str = "info"
    as_json: bool = False


@dataclass(frozen=True)
class EngineSource:
    """To the process, first of all: what to load. The sender verifies the files meanwhile."""

    path: Path
    device: str
    options: EngineOptions
    logs: LogConfig = LogConfig()


@dataclass(frozen=True)
class Add:
    """To the process: queue a request. One update will refuse it, or one will have its output."""

    request_id: str
    prompt: ProcessedPrompt
    params: SamplingParams
    priority: int


@dataclass(frozen=True)
class Abort:
    """To the process: end a request before the next step. Without effect on a request that has ended."""

    request_id: str


@dataclass(frozen=True)
class Loaded:
    """From the process, once: the engine is loaded, or why it cannot be."""

    load: Load
    error: Exception | None = None


@dataclass(frozen=True)
class Update:
    """From the process, after each step and after the messages that it handled between two steps."""

    load: Load
    result: StepResult = field(default_factory=StepResult)
    """What the step added; aborted requests are among the finished ones."""
    refused: dict[str, Exception] = field(default_factory=dict)
    """Request id -> what `Engine.add_request` raised."""
    failure: str | None = None
    """What has ended the engine. No update follows."""
