"""The exceptions of dpn_rt. Every message says what was wrong, with the value, and what would be right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MAX_MESSAGE = 8000
"""Characters of a message, since files and requests may hold values of any length."""


class DpnError(Exception):
    """Base of every error that dpn_rt raises on purpose.

    A message of more than MAX_MESSAGE characters is cut in its middle: its start says where, its end what is expected.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(_cut(message))


class ConfigError(DpnError, ValueError):
    """A configuration value is missing, unknown or contradicts another."""


class CheckpointError(DpnError):
    """A checkpoint directory cannot be read, or its weights do not match its configuration."""


class EngineError(DpnError):
    """An engine directory is incomplete, corrupt, or of a format this version does not read."""


class PlanError(DpnError):
    """A TensorRT plan cannot be built, loaded or run; the message ends with what the library said."""


class KernelArgumentError(DpnError, ValueError):
    """An argument of a kernel has the wrong shape, dtype, device, layout or content."""


class RequestError(DpnError, ValueError):
    """A request cannot be served as asked: prompt, image, route or sampling parameters.

    `field` is the name of what is wrong, as requests have it; None where it is not one field alone.
    """

    def __init__(self, message: str = "", *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class PromptTooLongError(RequestError):
    """A prompt has more rows than the model's context."""


class ImageError(RequestError):
    """An image cannot be decoded, is too large, or does not belong to the prompt."""


class CapacityError(DpnError):
    """The key-value pool or a limit of the engine is too small for a request."""


class StepError(DpnError):
    """The computation of a request failed. Its output so far is kept, and other requests go on."""


class DeviceError(StepError):
    """The device failed in a step. The engine has stopped, since no later result could be trusted."""


class ShutdownError(StepError):
    """The server has been told to stop, and ends requests that are left."""


class EvaluationError(DpnError):
    """A file of questions, answers or annotations cannot be used, or what is asked of an evaluation contradicts it."""


class TrainingError(DpnError):
    """A model cannot be trained as asked: data, options, or files of an earlier run."""


class BatchError(DpnError):
    """Some prompts of a list failed; the others were served.

    `errors` maps the position of a failed prompt to its error. `outputs` has an entry per prompt, None where it failed.
    """

    def __init__(self, errors: Mapping[int, DpnError], outputs: Sequence[object]) -> None:
        listed = "; ".join(f"prompt {position}: {error}" for position, error in errors.items())
        super().__init__(f"{len(errors)} of {len(outputs)} prompts failed (the rest is in .outputs): {listed}")
        self.errors = dict(errors)
        self.outputs = list(outputs)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.errors, self.outputs)


def _cut(message: str) -> str:
    if len(message) <= MAX_MESSAGE:
        return message
    half = MAX_MESSAGE // 2 - len(" ... ")
    return f"{message[:half]} ... {message[-half:]}"
