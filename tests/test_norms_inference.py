"""Norms on a CPU, one operator each way: against their composition of the pointwise operators, and their errors."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from test_cpu_kernels import instruction_sets, run_python
from torch import Tensor

from taps_fast import _ext, norms
from taps_fast.norms import batch_norm_eval, group_norm
from taps_fast.tasks import TaskBatch
from taps_fast.testing import assert_no_worse_than_torch

OPS = torch.ops.taps_fast
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
IDS = (2, -1, 0, 2, 0, -1, 2, 0)  # task 1 has no rows
# Rows and planes shorter and longer than every vector; several rows a sample; a plane of one pixel.
SHAPES = [(8, 6), (16, 69), (8, 12, 3, 5), (8, 12, 1, 1), (16, 96, 7, 7), (8, 6, 2, 3, 4)]
Function = Callable[[Tensor, list[Tensor]], Tensor]


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def strided(x: Tensor) -> Tensor:
    return torch.stack([x, torch.full_like(x, float("nan"))], -1)[..., 0]


LAYOUTS = {"contiguous": Tensor.contiguous, "channels last": channels_last, "strided": strided}


def vectors(channels: int, dtype: torch.dtype) -> list[Tensor]:
    """Weights, biases, means and variances of three tasks and the base."""
    return [(torch.rand(channels) + 0.5).to(dtype) for _ in range(16)]


def batch_norm(x: Tensor, v: list[Tensor], affine: bool = True) -> Tensor:
    weight, bias = (v[:4], v[4:8]) if affine else ([], [])
    return batch_norm_eval(x, weight, bias, v[8:12], v[12:], [1e-5, 0.1, 1e-3, 0.0], TaskBatch.from_ids(IDS, 3))


def grouped(x: Tensor, v: list[Tensor], groups: int, center: bool = True, bias: bool = True) -> Tensor:
    batch = TaskBatch.from_ids(IDS, 3)
    return group_norm(x, v[:4], v[4:8] if bias else [], groups, 1e-5, batch, center=center)


FUNCTIONS: dict[str, Function] = {
    "batch": batch_norm,
    "batch plain": functools.partial(batch_norm, affine=False),
    "groups": functools.partial(grouped, groups=3),
    "layer": functools.partial(grouped, groups=1),
    "rms": functools.partial(grouped, groups=1, center=False, bias=False),
}


@contextlib.contextmanager
def composed() -> Iterator[None]:
    """As where the operators are not there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_ext, "CPU_ERROR", "no compiler")
        yield


def trained(x: Tensor, v: list[Tensor], affine: bool = True) -> Tensor:
    """Tasks 0 and 1 by the statistics of their rows, task 2 and the base by given ones."""
    weight, bias = (v[:4], v[4:8]) if affine else ([], [])
    running = [None, None, (v[8], v[9]), (v[10], v[11])]
    eps, batch = [1e-5, 0.1, 1e-3, 1e-2], TaskBatch.from_ids(IDS, 3)
    return norms.batch_norm(x, weight, bias, running, eps, batch)[0]


