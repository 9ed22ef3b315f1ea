"""What each rank has of a model: whole heads, and slices of matrices.

Of the decoder the result is one of its own, with fewer heads and a narrower MLP, so that the layers compute it as any
other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from dpn_rt.errors import ConfigError
from dpn_rt.model.config import DecoderConfig
from dpn_rt.model.decoder_weights import EMBED_TOKENS, FINAL_NORM, LAYERS, decoder_pairs, head_module
from dpn_rt.model.layer_pair import LayerPair, take_rows
from dpn_rt.model.ranks import vocabulary_parts
from dpn_rt.model.vision.encoder import ENCODER_PREFIXES
from dpn_rt.model.weights.tiles import TILE_ROWS
from dpn_rt.schema.dtypes import Quantize


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
    if config.vocab_size <= TILE_ROWS * (size - 1):
        yield f"vocab_size {config.vocab_size} has no {TILE_ROWS} tokens for each"
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
    """Which part of a model one rank has."""

    whole: DecoderConfig
    rank: int
    size: int
    encoder_pairs: Sequence[LayerPair] = ()
    """Of vision encoder and projector, which all ranks share; empty: rank 0 has them alone."""

    @property
    def config(self) -> DecoderConfig:
        """Of the part of the decoder."""
        config = self.whole
        return replace(
            config,
            num_heads=config.num_heads // self.size,
            num_kv_heads=max(1, config.num_kv_heads // self.size),
            intermediate_size=config.intermediate_size // self.size,
        )

    def tensors(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Canonical name -> the part's tensor, copied, so that the mapped file can be let go.

        What is in no pair, such as norms, each rank has that needs it. Rank 0 alone has the reducers.

        Args:
            weights: of the engine.
        """
        pairs = [pair for layer in range(self.whole.num_layers) for pair in decoder_pairs(self.whole, layer)]
        pairs += self.encoder_pairs
        tables = {EMBED_TOKENS, head_module(self.whole)}
        cut = tables.union(*((pair.first, pair.second) for pair in pairs))
        own = {
            name: tensor.clone()
            for name, tensor in weights.items()
            if name.rpartition(".")[0] not in cut and self._has(name)
        }
        for pair in pairs:
            own.update(pair.tensors(weights, self.rank, self.size))
        for table in tables:
            own.update(take_rows(weights, table, [vocabulary_parts(self.whole.vocab_size, self.size)[self.rank]]))
        return own

    def _has(self, name: str) -> bool:
        """Whether the rank has a weight that is not cut."""
        shared = (f"{LAYERS}.", f"{FINAL_NORM}.", *(ENCODER_PREFIXES if self.encoder_pairs else ()))
        return self.rank == 0 or name.startswith(shared)
