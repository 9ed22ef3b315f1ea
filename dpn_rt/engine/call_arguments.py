"""Arguments of a call with many prompts: one value for all prompts, or one for each."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar, cast

from dpn_rt.errors import RequestError
from dpn_rt.sampling.params import SamplingParams
from dpn_rt.schema.text import shown

Prompt = TypeVar("Prompt")
_NONE_LEFT = "none"


def with_arguments(
    prompts: Iterable[Prompt],
    params: SamplingParams | Iterable[SamplingParams] | None,
    priority: int | Iterable[int] | None,
) -> Iterator[tuple[Prompt, SamplingParams, int]]:
    """Prompts with their parameters and priorities, each taken when it is asked for.

    Raises:
        RequestError: there are fewer of one of them than prompts, or one has the wrong type.
    """
    is_one = params is None or isinstance(params, SamplingParams)
    each = itertools.repeat(params or SamplingParams()) if is_one else iter(cast(Iterable[SamplingParams], params))
    priorities = iter(priority) if isinstance(priority, Iterable) else itertools.repeat(priority or 0)
    for position, prompt in enumerate(prompts):
        own = next(each, None)
        if not isinstance(own, SamplingParams):
            raise RequestError(f"sampling_params of prompt {position}: expected SamplingParams, got {shown(own)}")
        yield prompt, own, checked_priority(next(priorities, _NONE_LEFT), f"priority of prompt {position}: ")


def params_of_each(params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int) -> list[SamplingParams]:
    """The parameters of each of some prompts.

    Raises:
        RequestError: they are no `SamplingParams`, or another number of them.
    """
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * num_prompts
    if not isinstance(params, Sequence) or not all(isinstance(item, SamplingParams) for item in params):
        raise RequestError(f"sampling_params={shown(params)}: expected SamplingParams, or a list with one per prompt")
    if len(params) != num_prompts:
        raise RequestError(f"{num_prompts} prompts with {len(params)} sampling parameters: expected as many")
    return list(params)


def priorities_of_each(priority: int | Sequence[int] | None, num_prompts: int) -> list[int]:
    """The priority of each of some prompts.

    Raises:
        RequestError: they are no integers, or another number of them.
    """
    if priority is None or not isinstance(priority, Sequence) or isinstance(priority, str):
        return [checked_priority(priority)] * num_prompts
    if len(priority) != num_prompts:
        raise RequestError(f"{num_prompts} prompts with {len(priority)} priorities: expected as many")
    return [checked_priority(item, f"priority of prompt {position}: ") for position, item in enumerate(priority)]


def checked_priority(value: Any, name: str = "priority=") -> int:
    """A priority; None is 0.

    Raises:
        RequestError: it is no integer.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        return 0 if value is None else operator.index(value)
    except TypeError:
        raise RequestError(f"{name}{shown(value)}: expected an integer; a lower one goes first") from None
