"""What each rank has of a decoder: whole heads, and slices of its matrices.

The result is a decoder of its own, with fewer heads and a narrower MLP, so that the layers compute it as any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from dpn_rt.errors import ConfigError
from dpn_rt.model.config import DecoderConfig
from dpn_rt.model.decoder_weights import (
    DOWN,
    FINAL_NORM,
    GATE_UP,
    LAYERS,
    LM_HEAD,
    O_PROJ,
    QKV,
    head_module,
    layer_module,
)
from dpn_rt.model.weights.dense import DenseWeight
from dpn_rt.model.weights.forms import form_of
from dpn_rt.model.weights.tiles import TILE_ROWS
from dpn_rt.schema.weights import Quantize

NamedTensors = Iterator[tuple[str, Tensor]]


def check_shards(config: DecoderConfig, quantize: Quantize, size: int) -> None:
    """Refuse a number of ranks that the decoder cannot be split over.

    Args:
        config: of the whole decoder.
        quantize: form of its matrices: those in 8 or 4 bits are cut between tiles of 16 rows.
        size: number of ranks, at least 1.

    Raises:
        ConfigError: names every size that does not divide, and what would do.
    """
    problems = list(_problems(config, quantize, size))
    if problems:
        fitting = [n for n in range(1, config.num_heads + 1) if not any(_problems(config, quantize, n))]
        raise ConfigError(
            f"tensor_parallel_size={size}: {'; '.join(problems)}: expected one of {', '.join(map(str, fitting))}"
        )


def _problems(config: DecoderConfig, quantize: Quantize, size: int) -> Iterator[str]:
    if size == 1:
        return
    for name in ("num_heads", "intermediate_size"):
        if getattr(config, name) % size:
            yield f"{name} {getattr(config, name)} is not a multiple of it"
    if config.num_kv_heads % size and size % config.num_kv_heads:
        yield f"num_kv_heads {config.num_kv_heads} is neither a multiple of it nor divides it"
    if quantize == "none":
        return
    rows = {
        "queries": config.num_heads * config.head_dim,
        "keys": max(config.num_kv_heads, size) * config.head_dim,
        "the MLP": config.intermediate_size,
        "hidden_size": config.hidden_size,
    }
    for name, count in rows.items():
        if count % (size * TILE_ROWS):
            yield f"{name}: {count} / {size} rows are not whole tiles of {TILE_ROWS} rows, as {quantize} matrices need"


@dataclass(frozen=True)
class Shard:
    """Which part of a decoder one rank has."""

    whole: DecoderConfig
    quantize: Quantize
    rank: int
    size: int

    @property
    def config(self) -> DecoderConfig:
        """Of the part. Its output layer has weights of its own, for the part of the vocabulary that it has."""
        config = self.whole
        return replace(
            config,
            num_heads=config.num_heads // self.size,
            num_kv_heads=max(1, config.num_kv_heads // self.size),
            intermediate_size=config.intermediate_size // self.size,
            tie_word_embeddings=False,
        )

    @property
    def splits_head(self) -> bool:
        """Whether each rank has a part of the vocabulary; otherwise rank 0 has the whole output layer."""
        unit = 1 if self.quantize == "none" else TILE_ROWS
        return self.whole.vocab_size % (self.size * unit) == 0

    def tensors(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Canonical name -> the part's tensor, copied, so that the mapped file can be let go.

        Rank 0 alone has what comes before and between the stages: embeddings, vision encoder, reducers.

        Args:
            weights: of the engine.
        """
        own = {name: tensor.clone() for name, tensor in weights.items() if self._has_whole(name)}
        for layer in range(self.whole.num_layers):
            own.update(self._layer(weights, layer))
        own.update(self._head(weights))
        return own

    def _has_whole(self, name: str) -> bool:
        """Whether the rank has a weight as it is: norms, and on rank 0 all that is not in a layer."""
        module = name.rpartition(".")[0]
        if module.startswith(f"{LAYERS}."):
            return module.rpartition(".")[2] not in (QKV, O_PROJ, GATE_UP, DOWN)
        return module == FINAL_NORM or (self.rank == 0 and module != LM_HEAD)

    def _layer(self, weights: Mapping[str, Tensor], layer: int) -> NamedTensors:
        config = self.whole
        names = {part: layer_module(layer, part) for part in (QKV, O_PROJ, GATE_UP, DOWN)}
        yield from _rows(weights, names[QKV], self._qkv_rows())
        yield from _rows(weights, names[GATE_UP], self._parts((config.intermediate_size,) * 2))
        for part, columns in ((O_PROJ, config.num_heads * config.head_dim), (DOWN, config.intermediate_size)):
            if form_of(weights, names[part]) is not DenseWeight:
                yield from _rows(weights, names[part], self._parts((config.hidden_size,)))
                continue
            (own,) = self._parts((columns,))
            yield f"{names[part]}.weight", weights[f"{names[part]}.weight"][:, own].clone()
            bias = weights.get(f"{names[part]}.bias")
            if bias is not None and self.rank == 0:  # the sum over the ranks has it once
                yield f"{names[part]}.bias", bias.clone()

    def _head(self, weights: Mapping[str, Tensor]) -> NamedTensors:
        size = self.whole.vocab_size
        if not self.splits_head and self.rank:
            return
        rows = self._parts((size,)) if self.splits_head else (slice(0, -(-size // TILE_ROWS) * TILE_ROWS),)
        yield from _rows(weights, head_module(self.whole), rows, LM_HEAD)

    def _qkv_rows(self) -> Sequence[slice]:
        """Of whole heads. Where there are fewer KV heads than ranks, several ranks have the same one."""
        config = self.whole
        queries = self._parts((config.num_heads * config.head_dim,))
        first = self.rank * config.num_kv_heads // self.size
        count = max(1, config.num_kv_heads // self.size)
        starts = [(config.num_heads + part * config.num_kv_heads + first) * config.head_dim for part in (0, 1)]
        return (*queries, *(slice(start, start + count * config.head_dim) for start in starts))

    def _parts(self, sizes: Sequence[int]) -> Sequence[slice]:
        """The rank's share of each of several matrices, one below the other."""
        parts, start = [], 0
        for size in sizes:
            share = size // self.size
            parts.append(slice(start + self.rank * share, start + (self.rank + 1) * share))
            start += size
        return parts


def _rows(weights: Mapping[str, Tensor], module: str, rows: Sequence[slice], name: str | None = None) -> NamedTensors:
    """Some rows of a layer and of its bias, under its name or another one."""
    for suffix, tensor in form_of(weights, module).take_rows(weights, module, rows).items():
        yield f"{name or module}.{suffix}", tensor
    bias = weights.get(f"{module}.bias")
    if bias is not None:
        yield f"{name or module}.bias", DenseWeight.take_rows({"bias.weight": bias}, "bias", rows)["weight"]
