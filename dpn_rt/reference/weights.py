"""Converts an engine's weights to the eager model's parameters, and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import nn

from dpn_rt.builders.names import NameMap
from dpn_rt.errors import CheckpointError
from dpn_rt.format.config import ModelConfig
from dpn_rt.format.weight_spec import weight_spec
from dpn_rt.model.vision.hr.names import is_strided


def load_canonical(model: nn.Module, names: NameMap, weights: Iterable[tuple[str, torch.Tensor]], copy: bool) -> None:
    """Put canonical weights into `model`.

    Args:
        model: may be on the meta device.
        names: canonical name -> names of the parameters that the weight is split into.
        weights: canonical (name, tensor) pairs.
        copy: False lets the parameters share the tensors' memory where the layout allows it.

    Raises:
        CheckpointError: weights missing, unknown, or of the wrong shape; the message names them all.
    """
    problems, seen = [], set()
    for name, tensor in weights:
        seen.add(name)
        if name not in names:
            problems.append(f"{name} is not a weight of this model")
            continue
        parts = [model.get_parameter(part) for part in names[name]]
        if list(tensor.shape) != _canonical_shape(name, parts):
            problems.append(f"{name} has shape {list(tensor.shape)}, expected {_canonical_shape(name, parts)}")
            continue
        if len(parts) == 1:
            _assign(model, names[name][0], _to_parameter_shape(name, tensor, parts[0]), copy)
            continue
        for part, rows in zip(names[name], torch.split(tensor, [part.shape[0] for part in parts]), strict=True):
            _assign(model, part, rows, copy)
    problems += [f"{name} is missing" for name in names if name not in seen]
    if problems:
        raise CheckpointError("weights do not fit the model:\n  " + "\n  ".join(problems))


HEAD, EMBEDDINGS = "lm_head.weight", "language_model.embed_tokens.weight"


def store_tied_head_once(model: Any) -> None:
    """Let `state_dict` of a model with tied weights name their tensor once: safetensors refuses two names for one.

    `load_state_dict` takes it with one name and with two.
    """
    model.register_state_dict_post_hook(_leave_out_head)
    model.register_load_state_dict_pre_hook(_restore_head)


def _leave_out_head(_: nn.Module, state: dict[str, Any], prefix: str, __: object) -> None:
    state.pop(prefix + HEAD, None)


def _restore_head(_: nn.Module, state: dict[str, Any], prefix: str, *__: object) -> None:
    if prefix + EMBEDDINGS in state:
        state.setdefault(prefix + HEAD, state[prefix + EMBEDDINGS])


def canonical_weights(model: nn.Module, names: NameMap, config: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Canonical (name, tensor) pairs of `model`, one at a time, in an engine's order and dtypes.

    Parameters that an engine fuses (q, k and v; gate and up) are concatenated.
    """
    for name, spec in weight_spec(config).items():
        parts = [model.get_parameter(source).detach() for source in names[name]]
        tensor = torch.cat(parts) if len(parts) > 1 else _to_canonical_shape(name, parts[0])
        yield name, tensor.to(spec.dtype).contiguous()


def _is_depthwise(parameter: torch.Tensor) -> bool:
    return parameter.dim() == 4 and parameter.shape[1] == 1


def _has_pixels(name: str) -> bool:
    """Whether a canonical weight is a convolution whose columns are pixels of all channels."""
    return is_strided(name.rpartition(".")[0]) and name.endswith(".weight")


def _to_canonical_shape(name: str, parameter: torch.Tensor) -> torch.Tensor:
    if _is_depthwise(parameter):  # [H, 1, kh, kw] -> [kh * kw, H]
        return parameter.flatten(1).t()
    if _has_pixels(name):  # [out, in, kh, kw] -> [out, kh * kw * in]
        return parameter.permute(0, 2, 3, 1).flatten(1)
    return parameter.flatten(1) if parameter.dim() == 4 else parameter


def _to_parameter_shape(name: str, tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    if _is_depthwise(parameter):
        tensor = tensor.t().contiguous()
    if _has_pixels(name):
        out, channels, height, width = parameter.shape
        return tensor.view(out, height, width, channels).permute(0, 3, 1, 2).contiguous()
    return tensor.reshape(parameter.shape)


def _canonical_shape(name: str, parts: list[nn.Parameter]) -> list[int]:
    shape = list(_to_canonical_shape(name, parts[0]).shape)
    return shape if len(parts) == 1 else [sum(part.shape[0] for part in parts), *shape[1:]]


def _assign(model: nn.Module, path: str, value: torch.Tensor, copy: bool) -> None:
    module_path, _, name = path.rpartition(".")
    module = model.get_submodule(module_path)
    old = cast(nn.Parameter, getattr(module, name))
    value = value.to(old.dtype)
    setattr(module, name, nn.Parameter(value.clone() if copy else value, requires_grad=old.requires_grad))
