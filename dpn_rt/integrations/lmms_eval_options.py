"""lmms-eval's options, of a model and of a task's generation, in the product's terms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpn_rt.errors import ConfigError, RequestError
from dpn_rt.sampling.params import SamplingParams
from dpn_rt.schema.text import shown

AUTO_BATCH_SIZE = 64
_TAKEN_OVER = ("top_p", "top_k", "repetition_penalty", "seed", "skip_special_tokens")
_WITHOUT_EFFECT = ("image_aspect_ratio",)
"""The engine's own preprocessing has been chosen at its build."""
_KNOWN = ("until", "stop_sequences", "max_new_tokens", "temperature", "do_sample", "num_beams", *_TAKEN_OVER)


def sampling_params(options: Mapping[str, Any], max_new_tokens: int) -> SamplingParams:
    """Sampling parameters of a task's `generation_kwargs`.

    Args:
        options: a value of None is as if it were left out. Without `temperature`, or with `do_sample: false`, the most
            probable token is taken.
        max_new_tokens: of tasks that do not say.

    Raises:
        RequestError: an option is unknown or not supported, or its value is out of range.
    """
    given = {name: value for name, value in options.items() if value is not None and name not in _WITHOUT_EFFECT}
    for name in given:
        if name not in _KNOWN:
            raise RequestError(f"generation_kwargs has {shown(name)}: expected one of {', '.join(_KNOWN)}")
    if given.get("num_beams", 1) != 1:
        raise RequestError(f"num_beams={shown(given['num_beams'])}: beam search is not supported, expected 1")
    samples = given.get("do_sample", "temperature" in given)
    temperature = given.get("temperature", 1.0) if samples else 0.0
    kept = {name: given[name] for name in _TAKEN_OVER if name in given}
    if temperature == 0:  # tasks that ask for no sampling say top_p=0 as well
        kept.pop("top_p", None)
    return SamplingParams(
        temperature=temperature,
        max_tokens=given.get("max_new_tokens", max_new_tokens),
        stop=[*_strings(given.get("until")), *_strings(given.get("stop_sequences"))],
        **kept,
    )


def batch_size(value: Any) -> int:
    """The number of sequences that `batch_size` asks for; `auto` and `auto:N` are 64.

    Raises:
        ConfigError: it is no number above 0.
    """
    text = str(value)
    if text == "auto" or text.startswith("auto:"):
        return AUTO_BATCH_SIZE
    if not text.isascii() or not text.isdigit() or len(text) > 9 or int(text) < 1:
        raise ConfigError(f"batch_size={shown(value)}: expected a number of 1 or more, or auto")
    return int(text)


def unquoted(value: Any) -> Any:
    """A value of `--model_args` without quotation marks around it: they are needed where it has commas."""
    if isinstance(value, str) and len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
        return value[1:-1]
    return value


def _strings(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
