"""SPECs as text: what is printed reads as the same reduction."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpn_rt.errors import ConfigError
from dpn_rt.model.reduction.chain import Chain
from dpn_rt.model.reduction.divprune import DivPrune
from dpn_rt.model.reduction.fastv import FastV
from dpn_rt.model.reduction.pool import Pool
from dpn_rt.model.reduction.pyramiddrop import PyramidDrop
from dpn_rt.model.reduction.random import RandomKeep
from dpn_rt.model.reduction.spec import parse_spec

SHARES = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1.0, 1e-5, 5e-324, 1 / 3, 0.1 + 0.2]))
LAYERS = st.lists(st.integers(1, 31), min_size=1, max_size=4, unique=True).map(lambda each: tuple(sorted(each)))
RANDOM = st.builds(
    RandomKeep, layer=st.integers(1, 31), keep=SHARES, seed=st.integers(0, 2**31), positions=st.just("keep")
)
STEPS = st.one_of(
    st.builds(FastV, k=st.integers(1, 31), ratio=SHARES),
    st.builds(DivPrune, keep=SHARES),
    st.builds(Pool, kernel=st.tuples(st.integers(1, 9), st.integers(1, 9)), layer=st.integers(0, 31)),
    RANDOM,
    LAYERS.flatmap(
        lambda layers: st.builds(
            PyramidDrop,
            before=st.just(layers),
            ratios=st.lists(SHARES, min_size=len(layers), max_size=len(layers)).map(
                lambda ratios: tuple(sorted(ratios, reverse=True))
            ),
        )
    ),
)


@given(STEPS)
def test_what_is_printed_reads_as_the_same(step: FastV) -> None:
    spec = Chain.of(step).spec
    assert parse_spec(spec, 32) == Chain.of(step)
    assert parse_spec(spec, 32).spec == spec


@pytest.mark.parametrize("layer", ["9" * 400, "-1", "0", "32"])
def test_layers_that_no_decoder_has(layer: str) -> None:
    with pytest.raises(ConfigError, match=r"expected layers from 1 to 31|expected numbers|expected a whole number"):
        parse_spec(f"pyramiddrop:layers={layer},ratios=0.5", 32)


@pytest.mark.parametrize("spec", ["none:k=1", "none+none", "none+fastv:k=2", {"method": "none", "k": 1}])
def test_none_stands_alone(spec: object) -> None:
    with pytest.raises(ConfigError, match="expected 'none' to stand alone, without keys and other steps"):
        parse_spec(spec, 32)


def test_numbers_as_people_write_them() -> None:
    spec = parse_spec("pyramiddrop:layers=4-8,ratios=5e-1-2.5E-1", 32)
    assert spec == parse_spec("pyramiddrop:layers=4-8,ratios=0.5-0.25", 32)
    with pytest.raises(ConfigError, match="k='1_0', expected a whole number"):
        parse_spec("fastv:k=1_0", 32)


_DEEP: list[object] = []
_DEEP.append(_DEEP)


@pytest.mark.parametrize(
    "spec",
    [
        "a" * 5000, "a+" * 2**20, "pyramiddrop:layers=" + "8-" * 2**20, "fastv:" + "k=2," * 2**20,
        {"method": "pyramiddrop", "layers": list(range(1, 2**20)), "ratios": [1.0]}, {"a" * 2**20: 1},
        {"method": "fastv", "k": [[1] * 3000] * 3000}, {"method": "fastv", "k": _DEEP}, {"method": {"a": "b" * 5000}},
    ],
)  # fmt: skip
def test_longer_than_any_spec(spec: object) -> None:
    """Such a one took minutes to check, since every problem of a million layers was told."""
    with pytest.raises(ConfigError, match=r"reduce: \d+ characters or items or more, expected at most 4096"):
        parse_spec(spec, 32)


@pytest.mark.parametrize(
    "spec",
    [
        "a" * 5000, "fastv:" + "a" * 5000, "fastv:k=" + "a" * 5000, "pyramiddrop:layers=" + "-".join(["40"] * 3000),
        {"method": ["fastv"] * 5000}, {"method": "fastv", "x" * 5000: 1}, {"method": "fastv", "k": [1] * 5000},
        [1] * 5000,
    ],
)  # fmt: skip
def test_messages_do_not_repeat_long_specs(spec: object) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_spec(spec, 32)
    assert len(str(caught.value)) < 2000
