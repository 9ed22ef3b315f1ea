"""The exception tree. Every message says what was wrong, with the value, and what would be right."""

from __future__ import annotations


class DpnError(Exception):
    """Base of every error that dpn_rt raises on purpose."""


class ConfigError(DpnError, ValueError):
    """A configuration value is missing, unknown or contradicts another."""


class CheckpointError(DpnError):
    """A checkpoint directory cannot be read, or its weights do not match its configuration."""


class EngineError(DpnError):
    """An engine directory is incomplete, corrupt, or of a format this version does not read."""


class KernelArgumentError(DpnError, ValueError):
    """An argument of a kernel has the wrong shape, dtype, device, layout or content."""


class RequestError(DpnError, ValueError):
    """A request cannot be served as asked: prompt, image, route or sampling parameters."""


class ImageError(RequestError):
    """An image cannot be decoded, is too large, or does not belong to the prompt."""


class CapacityError(DpnError):
    """The key-value pool or a limit of the engine is too small for a request."""
