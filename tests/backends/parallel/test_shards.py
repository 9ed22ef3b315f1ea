"""What each rank has of a decoder, and which numbers of ranks are refused."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dpn_rt import LLM
from dpn_rt.errors import ConfigError
from dpn_rt.format.weight_spec import canonical_specs
from dpn_rt.model.ranks import joined, summed
from dpn_rt.model.shards import Shard, check_shards
from dpn_rt.model.weights.forms import load_weight
from dpn_rt.model.weights.int4 import Int4Weight
from dpn_rt.model.weights.int8 import Int8Weight
from dpn_rt.settings import EngineOptions, resolve
from tests.engine.models import MODEL, random_weights, with_decoder, write_random_engine


def test_parts_make_the_whole() -> None:
    """Of the decoder's matrices each value is on one rank; KV heads of which there are too few on several."""
    weights = dict(random_weights(MODEL))
    decoder = MODEL.decoder
    parts = [Shard(decoder, "none", rank, 2).tensors(weights) for rank in (0, 1)]
    for layer in range(decoder.num_layers):
        whole = {part: weights[f"layers.{layer}.{part}.weight"] for part in ("qkv", "o", "gate_up", "down")}
        own = [{part: each[f"layers.{layer}.{part}.weight"] for part in whole} for each in parts]
        for part, sizes in {"qkv": (64, 32, 32), "gate_up": (96, 96)}.items():
            pieces = [torch.split(each[part], [size // 2 for size in sizes]) for each in own]
            assert torch.equal(torch.cat([piece for pair in zip(*pieces, strict=True) for piece in pair]), whole[part])
        for part in ("o", "down"):
            assert torch.equal(torch.cat([each[part] for each in own], dim=1), whole[part])
    assert torch.equal(torch.cat([each["lm_head.weight"] for each in parts]), weights["lm_head.weight"])
    assert not [name for name in parts[1] if not name.startswith(("layers.", "norm.", "lm_head."))]
    assert set(parts[0]) == set(canonical_specs(MODEL))


def test_two_ranks_share_a_key_head() -> None:
    weights = dict(random_weights(MODEL))
    key = weights["layers.0.qkv.weight"][64:96].view(2, 16, 64)
    for rank in range(4):
        shard = Shard(MODEL.decoder, "none", rank, 4)
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


@pytest.mark.parametrize(
    ("changes", "quantize", "size", "message"),
    [
        ({}, "none", 3, r"num_heads 4 is not a multiple of it; num_kv_heads 2 is neither .*expected one of 1, 2, 4"),
        ({"intermediate_size": 90}, "none", 4, r"intermediate_size 90 is not a multiple of it: expected one of 1, 2"),
        ({"num_heads": 6, "num_kv_heads": 2}, "none", 3, r"num_kv_heads 2 is neither a multiple of it nor divides it"),
        ({"intermediate_size": 80}, "int4", 2, r"the MLP: 80 / 2 rows are not whole tiles of 16 rows, as int4"),
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
