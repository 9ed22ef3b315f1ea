"""The LLaMA decoder in stages. It sees packed rows and block tables; nothing of images, requests or scheduling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from dpn_rt import ops
from dpn_rt.model.config import DecoderConfig
from dpn_rt.model.decoder_weights import FINAL_NORM, LayerWeights, load_embedding, load_head
from dpn_rt.model.layer import Layer
from dpn_rt.model.ranks import RankGroup
from dpn_rt.model.stage_batch import CacheView, NextAttention, StageBatch
from dpn_rt.model.windows import first_keys


class Stage:
    """A run of decoder layers whose rows share lengths, positions and block tables."""

    def __init__(self, config: DecoderConfig, layers: list[Layer], layers_per_block: int, is_last: bool) -> None:
        self._config = config
        self._layers = layers
        self._layers_per_block = layers_per_block
        self._is_last = is_last
        self._windows = sorted({layer.window for layer in layers if layer.window is not None})

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @property
    def first_layer(self) -> Layer:
        return self._layers[0]

    @property
    def last_layer(self) -> Layer:
        return self._layers[-1]

    @property
    def last_layer_place(self) -> tuple[int, int]:
        """Group of KV blocks of the last layer, and its place within a block."""
        return divmod(len(self._layers) - 1, self._layers_per_block)

    def forward(self, x: Tensor, batch: StageBatch, blocks: Tensor, key_positions: Tensor | None = None) -> Tensor:
        """Rows through the stage's layers.

        Args:
            x: `[num_rows, hidden_size]`; overwritten.
            batch: where the rows stand.
            blocks: of the KV pool.
            key_positions: of the KV pool; may be None where no layer has a window.

        Returns:
            `[num_rows, hidden_size]`; from the last stage of a prefill `[num_ends, hidden_size]`, the last row of each
            sequence that ends in the batch.
        """
        residual, addend = self.run(x, None, batch, blocks, key_positions)
        return residual if addend is None else residual.add_(addend)

    def run(
        self,
        residual: Tensor,
        addend: Tensor | None,
        batch: StageBatch,
        blocks: Tensor,
        key_positions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As `forward`, of the sum of two tensors and as the sum of two, which the next norm adds on its way.

        Args:
            residual: `[num_rows, hidden_size]`; overwritten.
            addend: `[num_rows, hidden_size]`; overwritten. None: nothing is added.

        Returns:
            The two, of the shape that `forward` returns.
        """
        firsts: dict[int, Tensor] = {}
        if self._windows:
            assert key_positions is not None, "the KV pool of a model with windows has positions"
            firsts = first_keys(batch, key_positions, self._windows)
        for index, layer in enumerate(self._layers):
            x = add_norm(addend, residual, layer.input_norm, self._config.rms_norm_eps)
            group, layer_in_block = divmod(index, self._layers_per_block)
            layer_firsts = None if layer.window is None else firsts[layer.window]
            cache = CacheView(blocks, layer_in_block, batch.block_tables[group], layer_firsts)
            keys, is_last = batch.keys if index == 0 else None, index == len(self._layers) - 1
            if self._is_last and is_last and batch.last_rows is not None:
                residual = residual.index_select(0, batch.last_rows)
                if not len(batch.last_rows):
                    layer.attend(x, cache, batch, keys=keys)  # for the keys and values alone
                    return residual, None
                attended = layer.attend_last(x, cache, batch, batch.last_rows, keys=keys)
            else:
                queries_out = batch.queries_out if is_last else None
                attended = layer.attend(x, cache, batch, keys=keys, queries_out=queries_out)
            addend = layer.mlp(attended, residual)
        return residual, addend


