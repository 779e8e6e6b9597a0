"""The CUDA kernels of norms, emulated: scale, shift and activation by task, their gradients, and sums by task."""

from __future__ import annotations

import itertools
from typing import Any

import emulator
import pytest
import torch
from torch import Tensor

from taps_fast import _pointwise
from taps_fast.tasks import TaskBatch
from taps_fast.testing import assert_no_worse_than_torch

emulated = emulator.load()
ops = torch.ops.taps_fast_emulated
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ACTIVATIONS = ("none", "relu", "relu6", "silu", "gelu")
IDS, TASKS = (2, 0, -1, 2, 2), 4  # tasks 1 and 3 have no rows
SHAPES = ((5, 8), (5, 7), (10, 40), (5, 3, 4, 4), (5, 6, 3, 5), (10, 2, 41), (0, 4), (5, 0), (0, 4, 2, 2))
LAYOUTS = {
    "contiguous": lambda t: t,
    "channels last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
}


@pytest.fixture(autouse=True)
def settings():
    emulated.reset()
    yield emulated.settings()
    emulated.reset()


class Inputs:
    """x, dy and tables [T + 1, C] of one case, and where rows belong."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous", mixed: bool = True):
        g = torch.Generator().manual_seed(1)
        wide = torch.promote_types(dtype, torch.float32)
        self.x, self.dy = (LAYOUTS[layout](torch.randn(shape, generator=g).to(dtype)) for _ in range(2))
        ids = IDS if shape[0] else ()
        batch = TaskBatch.from_ids(torch.tensor(ids, dtype=torch.int64), TASKS)
        self.groups: tuple[Any, ...] = (*batch.tensors, max(shape[0] // 5, 1) if mixed else 1)
        size = (TASKS + 1, shape[1])
        if not mixed:
            self.groups, size = (None, None, None, 1), (shape[1],)
        self.tables = [torch.randn(size, generator=g).to(wide) for _ in range(4)]


def check(got: Tensor, name: str, *args: Any, part: int | None = None, scale: float | None = None) -> None:
    """Against plain PyTorch in float64, and its own error in the case's type."""
    run = getattr(_pointwise, name)
    wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    ref, low = run(*wide), run(*args)
    if part is not None:
        ref, low = ref[part], low[part]
    assert_no_worse_than_torch(got, ref, low, scale=scale, name=name)


CASES = [
    *itertools.product(SHAPES, DTYPES, ("contiguous",), (True,)),
    *itertools.product(SHAPES, (torch.bfloat16,), ("channels last", "strided"), (True,)),
    *itertools.product(SHAPES, (torch.float32,), ("contiguous", "channels last"), (False,)),
]


@pytest.mark.parametrize(("shape", "dtype", "layout", "mixed"), CASES, ids=str)
def test_pass_and_gradient(shape, dtype, layout, mixed):
    n = Inputs(shape, dtype, layout, mixed)
    scale, shift, slope, offset = n.tables
    y = ops.scale_shift(n.x, scale, shift, *n.groups, "silu")
    check(y, "scale_shift", n.x, scale, shift, *n.groups, "silu")
    assert y.numel() == 0 or y.stride() == _pointwise.scale_shift(n.x, scale, shift, *n.groups, "silu").stride()
    dx = ops.scale_shift_dx(n.dy, n.x, *n.tables, *n.groups, "gelu")
    check(dx, "scale_shift_dx", n.dy, n.x, *n.tables, *n.groups, "gelu")
    over = n.x.clone(memory_format=torch.preserve_format)
    ops.scale_shift_(over, scale, shift, *n.groups, "silu")
    assert torch.equal(over, y)


@pytest.mark.parametrize(("shape", "dtype", "layout", "mixed"), CASES, ids=str)
def test_sums_and_moments(shape, dtype, layout, mixed):
    n = Inputs(shape, dtype, layout, mixed)
    scale, shift, center, _ = n.tables
    size = float(n.x.double().norm() * n.dy.double().norm()) + float(n.dy.double().norm()) if n.x.numel() else 0.0
    for part, got in enumerate(ops.scale_shift_sums(n.dy, n.x, scale, shift, center, *n.groups, "silu")):
        check(got, "scale_shift_sums", n.dy, n.x, scale, shift, center, *n.groups, "silu", part=part, scale=size)
    for part, got in enumerate(ops.moments(n.x, *n.groups)):
        check(got, "moments", n.x, *n.groups, part=part, scale=size)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("tables", ("none", "scale", "shift", "one row"))
def test_activations_and_absent_tables(activation, tables):
    n = Inputs((5, 8, 4), torch.float32)
    n.x[0, 0] = torch.tensor([float("nan"), 6.0, 1e20, 0.0])
    scale, shift, slope, offset = n.tables
    scale = {"none": None, "shift": None, "one row": scale[0]}.get(tables, scale)
    shift = {"none": None, "scale": None, "one row": shift[0]}.get(tables, shift)
    for name, args in (
        ("scale_shift", (n.x, scale, shift, *n.groups, activation)),
        ("scale_shift_dx", (n.dy, n.x, scale, shift, None, offset, *n.groups, activation)),
        ("scale_shift_dx", (n.dy, n.x, scale, shift, slope, None, *n.groups, activation)),
    ):
        expected = getattr(_pointwise, name)(*args)
        torch.testing.assert_close(getattr(ops, name)(*args), expected, equal_nan=True)


