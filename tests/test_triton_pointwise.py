"""The pointwise operators in Triton: on a CUDA device where there is one, else in the interpreter."""

from __future__ import annotations

import pytest
import torch
from taps_fast.kernels import pointwise
from triton_shim import DEVICE

from taps_fast import _ops, _pointwise
from taps_fast.tasks import TaskBatch
from taps_fast.testing import assert_no_worse_than_torch

ACTIVATIONS = ("none", "relu", "relu6", "silu", "gelu")
TASKS = 3
IDS = (2, 0, -1, 2, 0)
"""Unsorted, the base among them, and no row of task 1."""
LAYOUTS = {
    "rows": lambda x: x.flatten(2)[:, :, 0].contiguous(),
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "strided": lambda x: x.repeat(1, 1, 1, 2)[..., ::2],
}


def drawn(dtype, layout, rows=10, channels=19):
    g = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randn(size, generator=g).to(DEVICE)

    x, dy = (LAYOUTS[layout]((2 * draw(rows, channels, 3, 5)).to(dtype)) for _ in range(2))
    tables = [draw(channels), draw(TASKS + 1, channels), draw(TASKS + 1, channels), draw(channels)]
    index = TaskBatch.from_ids(torch.tensor(IDS, device=DEVICE), TASKS).tensors
    return x, dy, tables, index


RESULT = ("result",)


def check(name, *args, labels=RESULT):
    """Against `_pointwise` in float64 and at the same dtype, by the rule of `taps_fast.testing`."""

    def run(module, cast=lambda t: t):
        cast_args = [cast(a) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
        found = getattr(module, name)(*cast_args)
        return found if isinstance(found, tuple) else (found,)

    # What a task's sums are made of may cancel: its size is that of the largest channel's terms, of a variance the mean
    # square of what is summed, the distance from an element.
    first, second = args[0].double(), args[1].double() if isinstance(args[1], torch.Tensor) else torch.ones(())
    terms = (first * (second if second.shape == first.shape else 1.0)).abs().transpose(0, 1).flatten(1)
    apart = first.transpose(0, 1).flatten(1)
    sizes = {"scale_shift_sums": terms.sum(1), "moments": (apart - apart[:, :1]).square().mean(1)}
    size_of_terms = float(sizes[name].max()) if name in sizes else None
    got, ref, low = run(pointwise), run(_pointwise, torch.Tensor.double), run(_pointwise)
    for label, a, b, c in zip(labels, got, ref, low, strict=True):
        assert a.stride() == c.stride()
        assert_no_worse_than_torch(a, b, c, scale=size_of_terms if labels != RESULT else None, name=label)
    for first, again in zip(got, run(pointwise), strict=True):
        assert torch.equal(first, again)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_operator(layout, dtype):
    """Tables shared and by task, with ids and without; ids cover two rows each."""
    x, dy, (shared, each, other, offset), index = drawn(dtype, layout)
    for groups, table, second in (((*index, 2), each, other), ((None, None, None, 1), shared, offset)):
        check("scale_shift", x, table, second, *groups, "relu")
        check("scale_shift_dx", dy, x, table, second, second, table, *groups, "silu")
        for center in (None, shared, *((other,) if groups[0] is not None else ())):
            check("scale_shift_sums", dy, x, table, second, center, *groups, "gelu", labels=("du·x", "du"))
        check("moments", x, *groups, labels=("mean", "variance"))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation):
    x, dy, (_, each, other, _), index = drawn(torch.float32, "channels_last")
    check("scale_shift", x, each, other, *index, 2, activation)
    check("scale_shift_dx", dy, x, each, other, None, None, *index, 2, activation)
    check("scale_shift_sums", dy, x, None, other, None, *index, 2, activation, labels=("du·x", "du"))
    check("scale_shift", x, None, None, *index, 2, activation)


