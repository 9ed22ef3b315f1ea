"""A decorator for the functions of `dpn_rt.ops`: errors name the argument that is not a tensor with rows."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import is_dataclass
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from dpn_rt.errors import KernelArgumentError

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def checked_op(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Turns Python's own errors within `function` into errors that name the wrong argument.

    The arguments are examined only after an error, so that calls without errors cost nothing more.

    Raises (from the decorated function):
        KernelArgumentError: an argument that should be a tensor is something else, is sparse, or has no dimensions.
    """
    signature = inspect.signature(function)
    optional = {name: "None" in str(parameter.annotation) for name, parameter in signature.parameters.items()}
    tensors = [name for name, parameter in signature.parameters.items() if "Tensor" in str(parameter.annotation)]
    lists = [name for name in tensors if "Sequence" in str(signature.parameters[name].annotation)]

    @wraps(function)
    def explained(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        try:
            return function(*args, **kwargs)
        except KernelArgumentError:
            raise
        except (AttributeError, IndexError, TypeError, RuntimeError) as error:
            given = signature.bind(*args, **kwargs).arguments
            for name, value in given.items():
                for field, found in vars(value).items() if is_dataclass(value) else ():  # of tensors, as a layout is
                    if fault := _fault(found):
                        raise KernelArgumentError(f"{function.__name__}: {name}.{field} {fault}") from error
            for name in tensors:
                found = given.get(name)
                fault = None if found is None and optional[name] else _fault(found, is_list=name in lists)
                if fault is not None:
                    raise KernelArgumentError(f"{function.__name__}: {name} {fault}") from error
            raise

    return explained


def _fault(value: object, is_list: bool = False) -> str | None:
    """End of the error message for a value that should be a tensor, or a list of tensors; None if it is one."""
    if isinstance(value, list | tuple):
        fault = next(filter(None, map(_fault, value)), None)
        return fault if fault or is_list else f"is of type {type(value).__name__}, expected a tensor"
    if not isinstance(value, Tensor):
        return f"is of type {type(value).__name__}, expected a tensor"
    if value.layout != torch.strided:
        return f"has layout {value.layout}, expected {torch.strided}"
    if value.ndim == 0:
        return "has no dimensions, expected at least 1"
    return None
