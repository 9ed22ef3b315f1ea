"""The LLaMA decoder in stages. It sees packed rows and block tables; nothing of images, requests or scheduling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dpn_rt import ops
from dpn_rt.model.config import DecoderConfig
from dpn_rt.model.decoder_weights import FINAL_NORM, LayerWeights, load_embedding, load_head
from dpn_rt.model.ranks import RankGroup
from dpn_rt.model.rope import rotate
from dpn_rt.model.stage_batch import CacheView, NextAttention, StageBatch
from dpn_rt.model.windows import first_keys


class Layer:
    """Attention and MLP on packed rows, each with its norm and residual."""

    def __init__(
        self,
        config: DecoderConfig,
        weights: LayerWeights,
        cos_sin: Tensor,
        window: int | None,
        group: RankGroup | None = None,
    ) -> None:
        self._config, self._group = config, group
        self._weights = weights
        self._cos_sin = cos_sin
        self.window = window
        """Positions that a row sees, its own included; None: all before it."""
        self._scale = config.head_dim**-0.5

    def attend(
        self,
        x: Tensor,
        cache: CacheView,
        batch: StageBatch,
        *,
        keys: Tensor | None = None,
        queries_out: Tensor | None = None,
    ) -> Tensor:
        """Attention of all rows; their keys and values go to the cache.

        Args:
            x: `[num_rows, hidden_size]`, the normed input.
            cache: of the layer.
            batch: where the rows stand.
            keys: see `StageBatch`.
            queries_out: see `StageBatch`.

        Returns:
            `[num_rows, num_heads * head_dim]`.
        """
        qkv = self._project(x, keys)
        self._store(qkv, cache, batch)
        q, k, v = self._split(qkv)
        if queries_out is not None and batch.last_rows is not None:
            queries_out.copy_(self._all_heads(q.index_select(0, batch.last_rows)))
        if batch.is_decode:
            return ops.attention_decode(
                q,
                cache.blocks,
                cache.layer_in_block,
                cache.block_table,
                batch.context_lens,
                scale=self._scale,
                first_keys=cache.first_keys,
            )
        if batch.extends:
            return ops.attention_extend(
                q,
                cache.blocks,
                cache.layer_in_block,
                cache.block_table,
                batch.cu_seqlens,
                batch.context_lens,
                scale=self._scale,
                first_keys=cache.first_keys,
            )
        return ops.attention(q, k, v, batch.cu_seqlens, causal=True, scale=self._scale, first_keys=cache.first_keys)

    def attend_last(
        self, x: Tensor, cache: CacheView, batch: StageBatch, last_rows: Tensor, *, keys: Tensor | None = None
    ) -> Tensor:
        """As `attend`, but only the last row of each sequence that ends here attends.

        The last layer of a prefill stores keys and values of all rows; its other outputs are not read.

        Returns:
            `[num_ends, num_heads * head_dim]`; at least one sequence ends.
        """
        qkv = self._project(x, keys)
        self._store(qkv, cache, batch)
        table, context_lens = cache.block_table, batch.context_lens
        if batch.last_seqs is not None:
            table, context_lens = (each.index_select(0, batch.last_seqs) for each in (table, context_lens))
        q = self._split(qkv.index_select(0, last_rows))[0]
        firsts = None if cache.first_keys is None else cache.first_keys.index_select(0, last_rows)
        return ops.attention_decode(
            q, cache.blocks, cache.layer_in_block, table, context_lens, scale=self._scale, first_keys=firsts
        )

    def mlp(self, attended: Tensor, residual: Tensor) -> Tensor:
        """Attention's output layer, and the MLP.

        Args:
            attended: `[num_rows, num_heads * head_dim]`.
            residual: `[num_rows, hidden_size]`, updated in place; lacks the returned MLP output.

        Returns:
            `[num_rows, hidden_size]` MLP output.
        """
        x = self._weights.o(attended)
        x = ops.add_rms_norm(x, residual, self._weights.post_norm, self._config.rms_norm_eps, out=x)
        return self._weights.down(ops.silu_mul(self._weights.gate_up(x)))

    @property
    def input_norm(self) -> Tensor:
        return self._weights.input_norm

    def next_attention(self, x: Tensor, positions: Tensor, last_rows: Tensor) -> NextAttention:
        """What attention of some rows to all rows would read.

        Args:
            x: `[num_rows, hidden_size]` before the layer's norm.
            positions: `[num_rows]` int32.
            last_rows: `[num_queries]` int64 rows that attend.
        """
        x = ops.rms_norm(x, self._weights.input_norm, self._config.rms_norm_eps)
        parts = self._weights.parts
        assert parts is not None, "only the first layer after a boundary is asked"
        q = self._heads(parts.query(x.index_select(0, last_rows)), self._weights.q_norm)
        plain_keys = parts.key(x)
        k = self._heads(plain_keys, self._weights.k_norm)
        positions = positions.long()
        return NextAttention(
            rotate(q, self._cos_sin, positions.index_select(0, last_rows)),
            rotate(k, self._cos_sin, positions),
            plain_keys,
        )

    def _all_heads(self, q: Tensor) -> Tensor:
        """`[num_rows, num_heads, head_dim]` of all ranks."""
        if self._group is None:
            return q
        return self._group.join(q.flatten(1)).view(len(q), self._group.size * q.shape[1], self._config.head_dim)

    def _heads(self, x: Tensor, weight: Tensor | None) -> Tensor:
        """`[num_rows, heads * head_dim]` -> `[num_rows, heads, head_dim]`, normed where there is a weight."""
        heads = x.view(-1, self._config.head_dim)
        heads = heads if weight is None else ops.rms_norm(heads, weight, self._config.rms_norm_eps)
        return heads.view(len(x), -1, self._config.head_dim)

    def _project(self, x: Tensor, keys: Tensor | None) -> Tensor:
        """`[num_rows, (num_heads + 2 * num_kv_heads) * head_dim]` queries, keys and values."""
        if keys is None:
            return self._weights.qkv(x)
        parts = self._weights.parts
        assert parts is not None, "keys are known for the first layer after a boundary alone"
        return torch.cat((parts.query(x), keys, parts.value(x)), dim=1)

    def _store(self, qkv: Tensor, cache: CacheView, batch: StageBatch) -> None:
        """Norms heads where the model does, rotates queries and keys in place, and stores keys and values."""
        ops.rope_store(
            qkv,
            batch.positions,
            batch.cache_rows,
            self._cos_sin,
            cache.blocks,
            cache.layer_in_block,
            cache.block_table,
            batch.cu_seqlens,
            self._config.num_heads,
            self._config.num_kv_heads,
            q_norm=self._weights.q_norm,
            k_norm=self._weights.k_norm,
            eps=self._config.rms_norm_eps,
        )

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = qkv.view(qkv.shape[0], -1, self._config.head_dim)
        num_kv_heads = self._config.num_kv_heads
        q, k, v = heads.split_with_sizes((self._config.num_heads, num_kv_heads, num_kv_heads), dim=1)
        return q, k, v


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
    """RMSNorm of `residual`, to which `addend` is added in place before, if there is one; in the addend's memory."""
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
        """The mean over all heads, of the means over each rank's heads; in their memory."""
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
            kv_lengths: `[num_stages, num_seqs]` int32 rows in the cache, the new one included.
            block_tables: per stage `[groups, num_seqs, max_blocks]` int32.
            cu_seqlens: `[num_seqs + 1]` int32, 0 to num_seqs.
            blocks: of the KV pool.
            key_positions: see `Stage.forward`.

        Returns:
            Logits `[num_seqs, vocab_size]`, dtype of the engine.
        """
        cache_rows = kv_lengths - 1
        addend: Tensor | None = None
        for index, (stage, tables) in enumerate(zip(self.stages, block_tables, strict=True)):
            batch = StageBatch(
                cu_seqlens, positions[index], cache_rows[index], kv_lengths[index], tables, last_rows=None
            )
            x, addend = stage.run(x, addend, batch, blocks, key_positions)
        return self._head(add_norm(addend, x, self._norm, self._config.rms_norm_eps))
