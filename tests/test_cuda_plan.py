"""The index of a mixed batch, sorted by the CUDA kernel under emulation: the same as PyTorch's stable sort. And what a
layer's grouped product wants of it."""

from __future__ import annotations

import emulator
import pytest
import torch

from taps_fast import _ext, tasks
from taps_fast.tasks import TaskBatch, sample_of_row

emulated = emulator.load()


@pytest.fixture(autouse=True)
def settings():
    emulated.reset()
    yield emulated.settings()
    emulated.reset()


def check(ids: torch.Tensor, num_tasks: int) -> None:
    order, offsets, inverse, valid = torch.ops.taps_fast.task_plan(ids, num_tasks)
    expected = TaskBatch.from_ids(ids, num_tasks)
    assert torch.equal(order, expected.order)
    assert torch.equal(offsets, expected.offsets)
    assert torch.equal(inverse[order], torch.arange(ids.numel()))
    assert valid.dtype == torch.bool and valid.shape == () and bool(valid)


@pytest.mark.parametrize("samples", (0, 1, 2, 31, 32, 33, 64, 100, 1023, 1025, 2500))
@pytest.mark.parametrize("num_tasks", (1, 2, 31, 33, 300))
def test_sorts_as_pytorch_does(samples, num_tasks):
    g = torch.Generator().manual_seed(samples)
    check(torch.randint(-1, num_tasks, (samples,), generator=g), num_tasks)


