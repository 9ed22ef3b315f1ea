"""Steps of the host that are recorded: the same values as Python gives, in memory that is used again."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpn_rt import ops
from dpn_rt.device.host_graph import HostGraph, NotRecordableError
from dpn_rt.device.step_memory import StepMemory
from dpn_rt.errors import KernelArgumentError
from dpn_rt.ops.recording import Recording

SIZE = 32
Layer = Callable[[Tensor], Tensor]


def make_layer(kind: str, seed: int) -> Layer:
    """`[num_rows, SIZE]` -> the same shape."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(SIZE, SIZE, generator=generator) / SIZE**0.5
    if kind == "linear":
        return lambda x: ops.linear(ops.rms_norm(x, weight[0], 1e-5), weight)
    if kind == "norm":
        return lambda x: ops.rms_norm(x, weight[0], 1e-5)
    if kind == "norm of a sum":  # in place, and a residual that lives on
        return lambda x: ops.add_rms_norm(ops.linear(x, weight), x, weight[0], 1e-5)
    if kind == "gate":  # of normed rows, so that many gates do not overflow
        both = torch.randn(2 * SIZE, SIZE, generator=generator)
        return lambda x: ops.silu_mul(ops.linear(ops.rms_norm(x, weight[0], 1e-5), both))
    assert kind == "view"
    return lambda x: ops.rms_norm(x.view(-1, SIZE // 2), weight[0, : SIZE // 2], 1e-5).view(-1, SIZE)


KINDS = ("linear", "norm", "norm of a sum", "gate", "view")


@settings(max_examples=60, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=12),
    rows=st.integers(1, 9),
    replays=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_a_replay_gives_what_python_gives(kinds: list[str], rows: int, replays: int, seed: int) -> None:
    layers = [make_layer(kind, seed + i) for i, kind in enumerate(kinds)]
    x = torch.empty(rows, SIZE)

    def step() -> tuple[Tensor, ...]:
        value = x
        for layer in layers:
            value = layer(value)
        return (value,)

    generator = torch.Generator().manual_seed(seed)
    given = [torch.randn(rows, SIZE, generator=generator) for _ in range(replays + 1)]
    wanted = []
    for values in given:
        x.copy_(values)
        wanted.append(step()[0].clone())
    memory = StepMemory()
    x.copy_(given[0])
    graph = HostGraph(step, memory)
    assert torch.equal(graph.outputs[0], wanted[0]), "of the run that was recorded"
    taken = [torch.full((rows, SIZE), torch.nan) for _ in range(8)]  # where a result would lie that nothing holds
    for values, expected in zip(given[1:], wanted[1:], strict=True):
        x.copy_(values)
        graph.replay()
        assert torch.equal(graph.outputs[0], expected)
    assert all(other.isnan().all() for other in taken)


def test_memory_is_used_again_within_a_step_and_by_others() -> None:
    weight, x, memory = torch.eye(SIZE), torch.randn(1, SIZE), StepMemory()

    def step(count: int) -> tuple[Tensor, ...]:
        value = x
        for _ in range(count):
            value = ops.linear(value, weight)
        return (value,)

    graphs = [HostGraph(lambda: step(3), memory)]
    first = memory.num_bytes
    assert first == 2 * SIZE * 4, "one is read while the other is written"
    graphs += [HostGraph(lambda: step(30), memory) for _ in range(3)]
    assert memory.num_bytes == first, "what a graph returns may be overwritten by another"
    for graph in graphs:
        graph.replay()
        assert torch.equal(graph.outputs[0], x)


def test_what_a_step_returns_stays_until_the_next_replay() -> None:
    """Two results of one step; and memory of its own for each graph, if graphs shall not overwrite each other's."""
    weight, inputs = torch.eye(SIZE), [torch.randn(2, SIZE) for _ in range(3)]

    def step(x: Tensor) -> tuple[Tensor, ...]:
        first = ops.linear(x, weight)
        ops.linear(first, weight)
        return first, ops.silu_mul(ops.linear(first, weight))

    graphs = [HostGraph(partial(step, x), StepMemory()) for x in inputs]
    for graph in graphs:
        graph.replay()
    for graph, x in zip(graphs, inputs, strict=True):
        assert torch.equal(graph.outputs[0], x) and torch.equal(graph.outputs[1], ops.silu_mul(x))


@pytest.mark.parametrize("shape", [(0, SIZE), (3, 0), (1, 1)])
def test_small_results(shape: tuple[int, int]) -> None:
    found = StepMemory().tensor(shape, torch.bfloat16)
    assert found.shape == shape and found.dtype == torch.bfloat16 and found.is_contiguous()


@pytest.mark.parametrize(
    ("call", "operator"),
    [
        (lambda x: x + 1, "aten.add.Tensor"),
        (lambda x: x.mul_(2), "aten.mul_.Tensor"),
        (lambda x: torch.zeros(2), "aten.zeros.default"),
        (lambda x: x.clone(), "aten.clone.default"),
        (lambda x: x.t().contiguous(), "aten.(clone|contiguous).default"),
        (lambda x: x.t().reshape(-1), "aten.(_unsafe_view|clone|reshape).default"),
        (lambda x: x.to(torch.int32), "aten.(_to_copy.default|to.dtype)"),
        (lambda x: torch.nn.functional.linear(x, x), "aten"),
        (lambda x: x[0, 0].item(), "aten.(item|_local_scalar_dense).default"),
        (lambda x: torch.tensor([1.0, 2.0]), "aten.(lift_fresh|_to_copy|detach)"),
    ],
)
@pytest.mark.parametrize("inference", [False, True])
def test_values_of_torch_are_refused_by_name(call: Callable[[Tensor], object], operator: str, inference: bool) -> None:
    with torch.inference_mode(inference):
        x = torch.ones(4, 4)

        def step() -> tuple[Tensor, ...]:
            ops.rms_norm(x, x[0], 1e-5)
            call(x)
            return (ops.rms_norm(x, x[0], 1e-5),)

        with pytest.raises(NotRecordableError, match=operator):
            HostGraph(step, StepMemory())
        assert torch.equal(x, torch.ones(4, 4)), "the operator has not run"
        assert len(HostGraph(lambda: (ops.rms_norm(x, x[0], 1e-5),), StepMemory())._calls) == 1, "records again"


@pytest.mark.parametrize(
    "result",
    [lambda x, made: x, lambda x, made: made[:, 1], lambda x, made: torch.from_numpy(made.numpy() + 1)],
    ids=["an input", "a column", "of numpy"],
)
@torch.inference_mode()
def test_results_that_no_op_has_made_are_refused(result: Callable[[Tensor, Tensor], Tensor]) -> None:
    x = torch.ones(4, 4)
    with pytest.raises(NotRecordableError, match="returns a tensor that none of its ops|lift_fresh"):
        HostGraph(lambda: (result(x, ops.rms_norm(x, x[0], 1e-5)),), StepMemory())


def test_an_op_that_reads_values_on_the_host_is_refused() -> None:
    x, offsets = torch.ones(4, 8), torch.tensor([0, 4], dtype=torch.int32)
    with Recording(), pytest.raises(RuntimeError, match="packed_size reads values: it cannot be recorded"):
        ops.segmented_top_k(x[:, 0].contiguous(), offsets, offsets)


def test_values_are_checked_in_every_replay() -> None:
    cos_sin, qkv = torch.ones(4, 16), torch.randn(1, 48)
    cache, table = torch.zeros(2, 1, 2, 1, 4, 16), torch.zeros(1, 1, dtype=torch.int32)
    position, offsets = torch.zeros(1, dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    norm = torch.ones(16)

    def step() -> tuple[Tensor, ...]:
        ops.rope_store(qkv, position, position, cos_sin, cache, 0, table, offsets, 1, 1)
        return (ops.rms_norm(qkv[:, :16], norm, 1e-5),)

    graph = HostGraph(step, StepMemory())
    before = graph.outputs[0].clone()
    position[0] = 4
    with pytest.raises(KernelArgumentError, match=r"positions\[0\] is 4, expected 0 to 3"):
        graph.replay()
    assert torch.equal(graph.outputs[0], before), "what follows has not run"
    position[0] = 3
    graph.replay()
    assert torch.equal(cache[0, 0, 0, 0, 3], qkv[0, 16:32])


def test_an_error_in_a_step_ends_its_recording() -> None:
    x = torch.ones(1, 8)
    with pytest.raises(KernelArgumentError, match="weight"):
        HostGraph(lambda: (ops.rms_norm(x, x, 1e-5),), StepMemory())
    with Recording() as recording:
        ops.rms_norm(x, x[0], 1e-5)
    assert len(recording) == 1


def test_one_recording_at_a_time_and_no_replay_meanwhile() -> None:
    first = Recording()
    with first:
        with pytest.raises(RuntimeError, match="this thread records already: one recording at a time"):
            Recording().__enter__()
        with pytest.raises(RuntimeError, match="cannot be repeated meanwhile"):
            first.replay()
    first.replay()


def test_a_recording_that_is_dropped_or_ended_elsewhere_ends() -> None:
    x = torch.ones(1, 8)
    dropped = Recording()
    dropped.__enter__()
    del dropped
    ops.rms_norm(x, x[0], 1e-5)
    left = Recording()
    left.__enter__()
    with pytest.raises(RuntimeError, match="another thread records this already"):
        in_a_thread(left.__enter__)
    in_a_thread(lambda: left.__exit__(None, None, None))
    ops.rms_norm(x, x[0], 1e-5)
    assert len(left) == 0
    with Recording() as recording:
        ops.rms_norm(x, x[0], 1e-5)
    assert len(recording) == 1


def in_a_thread(call: Callable[[], object]) -> None:
    """Raises what `call` raises there."""
    with ThreadPoolExecutor(1) as threads:
        threads.submit(call).result()


def test_other_threads_are_not_recorded() -> None:
    x = torch.ones(1, 8)
    with Recording() as recording:
        in_a_thread(lambda: ops.rms_norm(x, x[0], 1e-5))
    assert len(recording) == 0


def test_a_graph_keeps_what_it_reads() -> None:
    """The step alone holds its tensors once whoever recorded it has left."""

    def record() -> tuple[HostGraph, Tensor]:
        x, weight = torch.randn(1, SIZE), torch.eye(SIZE)
        return HostGraph(lambda: (ops.linear(x, weight),), StepMemory()), x.clone()

    graph, x = record()
    taken = [torch.full((SIZE, SIZE), torch.nan) for _ in range(8)]
    graph.replay()
    assert torch.equal(graph.outputs[0], x)
    assert all(other.isnan().all() for other in taken)