def test_variance_far_from_zero():
    """Σx² - (Σx)²/n would have no digit left here."""
    x = torch.randn(64, 3, 50) + 1e4
    index = (None, None, None, 1)
    mean, variance = ops.moments(x, *index)
    torch.testing.assert_close(mean[0].double(), x.double().mean((0, 2)), rtol=1e-6, atol=0)
    torch.testing.assert_close(variance[0].double(), x.double().var((0, 2), correction=0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("far", (30.0, 300.0, -100.0))
@pytest.mark.parametrize("layout", ("contiguous", "channels last"))
def test_variance_beside_a_first_element_that_is_far_off(layout, far):
    """As the corner of a padded image is."""
    x = LAYOUTS[layout](torch.randn(128, 2, 7, 7))
    x[0, :, 0, 0] = far
    mean, variance = ops.moments(x, None, None, None, 1)
    torch.testing.assert_close(mean[0].double(), x.double().mean((0, 2, 3)), rtol=0, atol=1e-6)
    torch.testing.assert_close(variance[0].double(), x.double().var((0, 2, 3), correction=0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("layout", ("contiguous", "channels last"))
@pytest.mark.parametrize("order", ("backward", "random"))
def test_splits_and_the_order_of_threads_change_nothing(settings, layout, order):
    """Many processors: each group's rows are cut up, and added in one order all the same."""
    settings.processors = 200
    n = Inputs((50, 3, 60), torch.float32, layout)
    expected = ops.moments(n.x, *n.groups)
    assert settings.launches[-2].blocks >= 2 * (TASKS + 1)
    settings.order = order
    for got, first in zip(ops.moments(n.x, *n.groups), expected, strict=True):
        assert torch.equal(got, first)
    for part, got in enumerate(expected):
        check(got, "moments", n.x, *n.groups, part=part, scale=float(n.x.abs().max()))


def test_misaligned_rows_take_the_single_loads():
    wide = torch.randn(5 * 16 + 1)
    x = wide[1:].view(5, 16)
    n = Inputs((5, 16), torch.float32)
    check(ops.scale_shift(x, *n.tables[:2], *n.groups, "none"), "scale_shift", x, *n.tables[:2], *n.groups, "none")


@pytest.mark.parametrize(
    ("name", "kernel"), (("scale_shift", "pointwise_kernel"), ("moments", "group_sums_kernel")), ids=str
)
def test_a_failed_launch_says_what_was_started(settings, name, kernel):
    settings.refuse = "out of resources"
    n = Inputs((5, 8), torch.float32)
    args = (*n.tables[:2], *n.groups, "none") if name == "scale_shift" else n.groups
    with pytest.raises(
        RuntimeError,
        match=rf"{name}: {kernel} did not start: out of resources \(float32, 5 rows of 8 channels, 1 pixels",
    ):
        getattr(ops, name)(n.x, *args)


def test_a_chip_that_it_was_not_compiled_for_gets_what_runs_without_it(settings):
    """No launch is tried there; an error of another kernel is not swallowed either."""
    settings.served = False
    n = Inputs((5, 8, 4), torch.float32)
    scale, shift, slope, offset = n.tables
    for name, args in (
        ("scale_shift", (n.x, scale, shift, *n.groups, "silu")),
        ("scale_shift_dx", (n.dy, n.x, *n.tables, *n.groups, "gelu")),
        ("scale_shift_sums", (n.dy, n.x, scale, shift, slope, *n.groups, "silu")),
        ("moments", (n.x, *n.groups)),
    ):
        torch.testing.assert_close(getattr(ops, name)(*args), getattr(_pointwise, name)(*args), rtol=0, atol=0)
    over = n.x.clone()
    ops.scale_shift_(over, scale, offset, *n.groups, "relu")
    assert torch.equal(over, _pointwise.scale_shift(n.x, scale, offset, *n.groups, "relu"))
    assert len(settings.launches) == 0


@pytest.mark.parametrize(
    ("changes", "text"),
    (
        ({"x": torch.ones(5)}, "scale_shift: x must have at least 2 dimensions, got [5]"),
        ({"x": torch.ones(5, 8, dtype=torch.int64)}, "scale_shift: x must be float32, bfloat16, float16 or float64"),
        ({"x": torch.ones(4, 8)}, "scale_shift: rows must be a multiple of inner times the batch, got 4 (inner 1, "),
        ({"scale": torch.ones(5, 7)}, "scale_shift: scale must have 40 elements, got [5, 7]"),
        ({"scale": torch.ones(5, 8).half()}, "scale_shift: scale must have scalar type 6, got 5"),
        ({"order": None}, "scale_shift: ids, order and offsets must come together"),
        ({"activation": "tanh"}, "scale_shift: activation must be none, relu, relu6, silu or gelu, got 'tanh'"),
    ),
)
def test_wrong_arguments_are_errors(changes, text):
    n = Inputs((5, 8), torch.float32)
    names = ("x", "scale", "shift", "ids", "order", "offsets", "inner", "activation")
    values = dict(zip(names, (n.x, *n.tables[:2], *n.groups, "none"), strict=True)) | changes
    with pytest.raises(RuntimeError) as error:
        ops.scale_shift(*values.values())
    assert text in str(error.value)
