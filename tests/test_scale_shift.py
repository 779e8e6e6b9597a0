"""What follows a product: scale, shift and activation, behind `delta_linear` and `delta_conv2d` and alone."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import pytest
import torch
from test_cpu_kernels import instruction_sets, run_python
from torch import Tensor

from taps_fast import TaskBatch, _pointwise, delta_conv2d, delta_linear, reference, scale_shift, testing
from taps_fast._problem import ACTIVATIONS
from taps_fast.testing import assert_no_worse_than_torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
IDS = (2, -1, 0, 2, 0, 4)


def behind(*dtypes: torch.dtype) -> list[tuple[Any, ...]]:
    return [
        (case, *choice)
        for op in ("linear", "conv2d")
        for case in testing.epilogue_cases(dtypes, op == "conv2d")
        for choice in testing.available(op)
    ]


@pytest.mark.parametrize("case, backend, algorithm", behind(torch.float32, torch.float64), ids=str)
def test_behind_a_product(case: testing.Case, backend: str, algorithm: str) -> None:
    testing.assert_close_to_oracle(case, backend, algorithm)


@pytest.mark.parametrize("case, backend, algorithm", behind(torch.bfloat16), ids=str)
def test_behind_a_product_in_16_bits(case: testing.Case, backend: str, algorithm: str) -> None:
    n = testing.make_inputs(case)
    with torch.no_grad():
        ref, low = testing.oracle(n.to(torch.float64)), testing.plain_torch(n.to(case.dtype))
        assert_no_worse_than_torch(testing.ours(backend, algorithm)(n), ref, low)


# --- alone ----------------------------------------------------------------------------------------------------------

# Widths on both sides of every vector length; planes shorter and longer than one; rows of several samples.
SHAPES = [(6, 5), (12, 16), (18, 67), (6, 24, 3, 3), (12, 3, 1, 1), (6, 40, 2, 2), (6, 19, 23), (6, 33, 2, 3, 4)]


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def columns(x: Tensor) -> Tensor:
    """The same numbers, in neither layout."""
    return torch.stack([x, torch.full_like(x, float("nan"))], -1)[..., 0]


LAYOUTS = {"contiguous": torch.Tensor.contiguous, "channels last": channels_last, "strided": columns}


def tables(kind: str, channels: int, dtype: torch.dtype) -> Tensor | None:
    rows = {"shared": (), "task": (5,), "base": (6,)}
    return None if kind == "none" else torch.randn(*rows[kind], channels).to(dtype).requires_grad_()


def gradients(y: Tensor, dy: Tensor, inputs: list[Tensor | None]) -> list[Tensor]:
    return list(torch.autograd.grad(y, [t for t in inputs if t is not None], dy))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_alone(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    """Every activation and kind of table: y, its layout, all gradients, and the same bits twice."""
    torch.manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    batch = TaskBatch.from_ids(IDS, 5)
    kinds = (("shared", "shared"), ("base", "task"), ("none", "base"), ("task", "none"))
    for activation, (scaled, shifted) in itertools.product(ACTIVATIONS, kinds):
        x = LAYOUTS[layout](torch.randn(shape).to(dtype)).requires_grad_()
        scale, shift = tables(scaled, shape[1], wide), tables(shifted, shape[1], wide)
        dy = LAYOUTS[layout](torch.randn(shape).to(dtype))
        args = [x, scale, shift]
        y = scale_shift(*args, tasks=batch, activation=activation)
        got = [y.detach(), *gradients(y, dy, args)]
        again = scale_shift(*args, tasks=batch, activation=activation)
        assert all(map(torch.equal, got, [again, *gradients(again, dy, args)]))
        assert y.is_contiguous() if layout != "channels last" else y.movedim(1, -1).is_contiguous()
        full = [_whole(x, 0), _whole(scale, 1), _whole(shift, 0)]
        exact = [None if t is None else t.detach().double().requires_grad_() for t in full]
        index, inner = batch.tensors, shape[0] // len(IDS)
        ref = reference.scale_shift(*exact, activation, index, inner)
        low = reference.scale_shift(*full, activation, index, inner)
        want, torchs = [ref.detach(), *gradients(ref, dy.double(), exact)], [low.detach(), *gradients(low, dy, full)]
        names = ["y", *(n for n, t in zip(("dx", "dscale", "dshift"), args, strict=True) if t is not None)]
        for name, g, r, t in zip(names, got, want, torchs, strict=True):
            summed = float((dy.double().abs() * (1 + x.detach().double().abs())).sum() / shape[1] * 2)
            assert_no_worse_than_torch(
                g, r[: g.shape[0]], t[: g.shape[0]], name=name, scale=summed if name[1:] in ("scale", "shift") else None
            )


ISA = """
import sys, torch, test_conv2d, test_scale_shift as t
from taps_fast import testing
assert torch.ops.taps_fast.cpu_isa() == sys.argv[1]
for dtype in t.FLOATS:
    for shape, layout in (((18, 67), "contiguous"), ((6, 24, 3, 3), "channels last"), ((6, 19, 23), "contiguous")):
        t.test_alone(shape, dtype, layout)