TRAINING: dict[str, Function] = {
    "batch train": trained,
    "batch train plain": functools.partial(trained, affine=False),
    **{name: function for name, function in FUNCTIONS.items() if not name.startswith("batch")},
    "layer plain": lambda x, v: group_norm(x, [], [], 1, 1e-5, TaskBatch.from_ids(IDS, 3)),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", TRAINING)
def test_gradients(name: str, dtype: torch.dtype) -> None:
    """y and every gradient: no worse than PyTorch's composition, and the same bits twice."""
    torch.manual_seed(0)
    norm = TRAINING[name]

    def run(x: Tensor, v: list[Tensor], dy: Tensor) -> list[Tensor]:
        x, v = x.clone(memory_format=torch.preserve_format).requires_grad_(), [t.clone().requires_grad_() for t in v]
        y = norm(x, v)
        found = torch.autograd.grad(y, (x, *v[:8]), dy, allow_unused=True)
        return [y.detach(), *(t for t in found if t is not None)]

    for shape in SHAPES:
        for layout in LAYOUTS.values():
            x, dy = (layout(t.to(dtype)) for t in (3 * torch.randn(shape) + 1, torch.randn(shape)))
            for held in {dtype, torch.promote_types(dtype, torch.float32)}:
                v = vectors(shape[1], held)
                got, again = run(x, v, dy), run(x, v, dy)
                assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
                with composed():
                    low, ref = run(x, v, dy), run(x.double(), [t.double() for t in v], dy.double())
                assert [t.dtype for t in got] == [t.dtype for t in low]
                for i, (a, b, c) in enumerate(zip(got, ref, low, strict=True)):
                    if dtype == torch.float64:
                        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
                    else:
                        assert_no_worse_than_torch(a, b, c, name=f"{name} {shape} {i}")


def test_gradients_that_nobody_needs_are_not_there() -> None:
    x, v = torch.randn(8, 6), vectors(6, torch.float32)
    for norm in TRAINING.values():
        own = [t.clone().requires_grad_() for t in v]
        if norm(x, own).requires_grad:
            norm(x, own).sum().backward()
        y = norm(x.clone().requires_grad_(), v)
        y.sum().backward()
    assert x.grad is None and v[0].grad is None


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_same_as_composed(name: str, dtype: torch.dtype) -> None:
    """Every shape and layout, parameters in x's dtype and wider: no worse than PyTorch, and the same bits twice."""
    torch.manual_seed(0)
    norm = FUNCTIONS[name]
    for shape in SHAPES:
        for layout in LAYOUTS.values():
            x = layout((3 * torch.randn(shape) + 1).to(dtype))
            for held in {dtype, torch.promote_types(dtype, torch.float32)}:
                v = vectors(shape[1], held)
                with torch.no_grad():
                    y = norm(x, v)
                    again = norm(x, v)
                assert y.dtype == dtype and torch.equal(y, again)
                assert y.is_contiguous() if layout is not channels_last else y.movedim(1, -1).is_contiguous()
                with composed():
                    low, ref = norm(x, v), norm(x.double(), [t.double() for t in v])
                assert_no_worse_than_torch(y, ref, low, name=f"{name} {shape}")


ISA = """
import sys, torch, test_norms_inference as t
assert torch.ops.taps_fast.cpu_isa() == sys.argv[1]
for name in t.FUNCTIONS:
    for dtype in t.FLOATS:
        t.test_same_as_composed(name, dtype)
for name in t.TRAINING:
    for dtype in t.FLOATS[:2]:
        t.test_gradients(name, dtype)
"""


@pytest.mark.parametrize("isa", instruction_sets()[:-1])
def test_each_instruction_set(isa: str) -> None:
    """Those that this machine would not choose by itself."""
    result = run_python(ISA, isa, TAPS_FAST_CPU_ISA=isa)
    assert result.returncode == 0, result.stderr


def test_a_row_far_from_zero_loses_nothing() -> None:
    """Variance is summed about the mean, not taken as a difference of large numbers."""
    x = torch.randn(8, 512) + 1000
    y = group_norm(x, [], [], 1, 0.0, TaskBatch.from_ids(IDS, 3))
    want = torch.nn.functional.layer_norm(x.double(), (512,), eps=0.0)
    torch.testing.assert_close(y.double(), want, rtol=0, atol=1e-3)


def test_batches_without_rows() -> None:
    batch = TaskBatch.from_ids([], 3)
    v = vectors(6, torch.float32)
    for shape in ((0, 6), (0, 6, 2, 2), (0, 6, 0, 2)):
        x = torch.randn(shape)
        assert batch_norm_eval(x, v[:4], v[4:8], v[8:12], v[12:], [1e-5] * 4, batch).shape == shape
        assert group_norm(x, v[:4], v[4:8], 3, 1e-5, batch).shape == shape


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    x, v = torch.randn(8, 6, 3, 3), vectors(6, torch.float32)
    want = [norm(x, v) for norm in FUNCTIONS.values()]
    monkeypatch.setattr(_ext, "CPU_ERROR", "no compiler")
    for norm, y in zip(FUNCTIONS.values(), want, strict=True):
        torch.testing.assert_close(norm(x, v), y)


def test_opcheck() -> None:
    batch, v = TaskBatch.from_ids(IDS, 3), vectors(6, torch.float32)
    ops = torch.ops.taps_fast
    for layout in LAYOUTS.values():
        x = layout(torch.randn(8, 6, 3, 2))
        torch.library.opcheck(ops.batch_norm_eval, (x, v[:4], [], v[8:12], v[12:], [1e-5] * 4, *batch.tensors, 1))
        torch.library.opcheck(ops.group_norm, (x, v[:4], v[4:8], 2, 1e-5, True, *batch.tensors, 1))
        given = (v[8:10], v[10:12], [1, 3], [1e-5] * 4, *batch.tensors, 1)
        torch.library.opcheck(ops.batch_norm_train, (x, v[:4], [], *given))
        _, mean, variance = ops.batch_norm_train(x, v[:4], [], *given)
        grad = (x, x, v[:4], mean, variance, *given[2:])
        groups = (x, v[:4], v[4:8], 2, 1e-5, True, *batch.tensors, 1)
        torch.library.opcheck(ops.group_norm_train, groups)
        _, means, rstd = ops.group_norm_train(*groups)
        for need_dx in (True, False):
            torch.library.opcheck(ops.batch_norm_grad, (*grad, need_dx))
            torch.library.opcheck(ops.group_norm_grad, (x, x, v[:4], means, rstd, True, *batch.tensors, 1, need_dx))
    tracked = ([v[0], v[1]], [v[2], v[3]], [torch.tensor(3), torch.tensor(0)], [0, 2], [0.1, -1.0], mean, variance)
    torch.library.opcheck(ops.track_statistics, (*tracked, batch.offsets, 6))
    torch.library.opcheck(ops.sort_tasks, (torch.tensor([1, -1, 0]), 2))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda x, v, b: batch_norm_eval(x, v[:3], [], v[8:12], v[12:], [0.0] * 4, b),
            "weight must be 4 tensors or none",
        ),
        (lambda x, v, b: batch_norm_eval(x, [], [], v[8:12], v[12:], [0.0] * 3, b), "eps must be one for each table"),
        (lambda x, v, b: batch_norm_eval(x[:, :5], [], [], v[8:12], v[12:], [0.0] * 4, b), "mean must have 5 elements"),
        (lambda x, v, b: group_norm(x, v[:4], v[4:8], 4, 1e-5, b), "groups must divide 6 channels, got 4"),
        (
            lambda x, v, b: OPS.batch_norm_train(x, [], [], [], [], [4], [0.0] * 4, *b.tensors, 1),
            "fixed must be in .0, 4",
        ),
        (lambda x, v, b: OPS.batch_norm_train(x, [], [], [], [], [], [0.0], *b.tensors, 1), "eps must be 4 numbers"),
        (
            lambda x, v, b: OPS.batch_norm_train(x, [], [], v[:1], v[:2], [0, 1], [0.0] * 4, *b.tensors, 1),
            "mean and variance must be one for each fixed table, got 1 and 2 for 2",
        ),
        (
            lambda x, v, b: OPS.batch_norm_grad(x, x, [], v[0], v[0], [], [0.0] * 4, *b.tensors, 1, True),
            r"mean must be contiguous, of shape \[4, 6\]",
        ),
        (
            lambda x, v, b: OPS.group_norm_grad(x, x, [], x[:, 0, 0], x[:, 0, 0], True, *b.tensors, 1, True),
            r"mean and rstd must be contiguous \[8, groups\]",
        ),
        (
            lambda x, v, b: OPS.track_statistics(
                v[:1], v[:1], [torch.tensor(0)], [4], [0.1], x[:4, :, 0, 0], x, b.offsets, 4
            ),
            "of must be in .0, 4., got 4",
        ),
    ],
)
def test_errors(call: Callable[..., Tensor], text: str) -> None:
    with pytest.raises(RuntimeError, match=text):
        call(torch.randn(8, 6, 2, 2), vectors(6, torch.float32), TaskBatch.from_ids(IDS, 3))