def add_norm(addend: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of rows `[num_rows, hidden_size]`.

    Args:
        addend: is added to `residual` in place before, and its memory takes the result; None: nothing is added.
        residual: the rows.
        weight: `[hidden_size]`.
        eps: of the norm.
    """
    if addend is None:
        return ops.rms_norm(residual, weight, eps)
    return ops.add_rms_norm(addend, residual, weight, eps, out=addend)


class Decoder:
    """Embedding, stages and head."""

    def __init__(
        self,
        config: DecoderConfig,
        stage_layers: Sequence[range],
        weights: Mapping[str, Tensor],
        cos_sin: Tensor,
        layers_per_block: int,
        *,
        prepack: bool,
        group: RankGroup | None = None,
    ) -> None:
        """
        Args:
            config: of the decoder, or of one rank's part (`shards.py`).
            stage_layers: layers of each stage.
            weights: of an engine, or of one rank's part.
            cos_sin: `[max_length, head_dim]` as `rope.rope_table` makes it.
            layers_per_block: of the KV pool.
            prepack: as of `Weight.load`.
            group: the ranks that have the other parts; None: this is the whole decoder.
        """
        self._config, self._group = config, group
        self._norm = weights[f"{FINAL_NORM}.weight"]
        self._embedding = load_embedding(weights, config, self._norm.dtype, group)
        self._head = load_head(weights, config, group)
        self.stages = [
            Stage(
                config,
                [
                    Layer(
                        config,
                        LayerWeights.load(
                            weights,
                            layer,
                            config,
                            prepack=prepack,
                            with_parts=index > 0 and layer == layers[0],
                            group=group,
                        ),
                        cos_sin,
                        config.window(layer),
                        group,
                    )
                    for layer in layers
                ],
                layers_per_block,
                is_last=index == len(stage_layers) - 1,
            )
            for index, layers in enumerate(stage_layers)
        ]

    @property
    def query_shape(self) -> tuple[int, int]:
        """Heads of all ranks, and size of each, of a row's queries."""
        return self._config.num_heads * (1 if self._group is None else self._group.size), self._config.head_dim

    @property
    def is_shared(self) -> bool:
        """Whether other ranks have parts of it."""
        return self._group is not None

    def own_heads(self, queries: Tensor) -> Tensor:
        """`[num_queries, num_heads, head_dim]` of this rank, of those of all ranks."""
        if self._group is None:
            return queries
        return queries.chunk(self._group.size, dim=1)[self._group.rank].contiguous()

    def mean_of_ranks(self, scores: Tensor) -> Tensor:
        """The mean over all heads, of scores `[num_scores]` that are means over each rank's heads; in their memory."""
        return scores if self._group is None else self._group.sum(scores).div_(self._group.size)

    @property
    def scale(self) -> float:
        """Of queries times keys."""
        return float(self._config.head_dim**-0.5)

    def next_attention(self, stage: int, rows: Tensor, positions: Tensor, last_rows: Tensor) -> NextAttention:
        """Of the first layer after a stage, see `Layer.next_attention`."""
        return self.stages[stage + 1].first_layer.next_attention(rows, positions, last_rows)

    def embed(self, token_ids: Tensor) -> Tensor:
        """`[num_tokens]` -> `[num_tokens, hidden_size]`."""
        return self._embedding(token_ids)

    def logits(self, x: Tensor) -> Tensor:
        """`[num_seqs, hidden_size]` leaving the last stage -> `[num_seqs, vocab_size]`, dtype of the engine."""
        return self._head(ops.rms_norm(x, self._norm, self._config.rms_norm_eps))

    def decode(
        self,
        x: Tensor,
        positions: Tensor,
        cache_rows: Tensor,
        kv_lengths: Tensor,
        block_tables: Sequence[Tensor],
        cu_seqlens: Tensor,
        blocks: Tensor,
        key_positions: Tensor | None = None,
    ) -> Tensor:
        """One new row for each sequence through all stages.

        Args:
            x: `[num_seqs, hidden_size]` that enter the first stage, as `embed` makes them; overwritten.
            positions: `[num_stages, num_seqs]` int32 rotary position of the new row.
            cache_rows: `[num_stages, num_seqs]` int32 row of the cache that takes the new row: the last one.
            kv_lengths: `[num_stages, num_seqs]` int32 rows in the cache, the new one included.
            block_tables: per stage `[groups, num_seqs, max_blocks]` int32.
            cu_seqlens: `[num_seqs + 1]` int32, 0 to num_seqs.
            blocks: of the KV pool.
            key_positions: see `Stage.forward`.

        Returns:
            Logits `[num_seqs, vocab_size]`, dtype of the engine.
        """
        addend: Tensor | None = None
        for index, (stage, tables) in enumerate(zip(self.stages, block_tables, strict=True)):
            batch = StageBatch(
                cu_seqlens, positions[index], cache_rows[index], kv_lengths[index], tables, last_rows=None
            )
            x, addend = stage.run(x, addend, batch, blocks, key_positions)
        return self._head(add_norm(addend, x, self._norm, self._config.rms_norm_eps))