def planned(ids, coeffs, base_coeffs, rows, inner):
    """What `layer_plan` should give, sample by sample."""
    own = (coeffs != 0).any(1)
    if base_coeffs is not None:
        own |= base_coeffs != 1
    joined = torch.tensor([t if t >= 0 and own[t] else -1 for t in ids.tolist()], dtype=torch.int64)
    batch = TaskBatch.from_ids(joined, coeffs.shape[0])
    sample = sample_of_row(rows, ids.numel(), inner, ids.device)
    place = [r for s in batch.order.tolist() for r in (sample == s).nonzero()[:, 0].tolist()]
    ends = batch.offsets[1:] * (rows // max(ids.numel(), 1))
    return joined + 1, batch.order, batch.offsets, torch.tensor(place, dtype=torch.int64), ends.int()


def check_layer(samples, num_tasks, deltas, inner, outer, baked) -> None:
    g = torch.Generator().manual_seed(samples)
    ids = torch.randint(-1, num_tasks, (samples,), generator=g)
    coeffs = torch.randn(num_tasks, deltas, generator=g) * (
        torch.rand(num_tasks, deltas, generator=g) < 1 / (1 + deltas)
    )
    base_coeffs = torch.randint(0, 2, (num_tasks,), generator=g).float() if baked else None
    given = (ids, coeffs, base_coeffs, samples * inner * outer, inner)
    results = torch.ops.taps_fast.layer_plan(*given)
    for name, got, want in zip(("slots", "order", "offsets", "place", "ends"), results, planned(*given), strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want), name


@pytest.mark.parametrize("baked", (False, True))
@pytest.mark.parametrize(("inner", "outer"), ((1, 1), (7, 1), (1, 3), (5, 2)))
@pytest.mark.parametrize(
    ("samples", "num_tasks", "deltas"), ((0, 3, 2), (1, 1, 1), (13, 5, 0), (40, 70, 33), (300, 9, 100))
)
def test_what_a_layer_wants(samples, num_tasks, deltas, inner, outer, baked):
    check_layer(samples, num_tasks, deltas, inner, outer, baked)


def test_a_layer_with_all_its_tasks(settings):
    check_layer(50, tasks.PLAN_TASKS, 3, 1, 1, True)
    (launch,) = settings.launches
    assert launch.shared_bytes <= 96 * 1024


@pytest.mark.parametrize("order", ("backward", "random"))
def test_the_order_of_threads_changes_no_layer(settings, order):
    settings.order = order
    check_layer(100, 9, 4, 3, 2, True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's own is tested in test_cuda_gpu.py")
@pytest.mark.parametrize("transposed", (False, True))
def test_merged_products_use_it_where_it_is_loaded(monkeypatch, settings, transposed):
    """Where the ids are is all that this machine lacks."""
    linear = pytest.importorskip("taps_fast.kernels.linear")
    g = torch.Generator().manual_seed(0)
    x, base, deltas = (
        torch.randn(24, 16, generator=g),
        torch.randn(16, 16, generator=g),
        torch.randn(3, 16, 16, generator=g),
    )
    coeffs = torch.tensor([[1.0, 0.0, 0.5], [0.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    index = TaskBatch.from_ids(torch.tensor([2, 1, -1, 0, 2, 1]), 3).tensors
    weight, before = (base, list(deltas), coeffs, None), len(settings.launches)

    def run():
        if transposed:
            return linear.linear_dx(x, *weight, *index, 2, "merge")
        return linear.linear_fwd(x, *weight, None, *index, 2, "merge")

    expected = run()
    assert len(settings.launches) == before
    monkeypatch.setattr(linear, "_planned_by_extension", lambda rows, tasks: True)
    assert torch.equal(run(), expected)
    assert len(settings.launches) == before + 1


@pytest.mark.parametrize("task", (-1, 0, 6))
def test_one_task_alone(task):
    check(torch.full((70,), task), 7)


def test_no_tasks_and_a_batch_of_the_base():
    check(torch.full((40,), -1), 0)


def test_many_tasks_take_fewer_warps(settings):
    """Their counts share one block's memory, up to the largest that `TaskBatch` hands over."""
    check(torch.arange(tasks.PLAN_TASKS - 1, -2, -1), tasks.PLAN_TASKS)
    (launch,) = settings.launches
    assert launch.blocks == 1 and launch.threads < 1024 and launch.shared_bytes <= 96 * 1024


@pytest.mark.parametrize("order", ("backward", "random"))
def test_the_order_of_threads_changes_nothing(settings, order):
    settings.order = order
    check(torch.randint(-1, 9, (300,)), 9)


def test_strided_ids():
    check(torch.randint(-1, 5, (2, 50))[:, ::2][1], 5)


@pytest.mark.parametrize("bad", (-2, 4, 2**40, -(2**40)))
def test_an_id_out_of_range_is_reported_and_harmless(bad):
    ids = torch.tensor([0, 3, bad, 1, -1])
    order, offsets, inverse, valid = torch.ops.taps_fast.task_plan(ids, 4)
    assert not bool(valid)
    assert order.tolist() == [2, 4, 0, 3, 1] and offsets.tolist() == [0, 2, 3, 4, 4, 5]
    assert inverse[order].tolist() == [0, 1, 2, 3, 4]


def test_task_batch_uses_it_where_it_is_loaded(monkeypatch, settings):
    """Where the ids are is all that this machine lacks."""
    monkeypatch.setattr(_ext, "CUDA_ERROR", None)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    ids = torch.tensor([1, -1, 0, 1])
    batch = TaskBatch.from_ids(ids, 2)
    assert len(settings.launches) == 1
    assert batch.order.tolist() == [1, 2, 0, 3] and batch.offsets.tolist() == [0, 1, 2, 4]
    with pytest.raises(RuntimeError, match=r"TaskBatch: tasks must be ids in \[-1, 2\)"):
        TaskBatch.from_ids(torch.tensor([2]), 2)
    before = len(settings.launches)
    TaskBatch.from_ids(ids, tasks.PLAN_TASKS + 1)
    assert len(settings.launches) == before


@pytest.mark.parametrize(
    ("ids", "num_tasks", "text"),
    (
        (torch.zeros(2, 2, dtype=torch.int64), 1, "task_plan: ids must have 1 dimension, got [2, 2]"),
        (torch.zeros(2, dtype=torch.int32), 1, "task_plan: ids must have scalar type 4, got 3"),
        (torch.zeros(2, dtype=torch.int64), -1, "task_plan: num_tasks must be 0 to 24000, got -1"),
        (torch.zeros(2, dtype=torch.int64), 2**40, "task_plan: num_tasks must be 0 to 24000, got 1099511627776"),
    ),
)
def test_wrong_arguments_are_errors(ids, num_tasks, text):
    with pytest.raises(RuntimeError) as error:
        torch.ops.taps_fast.task_plan(ids, num_tasks)
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("change", "text"),
    (
        ({"ids": torch.zeros(2, 2, dtype=torch.int64)}, "layer_plan: ids must have 1 dimension, got [2, 2]"),
        ({"coeffs": torch.ones(3)}, "layer_plan: coeffs must have 2 dimensions, got [3]"),
        ({"coeffs": torch.ones(3, 2).double()}, "layer_plan: coeffs must have scalar type 6, got 7"),
        ({"coeffs": torch.ones(20000, 1)}, "layer_plan: coeffs must be of at most 16384 tasks, got 20000"),
        ({"base_coeffs": torch.ones(2)}, "layer_plan: base_coeffs must have 3 elements, got [2]"),
        ({"rows": 5}, "layer_plan: rows must be a multiple of inner times the batch, got 5 (inner 1, batch 2)"),
        ({"inner": 0}, "layer_plan: rows must be a multiple of inner times the batch, got 4 (inner 0, batch 2)"),
    ),
)
def test_a_layer_of_wrong_arguments_is_an_error(change, text):
    given = dict(ids=torch.tensor([0, 2]), coeffs=torch.ones(3, 2), base_coeffs=None, rows=4, inner=1) | change
    with pytest.raises(RuntimeError) as error:
        torch.ops.taps_fast.layer_plan(*given.values())
    assert text in str(error.value)


def test_a_failed_launch_says_what_was_started(settings):
    settings.refuse = "out of resources"
    text = r"task_plan: plan_kernel did not start: out of resources \(2 samples, 3 tasks; 1 warps, 148 bytes"
    with pytest.raises(RuntimeError, match=text):
        torch.ops.taps_fast.task_plan(torch.tensor([0, 2]), 3)


def test_shapes_while_tracing():
    ids = torch.tensor([0, 2, -1])
    torch.library.opcheck(torch.ops.taps_fast.task_plan, (ids, 3))
    torch.library.opcheck(torch.ops.taps_fast.layer_plan, (ids, torch.eye(3), torch.ones(3), 6, 2))