# --- the index of a batch -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tasks", [0, 1, 5, 300])
@pytest.mark.parametrize("samples", [0, 1, 7, 1000])
def test_sorts_as_pytorch_does(samples: int, num_tasks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(-1, num_tasks, (samples,), generator=torch.Generator().manual_seed(0))
    got = TaskBatch.from_ids(ids[::1], num_tasks)
    strided_ids = torch.stack([ids, ids.new_full(ids.shape, 10**6)], 1)[:, 0]
    also = TaskBatch.from_ids(strided_ids, num_tasks)
    present = sorted(set(ids.tolist()) - {-1})
    monkeypatch.setattr(_ext, "CPU_ERROR", "no compiler")
    want = TaskBatch.from_ids(ids, num_tasks)
    for found in (got, also):
        assert all(map(torch.equal, found.tensors, want.tensors))
    renumbered = [present.index(id) if id >= 0 else -1 for id in ids.tolist()]
    alone = TaskBatch.from_ids(torch.tensor(renumbered, dtype=torch.int64), len(present))
    assert all(map(torch.equal, got.only(present).tensors, alone.tensors))


@pytest.mark.parametrize(
    ("ids", "num_tasks", "text"),
    [
        (torch.zeros(2, 2, dtype=torch.int64), 1, "ids must have 1 dimension, got 2"),
        (torch.zeros(2, dtype=torch.int32), 1, "ids must be int64, got scalar type 3"),
        (torch.zeros(2, dtype=torch.int64), -1, "num_tasks must not be negative, got -1"),
    ],
)
def test_errors_of_the_index(ids: Tensor, num_tasks: int, text: str) -> None:
    with pytest.raises(RuntimeError, match=f"sort_tasks: {text}"):
        torch.ops.taps_fast.sort_tasks(ids, num_tasks)


def test_ids_out_of_range_are_counted() -> None:
    with pytest.raises(ValueError, match=r"tasks must be ids in \[-1, 3\), .* got 3 \(2 of 4 out of range\)"):
        TaskBatch.from_ids([0, 3, -1, -2], 3)


@pytest.mark.parametrize("layout", [Tensor.contiguous, channels_last], ids=["planes", "channels last"])
def test_long_sums_lose_nothing(layout: Callable[[Tensor], Tensor]) -> None:
    """Of many values far from zero, and close to each other."""
    x = layout(1000.1 + 0.01 * torch.randn(2, 2, 224, 224))
    mean, variance = OPS.moments(x, None, None, None, 1)
    torch.testing.assert_close(mean[0].double(), x.double().mean((0, 2, 3)), rtol=1e-7, atol=0)
    torch.testing.assert_close(variance[0].double(), x.double().var((0, 2, 3), correction=0), rtol=3e-3, atol=0)
    same = layout(torch.full((1, 2, 1024, 1024), 0.1))
    assert float(group_norm(same, [], [], 1, 1e-5, TaskBatch.from_ids([0], 1)).abs().max()) < 1e-3