@pytest.mark.parametrize("layout", ("rows", "contiguous", "channels_last"))
def test_it_writes_over_a_dense_input(layout):
    x, _, (shared, _, _, _), _ = drawn(torch.float32, layout)
    expected = pointwise.scale_shift(x, shared, None, None, None, None, 1, "relu6")
    place = x.data_ptr()
    pointwise.scale_shift_(x, shared, None, None, None, None, 1, "relu6")
    assert x.data_ptr() == place
    assert torch.equal(x, expected)


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_sums_in_parts(monkeypatch, layout):
    """More parts than some tasks have rows."""
    monkeypatch.setattr(pointwise._configs, "splits", lambda *_: 8)
    x, dy, (_, each, other, _), index = drawn(torch.float32, layout)
    check("scale_shift_sums", dy, x, each, other, other, *index, 2, "none", labels=("du·x", "du"))
    check("moments", x, *index, 2, labels=("mean", "variance"))


def test_variance_far_from_zero_is_right():
    x = (1e4 + torch.randn(6, 8, 4, 4, generator=torch.Generator().manual_seed(0))).to(DEVICE)
    check("moments", x, None, None, None, 1, labels=("mean", "variance"))


def test_operators_run_it_but_for_float64():
    """On CUDA, where no compiled kernel does; `depthwise` has no Triton form."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    assert not has_kernel("taps_fast::depthwise", "CUDA")
    for name in ("scale_shift", "scale_shift_", "scale_shift_dx", "scale_shift_sums", "moments", "coded_dx", "fold"):
        assert has_kernel(f"taps_fast::{name}", "CUDA"), name
    run = _ops._unless_float64(lambda x, y: ("kernel", y), lambda x, y: ("plain", y))
    assert [run(torch.ones(1, dtype=d), 3) for d in (torch.bfloat16, torch.float64)] == [("kernel", 3), ("plain", 3)]


@pytest.mark.parametrize("shape", ((2, 70), (2, 3, 2**26)), ids=str)
def test_no_number_of_tasks_or_pixels_exceeds_a_grid(monkeypatch, shape):
    """Axes of a grid but the first end at 65535 programs: there is only the first."""
    grids = []

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *_, **__: None

    for name in ("scale_shift_kernel", "task_sums_kernel", "sum_parts_kernel"):
        monkeypatch.setattr(pointwise, name, Recorder())
    torch.use_deterministic_algorithms(False)
    x = torch.empty(1, dtype=torch.float32, device=DEVICE).expand(shape)
    monkeypatch.setattr(pointwise, "_form", lambda x: (x, 2**26 if x.dim() > 2 else 1, x.dim() == 2))
    monkeypatch.setattr(torch, "empty_like", lambda x: x)
    index = TaskBatch.from_ids(torch.tensor([0, 69_999], device=DEVICE), 70_000).tensors
    pointwise.scale_shift(x, None, None, *index, 1, "none")
    pointwise.moments(x, *index, 1)
    assert len(grids) == 5
    assert all(len(grid) == 1 and grid[0] < 2**31 for grid in grids)
    assert max(grids) >= (70_001,)


def test_nan_stays_and_no_rows_are_no_error():
    x = torch.full((2, 3), float("nan"), device=DEVICE)
    for activation in ACTIVATIONS:
        assert pointwise.scale_shift(x, None, None, None, None, None, 1, activation).isnan().all()
    index = TaskBatch.from_ids(torch.empty(0, dtype=torch.int64, device=DEVICE), TASKS).tensors
    empty = torch.empty(0, 3, device=DEVICE)
    assert pointwise.scale_shift(empty, None, None, *index, 1, "relu").shape == (0, 3)
    for sums in (
        pointwise.moments(empty, *index, 1),
        pointwise.scale_shift_sums(empty, empty, None, None, None, *index, 1, "relu"),
    ):
        assert all(t.shape == (TASKS + 1, 3) and not t.any() for t in sums)
