"""One layer of the LLaMA decoder, over packed rows and a view of the KV cache."""

from __future__ import annotations

import torch
from torch import Tensor

from dpn_rt import ops
from dpn_rt.model.config import DecoderConfig
from dpn_rt.model.decoder_weights import LayerWeights
from dpn_rt.model.ranks import RankGroup
from dpn_rt.model.rope import rotate
from dpn_rt.model.stage_batch import CacheView, NextAttention, StageBatch


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
        return self._weights.down(self._weights.gated(x))

    @property
    def input_norm(self) -> Tensor:
        """`[hidden_size]` of the norm before attention."""
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
