"""What each rank has of a decoder, and which numbers of ranks are refused."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dpn_rt import LLM
from dpn_rt.errors import ConfigError
from dpn_rt.format.config import ModelConfig
from dpn_rt.model.layer_pair import take_rows
from dpn_rt.model.linear import load_linear
from dpn_rt.model.ranks import joined, shared_embedding, shared_head, summed, vocabulary_parts
from dpn_rt.model.shards import Shard, check_shards
from dpn_rt.model.vision.encoder import encoder_pairs
from dpn_rt.model.weights.forms import load_weight
from dpn_rt.model.weights.int4 import Int4Weight
from dpn_rt.model.weights.int8 import Int8Weight
from dpn_rt.model.weights.table import EmbeddingTable
from dpn_rt.settings import EngineOptions, resolve
from tests.engine.models import MODEL, VISION, random_weights, with_decoder, write_random_engine


def split(model: ModelConfig, size: int) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Random weights, and those of each rank."""
    weights = dict(random_weights(model, seed=torch.initial_seed() % 2**31))
    pairs = encoder_pairs(model.vision, model.projector, model.decoder.hidden_size)
    return weights, [Shard(model.decoder, rank, size, pairs).tensors(weights) for rank in range(size)]


def joined_rows(parts: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Matrices below each other, of which each rank has its part of every one."""
    pieces = [torch.split(part, [size // len(parts) for size in sizes]) for part in parts]
    return torch.cat([piece for of_ranks in zip(*pieces, strict=True) for piece in of_ranks])


def test_parts_make_the_whole() -> None:
    """Each value of the large matrices is on one rank."""
    weights, parts = split(MODEL, 2)
    columns: dict[str, tuple[int, ...]] = {"projector.0.weight": (64,), "projector.0.bias": (64,)}
    rows, biases = ["projector.2.weight"], ["projector.2.bias"]
    for layer in range(MODEL.decoder.num_layers):
        columns |= {f"layers.{layer}.qkv.weight": (64, 32, 32), f"layers.{layer}.gate_up.weight": (96, 96)}
        rows += [f"layers.{layer}.o.weight", f"layers.{layer}.down.weight"]
    for layer in range(MODEL.vision.num_layers):
        for suffix in ("weight", "bias"):
            columns |= {f"vision.layers.{layer}.qkv.{suffix}": (32,) * 3, f"vision.layers.{layer}.fc1.{suffix}": (64,)}
        rows += [f"vision.layers.{layer}.out.weight", f"vision.layers.{layer}.fc2.weight"]
        biases += [f"vision.layers.{layer}.out.bias", f"vision.layers.{layer}.fc2.bias"]
    for name, sizes in columns.items():
        assert torch.equal(joined_rows([part[name] for part in parts], sizes), weights[name]), name
    for name in rows:
        assert torch.equal(torch.cat([part[name] for part in parts], dim=1), weights[name]), name
    for name in biases:
        assert torch.equal(parts[0][name], weights[name]) and name not in parts[1], "the sum has it once"
    tables = ["lm_head.weight", "embed_tokens.weight"]
    for name in tables:
        assert torch.equal(torch.cat([part[name] for part in parts]), weights[name])
    whole = set(weights) - columns.keys() - {*rows, *biases, *tables}
    assert all(torch.equal(parts[0][name], weights[name]) for name in whole)
    assert whole & set(parts[1]) == {name for name in whole if name.startswith(("layers.", "norm.", "vision."))}
    assert set(parts[0]) == set(weights) and not set(parts[1]) - set(weights)


def test_an_encoder_that_is_not_shared_is_on_rank_0() -> None:
    weights = dict(random_weights(MODEL))
    first, second = (set(Shard(MODEL.decoder, rank, 2).tensors(weights)) for rank in range(2))
    assert first == set(weights)
    assert not {name for name in second if name.startswith(("vision.", "projector."))}


@pytest.mark.parametrize(
    ("changes", "quantize", "size", "divides"),
    [
        ({}, "none", 2, True),
        ({}, "none", 4, False),  # 2 heads
        ({"intermediate_size": 66}, "none", 2, True),
        ({"intermediate_size": 65}, "none", 2, False),
        ({}, "int8", 2, True),
        ({"intermediate_size": 80}, "int8", 2, False),  # 5 tiles
        ({"hidden_size": 16}, "int8", 2, False),
    ],
)
def test_encoders_that_can_be_shared(changes: dict[str, Any], quantize: Any, size: int, divides: bool) -> None:
    assert all(pair.divides(quantize, size) for pair in replace(VISION, **changes).layer_pairs()) == divides


@pytest.mark.parametrize(("vocab_size", "size"), [(1, 1), (17, 2), (100, 2), (100, 4), (128, 4), (129, 3), (32064, 8)])
def test_parts_of_the_vocabulary(vocab_size: int, size: int) -> None:
    parts = vocabulary_parts(vocab_size, size)
    rows = [row for part in parts for row in range(part.start, min(part.stop, vocab_size))]
    assert rows == list(range(vocab_size))
    assert all(part.start % 16 == part.stop % 16 == 0 and part.start < part.stop for part in parts)


def test_two_ranks_share_a_key_head() -> None:
    weights = dict(random_weights(MODEL))
    key = weights["layers.0.qkv.weight"][64:96].view(2, 16, 64)
    for rank in range(4):
        shard = Shard(MODEL.decoder, rank, 4)
        assert (shard.config.num_heads, shard.config.num_kv_heads) == (1, 1)
        assert torch.equal(shard.tensors(weights)["layers.0.qkv.weight"][16:32], key[rank // 2])


@pytest.mark.parametrize("form", [Int8Weight, Int4Weight])
def test_rows_of_quantised_matrices(form: Any) -> None:
    matrix = torch.randn(96, 130)
    tensors = {f"m.{name}": tensor for name, tensor in form.quantize(matrix).items()}
    taken = form.take_rows(tensors, "m", [slice(16, 32), slice(64, 96)])
    part = load_weight({f"m.{name}": tensor for name, tensor in taken.items()}, "m", prepack=False)
    whole, x = load_weight(tensors, "m", prepack=False), torch.randn(5, 130)
    rows = [*range(16, 32), *range(64, 96)]
    assert torch.equal(part.products(None).many_rows(x), whole.products(None).many_rows(x)[:, rows])


class TwoRanks:
    """A `RankGroup` whose other rank has the rest of the same rows."""

    rank, size = 0, 2

    def __init__(self, *others: Tensor) -> None:
        self._others = iter(others)

    def sum(self, x: Tensor) -> Tensor:
        return x.add_(next(self._others))

    def join(self, x: Tensor) -> Tensor:
        return torch.cat((x, next(self._others)), dim=1)


@pytest.mark.parametrize("form", [Int8Weight, Int4Weight])
def test_joined_products_keep_their_bits(form: Any) -> None:
    """Each rank rounds the whole row, by its largest value, which only one rank has."""
    x = torch.randn(5, 128)
    x[:, -1] = 40
    tensors = {f"m.{name}": tensor for name, tensor in form.quantize(torch.randn(64, 128)).items()}
    whole = load_weight(tensors, "m", prepack=False).products(None).many_rows(x)
    own = {f"m.{name}": tensor for name, tensor in form.take_rows(tensors, "m", [slice(0, 32)]).items()}
    product = joined(load_weight(own, "m", prepack=False).products(None).many_rows, TwoRanks(x[:, 64:], whole[:, 32:]))
    assert torch.equal(product(x[:, :64]), whole)


def test_summed_products() -> None:
    x, matrix = torch.randn(5, 64, dtype=torch.float64), torch.randn(9, 64, dtype=torch.float64)
    product = summed(lambda part: part @ matrix[:, :32].T, TwoRanks(x[:, 32:] @ matrix[:, 32:].T))
    torch.testing.assert_close(product(x[:, :32]), x @ matrix.T)


@pytest.mark.parametrize("vocab_size", [100, 96, 17])
def test_parts_of_a_vocabulary_in_8_bits(vocab_size: int) -> None:
    """The last tile is not full."""
    x, ids = torch.randn(5, 128), torch.randint(0, vocab_size, (20,))
    whole = {f"m.{name}": tensor for name, tensor in Int8Weight.quantize(torch.randn(vocab_size, 128)).items()}
    parts = [dict(take_rows(whole, "m", [rows])) for rows in vocabulary_parts(vocab_size, 2)]
    logits = torch.cat([load_linear(part, "m", prepack=False)(x) for part in parts], dim=1)
    assert torch.equal(logits, load_linear(whole, "m", prepack=False)(x))
    tables = [EmbeddingTable(part, "m", 128, torch.float32) for part in parts]
    rows = [table.rows(torch.arange(len(part["m.scale"]))) for table, part in zip(tables, parts, strict=True)]
    assert torch.equal(torch.cat(rows)[ids], EmbeddingTable(whole, "m", 128, torch.float32).rows(ids))


@pytest.mark.parametrize("vocab_size", [100, 96, 112])
def test_parts_of_embeddings_and_logits(vocab_size: int) -> None:
    """The last tile is not full, the parts are equal, or not."""
    table, x, ids = torch.randn(vocab_size, 8), torch.randn(5, 8), torch.randint(0, vocab_size, (20,))
    end = vocabulary_parts(vocab_size, 2)[0].stop
    most = max(end, vocab_size - end)
    other = functional.pad(x @ table[end:].T, (0, most - (vocab_size - end)))
    head = shared_head(lambda rows: rows @ table[:end].T, vocab_size, TwoRanks(other))
    torch.testing.assert_close(head(x), x @ table.T)
    rest = table[ids].masked_fill((ids < end)[:, None], 0)
    embed = shared_embedding(lambda own: table[:end][own], vocab_size, TwoRanks(rest))
    assert torch.equal(embed(ids), table[ids])


@pytest.mark.parametrize(
    ("changes", "quantize", "size", "message"),
    [
        ({}, "none", 3, r"num_heads 4 is not a multiple of it; num_kv_heads 2 is neither .*expected one of 1, 2, 4"),
        ({"intermediate_size": 90}, "none", 4, r"intermediate_size 90 is not a multiple of it: expected one of 1, 2"),
        ({"num_heads": 6, "num_kv_heads": 2}, "none", 3, r"num_kv_heads 2 is neither a multiple of it nor divides it"),
        ({"intermediate_size": 80}, "int4", 2, r"the MLP: 80 / 2 rows are not whole tiles of 16 rows, as int4"),
        ({"vocab_size": 48}, "none", 4, r"vocab_size 48 has no 16 tokens for each"),
        ({"hidden_size": 72}, "int8", 2, r"hidden_size: 72 / 2 rows are not whole tiles"),
        ({"head_dim": 8, "num_kv_heads": 1}, "int8", 2, r"keys: 16 / 2 rows are not whole tiles of 16 rows"),
    ],
)
def test_sizes_that_do_not_divide(changes: dict[str, Any], quantize: Any, size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=f"tensor_parallel_size={size}: .*{message}"):
        check_shards(with_decoder(**changes).decoder, quantize, size)


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "2"])
def test_numbers_that_are_none(tmp_path: Path, size: Any) -> None:
    path = write_random_engine(tmp_path / "e")
    with pytest.raises(ConfigError, match="tensor_parallel_size=.*: expected a whole number of at least 1"):
        LLM(path, tensor_parallel_size=size)


def test_plans_run_on_one_gpu() -> None:
    from dpn_rt.format.plans import PlanLimits

    limits = PlanLimits(**{field.name: 4 for field in dataclasses.fields(PlanLimits)} | {"stage_rows": (64,) * 4})
    with pytest.raises(ConfigError, match="tensor_parallel_size=2: expected 1, TensorRT plans"):
        resolve(MODEL, EngineOptions(tensor_parallel_size=2), limits)


def test_one_rank_needs_no_torch_distributed(tmp_path: Path) -> None:
    """Neither do its modules, nor does it start a process."""
    path = write_random_engine(tmp_path / "e")
    code = (
        "import sys; from dpn_rt import LLM, SamplingParams\n"
        f"LLM({str(path)!r}).generate({{'prompt_token_ids': [5, 6]}}, SamplingParams(max_tokens=2), use_tqdm=False)\n"
        "assert not [name for name in sys.modules if name.startswith('dpn_rt.backends.parallel')]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