for case in test_conv2d.DEPTHWISE:
    testing.assert_close_to_oracle(case, "cpu")
"""


@pytest.mark.parametrize("isa", instruction_sets()[:-1])
def test_each_instruction_set(isa: str) -> None:
    """Those that this machine would not choose by itself."""
    result = run_python(ISA, isa, TAPS_FAST_CPU_ISA=isa)
    assert result.returncode == 0, result.stderr


def _whole(table: Tensor | None, base: float) -> Tensor | None:
    """[T + 1, C] of a table [T, C]; a leaf of its own."""
    if table is None:
        return None
    if table.dim() == 2 and table.shape[0] == 5:
        table = torch.cat([table, torch.full_like(table[:1], base)])
    return table.detach().requires_grad_()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_activations_over_their_range(activation: str | None, dtype: torch.dtype) -> None:
    """Tails, where an approximation drifts first, and what is not finite."""
    x = torch.cat([torch.linspace(-30, 30, 4001), torch.tensor([-100.0, 100.0, 0.0])]).to(dtype)[:, None]
    y = scale_shift(x, activation=activation)
    assert_no_worse_than_torch(
        y, reference.scale_shift(x.double(), None, None, activation), reference.scale_shift(x, None, None, activation)
    )
    special = scale_shift(torch.tensor([[float("nan")], [float("inf")]]).to(dtype), activation=activation)
    assert special[0].isnan()
    assert activation == "gelu" or special[1] == (6.0 if activation == "relu6" else float("inf"))


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_activations_of_the_largest_numbers(activation: str, dtype: torch.dtype) -> None:
    x = torch.tensor([[-math.inf, -3e38, -1e37, -1e5, -100, -88, -87.2, 100, 1e37, 3e38, math.nan]]).to(dtype)
    ours, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    y, want = scale_shift(ours, activation=activation), getattr(torch.nn.functional, activation)(exact)
    torch.testing.assert_close(y, want.to(dtype), atol=2e-36, rtol=1e-5, equal_nan=True)
    dx, dexact = (torch.autograd.grad(out.sum(), leaf)[0] for out, leaf in ((y, ours), (want, exact)))
    finite = x.isfinite()
    torch.testing.assert_close(dx[finite], dexact[finite].to(dtype), atol=2e-36, rtol=1e-5)


def test_gradcheck() -> None:
    x, scale, shift = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((6, 3, 2), (5, 3), (3,)))
    for activation in ACTIVATIONS:
        call = functools.partial(scale_shift, tasks=IDS, activation=activation)
        assert torch.autograd.gradcheck(call, (x, scale, shift))


@pytest.mark.parametrize("operator", [False, True])
def test_inference_writes_over_its_own_result_alone(operator: bool) -> None:
    """x keeps its numbers, and a result behind a product is the one that autograd gives."""
    x, w, scale = torch.randn(6, 4, 5, 5), torch.randn(3, 4, 3, 3), torch.randn(5, 3)
    before = x.clone()
    options: dict[str, Any] = dict(tasks=IDS, scale=scale, activation="relu")
    coeffs = torch.ones(5, 1)
    y = delta_conv2d(x, w, [w], coeffs, **options)
    assert torch.equal(x, before)
    want = delta_conv2d(x, w.clone().requires_grad_(), [w], coeffs, **options)
    assert want.requires_grad and torch.equal(y, want)


def test_channels_on_the_last_axis_and_the_batch_on_any() -> None:
    x, scale, shift = torch.randn(3, 6, 2, 7), torch.randn(5, 7), torch.randn(7)
    want = torch.cat([scale, torch.ones(1, 7)])[list(IDS)][:, None] * x + shift
    for axis in (1, -3):
        y = scale_shift(x, scale, shift, tasks=IDS, batch_dim=axis, channel_dim=-1)
        torch.testing.assert_close(y, want)


def test_autocast_leaves_the_dtype_and_the_tables() -> None:
    x, base, scale = torch.randn(6, 4), torch.randn(3, 4), torch.randn(5, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert scale_shift(x[:, :3], scale, tasks=IDS).dtype == torch.float32
        y = delta_linear(x, base, [], torch.ones(5, 0), tasks=IDS, scale=scale + 2**-12)
    assert y.dtype == torch.bfloat16
    z = torch.nn.functional.linear(x.bfloat16(), base.bfloat16())
    want = z.float() * torch.cat([scale + 2**-12, torch.ones(1, 3)])[list(IDS)]
    torch.testing.assert_close(y, want.bfloat16(), rtol=2**-7, atol=1e-6)


def test_no_rows() -> None:
    scale = torch.randn(5, 3, requires_grad=True)
    y = scale_shift(torch.randn(0, 3, 4, requires_grad=True), scale, tasks=[], activation="gelu")
    y.sum().backward()
    assert y.shape == (0, 3, 4) and not scale.grad.any()
    assert scale_shift(torch.randn(2, 3, 0), torch.randn(3)).shape == (2, 3, 0)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("alone", [False, True])
def test_compiles_whole(alone: bool, training: bool) -> None:
    base, shift = torch.randn(3, 4), torch.randn(6, 3)

    def f(x: Tensor, scale: Tensor, batch: TaskBatch) -> Tensor:
        if alone:
            return scale_shift(x @ base.t(), scale, shift, tasks=batch, activation="silu")
        return delta_linear(x, base, [], torch.ones(5, 0), tasks=batch, scale=scale, shift=shift, activation="silu")

    torch.compiler.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for ids in (IDS, (0, 1, 2, 3, 4, -1)):
        x = torch.randn(6, 4, requires_grad=training)
        scale = torch.randn(6, 3, requires_grad=training)
        batch = TaskBatch.from_ids(ids, 5)
        got, want = compiled(x, scale, batch), f(x, scale, batch)
        torch.testing.assert_close(got, want)
        if training:
            dy = torch.randn_like(want)
            got, want = (torch.autograd.grad(y, (x, scale), dy) for y in (got, want))
            torch.testing.assert_close(got, want)


def test_opcheck() -> None:
    ops = torch.ops.taps_fast
    batch = TaskBatch.from_ids(IDS, 5)
    for layout in LAYOUTS.values():
        x, dy = layout(torch.randn(6, 4, 3, 2)), layout(torch.randn(6, 4, 3, 2))
        for groups, rows in (((None, None, None, 1), ()), ((*batch.tensors, 1), (6,))):
            scale, shift = torch.randn(*rows, 4), torch.randn(4)
            rest = (*groups, "silu")
            torch.library.opcheck(ops.scale_shift.default, (x, scale, None, *rest))
            torch.library.opcheck(ops.scale_shift_.default, (x.clone(), scale, shift, *rest))
            torch.library.opcheck(ops.scale_shift_dx.default, (dy, x, scale, shift, scale, None, *rest))
            torch.library.opcheck(ops.scale_shift_sums.default, (dy, x, scale, shift, shift, *rest))
            torch.library.opcheck(ops.moments.default, (x, *groups))


# --- errors ---------------------------------------------------------------------------------------------------------

T = torch


@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        (dict(scale=T.ones(4)), ValueError, r"scale must be \(3,\) or \(5, 3\) or \(6, 3\), got \(4,\)"),
        (dict(shift=T.ones(2, 3)), ValueError, r"shift must be \(3,\) or \(5, 3\) or \(6, 3\), got \(2, 3\)"),
        (dict(scale=T.ones(3, dtype=T.int64)), TypeError, "scale must be a floating-point tensor, got torch.int64"),
        (dict(shift=1.0), TypeError, "shift must be a Tensor, got float"),
        (dict(scale=T.ones(3, device="meta")), ValueError, "scale must be on cpu like x, got meta"),
        (dict(activation="tanh"), ValueError, "activation must be one of None, relu, relu6, silu, gelu, got 'tanh'"),
    ],
)
def test_errors(changes: dict[str, Any], kind: type[Exception], text: str) -> None:
    batch = TaskBatch.from_ids(IDS, 5)
    with pytest.raises(kind, match=f"delta_linear: {text}"):
        delta_linear(T.randn(6, 4), T.randn(3, 4), [], T.ones(5, 0), tasks=batch, **changes)
    with pytest.raises(kind, match=f"delta_conv2d: {text}"):
        delta_conv2d(T.randn(6, 4, 3, 3), T.randn(3, 4, 1, 1), [], T.ones(5, 0), tasks=batch, **changes)
    with pytest.raises(kind, match=f"scale_shift: {text}"):
        scale_shift(T.randn(6, 3), **(dict(scale=T.ones(6, 3)) | changes), tasks=batch)


@pytest.mark.parametrize(
    ("x", "options", "kind", "text"),
    [
        (T.ones(3, dtype=T.int64), {}, TypeError, "x must be one of torch.float32, .*, got torch.int64"),
        ([1.0], {}, TypeError, "x must be a Tensor, got list"),
        (T.ones(3), {}, ValueError, r"channel_dim must be 1 or the last axis, got 1 \(x \(3,\)\)"),
        (T.ones(2, 3, 4), dict(channel_dim=0), ValueError, r"channel_dim must be 1 or the last axis, got 0"),
        (T.ones(7, 3), dict(scale=T.ones(5, 3), tasks=IDS), ValueError, "tasks must divide the batch: .*got 6 ids"),
        (T.ones(6, 3), dict(scale=T.ones(3, 3), tasks=IDS), ValueError, r"tasks must be ids in \[-1, 3\)"),
    ],
)
def test_errors_alone(x: Any, options: dict[str, Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        scale_shift(x, **options)


def test_second_derivatives_are_refused() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    y = scale_shift(x, torch.ones(3), activation="silu")
    with pytest.raises(RuntimeError, match="scale_shift: second derivatives need taps_fast.reference.scale_shift"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.parametrize("module", (_pointwise, torch.ops.taps_fast), ids=("plain", "kernel"))
def test_rows_that_diverged_spoil_the_sums_of_their_own_task(module: Any) -> None:
    x = torch.randn(4, 6)
    x[1] = torch.nan
    index = TaskBatch.from_ids([0, 1, -1, 0], 2).tensors
    found = (*module.moments(x, *index, 1), *module.scale_shift_sums(x, x, None, None, None, *index, 1, "none"))
    for sums in found:
        assert sums.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("activation", ("relu", "relu6"))
@pytest.mark.parametrize("shape", ((2, 40), (2, 3, 5, 5)))
def test_nothing_is_passed_on_of_an_infinite_gradient(activation: str, shape: tuple[int, ...]) -> None:
    """As in PyTorch: the square root of what relu makes 0 has an infinite gradient there."""
    x = torch.linspace(-3, 9, math.prod(shape)).view(shape).requires_grad_()
    scale, shift = torch.full((shape[1],), 1.5, requires_grad=True), torch.zeros(shape[1], requires_grad=True)
    found = torch.autograd.grad(scale_shift(x, scale, shift, activation=activation).sqrt().sum(), (x, scale, shift))
    channels = (-1, *(1,) * (len(shape) - 2))
    y = getattr(torch.nn.functional, activation)(x * scale.view(channels) + shift.view(channels))
    for got, want in zip(found, torch.autograd.grad(y.sqrt().sum(), (x, scale, shift)), strict=True):
        torch.testing.assert_close(got, want)


def test_in_place_is_seen_by_a_graph_that_saved_x() -> None:
    a, w = torch.ones(2, 3), torch.ones(2, 3, requires_grad=True)
    y = a * w
    scale_shift(a, torch.full((3,), 5.0), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
