"""A dense model -> a DPN with new routers."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from dpn_rt.errors import ConfigError
from dpn_rt.format.engine_dir import check_model
from dpn_rt.model.reduction.pooling_config import PoolingConfig
from dpn_rt.reference.boundary import Boundary
from dpn_rt.reference.model import EagerDpn
from dpn_rt.reference.open_config import OpenConfig


def add_routers(model: EagerDpn, pooling: PoolingConfig, router_token_id: int, *, is_new_token: bool) -> None:
    """Give a dense model boundaries with random weights, in place.

    Prompts are written as Vicuna's from now on, as for every checkpoint of LLaMA's kind in the published layout, which
    `save_checkpoint` writes.

    Args:
        model: dense.
        pooling: the boundaries; they read the router token.
        router_token_id: of `<ROUTER>`; rows of embeddings and head are added up to it.
        is_new_token: whether the model does not know the token: then its rows become the means of all others.

    Raises:
        ConfigError: the model has boundaries, or these do not fit it.
    """
    if model.config.reduction.layers:
        raise ConfigError(f"the model has boundaries: {model.config.reduction.summary}, expected a dense model")
    vocab_size = max(model.config.decoder.vocab_size, router_token_id + 1)
    config = dataclasses.replace(
        model.config,
        decoder=dataclasses.replace(model.config.decoder, vocab_size=vocab_size),
        reduction=pooling,
        prompt=dataclasses.replace(model.config.prompt, template="vicuna_v1", router_token_id=router_token_id),
    )
    check_model(config)
    model.config = OpenConfig.of(config)
    model.stages = config.stage_layers
    for each in pooling.boundaries:
        boundary = Boundary(each, pooling, config.decoder.hidden_size)
        model.boundaries.append(boundary.to(model.device).train(model.training))
    if is_new_token:
        _add_token(model, router_token_id, vocab_size)


def _add_token(model: EagerDpn, token_id: int, vocab_size: int) -> None:
    """Rows of embeddings and head for a token that the model does not know."""
    embeddings, head = model.language_model.embed_tokens, model.lm_head
    embeddings.weight = _with_mean_row(embeddings.weight, token_id, vocab_size)
    if model.config.decoder.tie_word_embeddings:
        head.weight = embeddings.weight
    else:
        head.weight = _with_mean_row(head.weight, token_id, vocab_size)
    embeddings.num_embeddings = head.out_features = model.language_model.config.vocab_size = vocab_size


def _with_mean_row(weight: torch.Tensor, row: int, num_rows: int) -> nn.Parameter:
    mean = weight.detach().float().mean(dim=0, keepdim=True).to(weight.dtype)
    grown = torch.cat((weight.detach(), mean.expand(num_rows - len(weight), -1)))
    grown[row] = mean[0]
    return nn.Parameter(grown)
