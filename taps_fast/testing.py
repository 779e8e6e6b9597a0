"""How results are judged: against the oracle in float64 *and* against PyTorch's own error at the same dtype.

There is no hand-picked tolerance. A result passes when it is about as close to the truth as what a user would
get by summing the weight and calling PyTorch::

    max|out - ref| <= 2·max|low - ref| + floor        rms(out - ref) <= 1.5·rms(low - ref) + floor

where floor = 8·eps(accumulation dtype)·scale and scale is max|ref|, or the size of the summed terms where a
sum cancels (a coefficient's gradient). Where P is rounded to 16 bits, PyTorch's own <P, Δ> may be exact by luck:
there the floor is at least what such roundings come to, eps(dtype)·|P∘Δ|. Tests and benchmarks share this file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import functional
from ._dispatch import TABLE, BackendError, Choice, select
from ._problem import Problem
from .tasks import TaskBatch

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One point of the axes: what is computed, on what shapes. ``tasks`` are the ids, one a sample."""

    dtype: torch.dtype = torch.float32
    rows: int = 7
    shape: tuple[int, ...] = (13, 11)
    """(O, I); for a convolution (O, C / groups, kh, kw)."""
    num_deltas: int = 1
    tasks: tuple[int, ...] | None = None
    num_tasks: int = 0
    bias: str | None = "shared"
    """None, "shared" [O], "task" [T, O] or "base" [T + 1, O]."""
    scale: str | None = None
    """As ``bias``: of what follows the product."""
    shift: str | None = None
    activation: str | None = None
    zeros: tuple[int, ...] = ()
    """Flat positions of coeffs that are 0."""
    baked: tuple[int, ...] = ()
    """Tasks whose base coefficient is 0."""
    strided: bool = False
    """Non-contiguous inputs and an expanded gradient."""
    conv: dict[str, Any] = field(default_factory=dict)
    """stride, padding, dilation, groups of a convolution; its images are 9 x 8 pixels."""
    channels_last: bool = False
    """The memory format of a convolution's x and weights."""
    seed: int = 0

    @property
    def is_conv(self) -> bool:
        return len(self.shape) == 4

    def __str__(self) -> str:
        changed = (f.name for f in dataclasses.fields(self) if getattr(self, f.name) != Case.__dict__.get(f.name, None))
        return " ".join(f"{name}={getattr(self, name)}" for name in changed if name != "seed")


@dataclass(frozen=True)
class Inputs:
    """A case's tensors. Every tensor but base_coeffs requires a gradient."""

    case: Case
    x: Tensor
    base: Tensor
    deltas: list[Tensor]
    coeffs: Tensor
    base_coeffs: Tensor | None
    bias: Tensor | None
    dy: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same numbers in another dtype (coefficients at least in float32)."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32

        def leaf(t: Tensor, dtype: torch.dtype = dtype) -> Tensor:
            return t.detach().to(dtype, copy=True).requires_grad_()

        return Inputs(
            self.case,
            leaf(self.x),
            leaf(self.base),
            [leaf(d) for d in self.deltas],
            leaf(self.coeffs, wide),
            None if self.base_coeffs is None else self.base_coeffs.to(wide),
            None if self.bias is None else leaf(self.bias),
            self.dy.to(dtype),
            None if self.scale is None else leaf(self.scale, wide),
            None if self.shift is None else leaf(self.shift, wide),
        )


def make_inputs(case: Case, device: str = "cpu") -> Inputs:
    """Random tensors for ``case``, exactly representable in its dtype."""
    g = torch.Generator().manual_seed(case.seed)
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    o, i = case.shape[0], math.prod(case.shape[1:])

    def draw(*size: int, scale: float = 1.0, dtype: torch.dtype = case.dtype) -> Tensor:
        t = (torch.randn(size, generator=g, dtype=torch.float64) * scale).to(dtype)
        if case.strided and t.dim() > 1 and t.numel():
            # Every second column of a wider buffer, transposed storage for matrices.
            t = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), float("nan")).index_copy_(
                -1, torch.arange(0, 2 * t.shape[-1], 2), t
            )[..., ::2]
        if case.channels_last and t.dim() == 4:
            t = t.contiguous(memory_format=torch.channels_last)
        return t.to(device).requires_grad_()

    groups = case.conv.get("groups", 1)
    x = draw(case.rows, case.shape[1] * groups, 9, 8) if case.is_conv else draw(case.rows, i)
    base = draw(*case.shape, scale=i**-0.5)
    deltas = [draw(*case.shape, scale=0.5 * i**-0.5) for _ in range(case.num_deltas)]
    size = (case.num_deltas,) if case.tasks is None else (case.num_tasks, case.num_deltas)
    coeffs = torch.randn(size, generator=g, dtype=torch.float64).to(wide)
    coeffs.view(-1)[list(case.zeros)] = 0.0
    base_coeffs = None
    if case.baked:
        base_coeffs = torch.ones(max(case.num_tasks, 1), dtype=wide)
        base_coeffs[list(case.baked)] = 0.0
        base_coeffs = base_coeffs.to(device)
    rows_of_bias = {"shared": (), "task": (case.num_tasks,), "base": (case.num_tasks + 1,)}
    bias = None if case.bias is None else draw(*rows_of_bias[case.bias], o)
    coeffs = coeffs.to(device).requires_grad_()
    with torch.no_grad():
        shape = F.conv2d(x.double(), base.double(), **case.conv).shape if case.is_conv else (case.rows, o)
    dy = torch.randn(shape, generator=g, dtype=torch.float64).to(case.dtype).to(device)
    if case.strided and dy.numel():
        dy = dy[:1].expand(shape)
    kinds = (case.scale, case.shift)
    scale, shift = (None if kind is None else draw(*rows_of_bias[kind], o, dtype=wide) for kind in kinds)
    return Inputs(case, x, base, deltas, coeffs, base_coeffs, bias, dy, scale, shift)


def run(inputs: Inputs, call: Callable[[Inputs], Tensor]) -> Results:
    """y and every gradient of ``call`` for the upstream gradient ``inputs.dy``."""
    y = call(inputs)
    named = {"dx": inputs.x, "dbase": inputs.base, "dcoeffs": inputs.coeffs}
    named |= {f"ddeltas[{k}]": d for k, d in enumerate(inputs.deltas)}
    named |= {f"d{name}": t for name in ("bias", "scale", "shift") if (t := getattr(inputs, name)) is not None}
    grads = torch.autograd.grad(y, list(named.values()), inputs.dy, allow_unused=True)
    found = (torch.zeros_like(t) if g is None else g for t, g in zip(named.values(), grads, strict=True))
    return {"y": y.detach()} | dict(zip(named, found, strict=True))


def ours(backend: str | None = None, algorithm: str = "auto") -> Callable[[Inputs], Tensor]:
    """The public function on a case's inputs."""

    def call(n: Inputs) -> Tensor:
        c = n.case
        kwargs: dict[str, Any] = dict(base_coeffs=n.base_coeffs, backend=backend, algorithm=algorithm)
        kwargs |= dict(scale=n.scale, shift=n.shift, activation=c.activation)
        if c.tasks is not None:
            kwargs["tasks"] = torch.tensor(c.tasks, dtype=torch.int64)
        if c.is_conv:
            return functional.delta_conv2d(n.x, n.base, n.deltas, n.coeffs, n.bias, **c.conv, **kwargs)
        return functional.delta_linear(n.x, n.base, n.deltas, n.coeffs, n.bias, **kwargs)

    return call


def plain_torch(n: Inputs) -> Tensor:
    """What a user would write: sum each task's weight in the inputs' dtype, call PyTorch on its rows."""
    c = n.case
    op = F.conv2d if c.is_conv else F.linear
    if c.tasks is None:
        scale = 1.0 if n.base_coeffs is None else float(n.base_coeffs[0])
        return _followed(n, op(n.x, _summed(n, n.coeffs, scale), n.bias, **c.conv), None)
    each = c.rows // max(len(c.tasks), 1)
    parts = []
    for b, t in enumerate(c.tasks):
        rows = n.x[b * each : (b + 1) * each]
        weight = n.base if t < 0 else _summed(n, n.coeffs[t], 1.0 if n.base_coeffs is None else float(n.base_coeffs[t]))
        parts.append(_followed(n, op(rows, weight, _of_task(n.bias, c.bias, t), **c.conv), t))
    return torch.cat(parts) if parts else op(n.x, n.base, None, **c.conv)


def _of_task(table: Tensor | None, kind: str | None, task: int | None) -> Tensor | None:
    """One task's row of a table [O], [T, O] or [T + 1, O]."""
    if table is None or table.dim() == 1 or task is None:
        return table
    return table[task] if task >= 0 else table[-1] if kind == "base" else None


def _followed(n: Inputs, y: Tensor, task: int | None) -> Tensor:
    """What follows the product, op by op in y's dtype."""
    scale, shift = _of_task(n.scale, n.case.scale, task), _of_task(n.shift, n.case.shift, task)
    spread = (slice(None),) + (None,) * (y.dim() - 2)
    y = y if scale is None else y * scale.to(y.dtype)[spread]
    y = y if shift is None else y + shift.to(y.dtype)[spread]
    return y if n.case.activation is None else getattr(F, n.case.activation)(y)


def _summed(n: Inputs, coeffs: Tensor, scale: float) -> Tensor:
    weight = n.base * scale
    for k, delta in enumerate(n.deltas):
        weight = weight + coeffs[k].to(delta.dtype) * delta
    return weight


def oracle(n: Inputs) -> Tensor:
    """The formula in float64, by the reference."""
    return ours("reference", "split")(n)


def assert_close_to_oracle(case: Case, backend: str | None, algorithm: str = "auto", device: str = "cpu") -> None:
    """y and all gradients of one backend and algorithm on one case; the inputs unchanged, the bits repeatable."""
    n = make_inputs(case, device)
    before = [t.detach().clone() for t in (n.x, n.base, *n.deltas, n.coeffs)]
    out = run(n, ours(backend, algorithm))
    again = run(n, ours(backend, algorithm))
    for name, value in out.items():
        assert torch.equal(value, again[name]), f"{name} differs from run to run"
    for t, old in zip((n.x, n.base, *n.deltas, n.coeffs), before, strict=True):
        assert torch.equal(t.detach().nan_to_num(), old.nan_to_num()), "an input was changed"
    ref = run(n.to(torch.float64), oracle)
    low = run(n.to(case.dtype), plain_torch)
    vendors = case.tasks is None and (device == "cuda" or (backend == "triton" and not case.is_conv))
    scales = sum_scales(n.to(torch.float64), ref, case.dtype if vendors and case.dtype.itemsize == 2 else None)
    for name in out:
        assert_no_worse_than_torch(out[name], ref[name], low[name], scale=scales.get(name), name=name)


def sum_scales(n: Inputs, ref: Results, rounded: torch.dtype | None = None) -> dict[str, float]:
    """|P|·|Δ|, the size of what sums to a coefficient's gradient; ``rounded``: the dtype that P was rounded to."""
    if not n.deltas or not n.x.numel():
        return {}
    deltas, x = [d.detach() for d in n.deltas], n.x.detach()
    spread = n.dy.norm() * x.norm() / max(x.shape[0], 1) ** 0.5
    size = max(float(d.norm()) for d in deltas) * float(ref["dbase"].norm() + spread)
    if rounded is not None:
        product: Any = F.conv2d if n.case.is_conv else F.linear
        (p,) = torch.func.vjp(lambda weight: product(x, weight, **n.case.conv), n.base.detach())[1](n.dy)
        terms = max(float((p * d).norm()) for d in deltas)
        size = max(size, torch.finfo(rounded).eps * terms / (8 * torch.finfo(torch.float32).eps))
    return {"dcoeffs": size}


def assert_no_worse_than_torch(
    out: Tensor, ref: Tensor, low: Tensor, *, scale: float | None = None, name: str = "result"
) -> None:
    """Checks ``out`` by this module's rule.

    Args:
        out: the result under test. ref: the truth, float64. low: PyTorch's result in out's dtype.
        scale: the size of the summed terms, where larger than max|ref|.

    Raises:
        AssertionError: another shape or dtype, a value that is not finite, too large an error; says which and where.
    """
    assert out.shape == ref.shape, f"{name}: shape {tuple(out.shape)}, expected {tuple(ref.shape)}"
    assert out.dtype == low.dtype, f"{name}: dtype {out.dtype}, expected {low.dtype}"
    if out.numel() == 0:
        return
    got, low, ref = out.detach().double().cpu(), low.detach().double().cpu(), ref.detach().cpu()
    accumulate = torch.float64 if out.dtype == torch.float64 else torch.float32
    floor = 8 * torch.finfo(accumulate).eps * max(float(ref.abs().max()), scale or 0.0)
    error, allowed = (got - ref).abs(), (low - ref).abs()
    limit = 2 * float(allowed.max()) + floor
    worst = float(error.max()) if bool(error.isfinite().all()) else float("inf")
    if not worst <= limit:
        bad = ~(error <= limit)
        where = tuple(int(i) for i in bad.nonzero()[0])
        raise AssertionError(
            f"{name}: max error {worst:.3g} > {limit:.3g} (PyTorch's own {float(allowed.max()):.3g}); "
            f"{int(bad.sum())} of {bad.numel()} elements, first at {where}: {got[where]:.6g} for {ref[where]:.6g}"
        )
    rms, rms_limit = _rms(error), 1.5 * _rms(allowed) + floor
    if not rms <= rms_limit:
        raise AssertionError(f"{name}: rms error {rms:.3g} > {rms_limit:.3g} (PyTorch's own {_rms(allowed):.3g})")


def _rms(error: Tensor) -> float:
    return float(error.square().mean().sqrt())


def available(op: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Choice]:
    """Every (backend, algorithm) that can run ``op`` here, the reference last."""
    shape = (8, 8) if op == "linear" else (8, 8, 3, 3)
    problem = Problem(op, device, dtype, shape, rows=8, num_deltas=1, num_tasks=2, grad=True)
    found = []
    for row in TABLE:
        with contextlib.suppress(BackendError):
            found.append(select(problem, row.backend, row.algorithm))
    return found


def linear_cases(dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    """The axes of the design: dtype x single/mixed x K x M, unsorted ids, an absent task, zeros, strides, baked."""
    for dtype in dtypes:
        for deltas in (0, 1, 2, 5):
            for rows in (0, 1, 7, 37):
                yield Case(dtype, rows=rows, num_deltas=deltas)
        yield Case(dtype, rows=131, shape=(67, 129), num_deltas=2)
        yield Case(dtype, rows=17, num_deltas=3, zeros=(0, 2))
        yield Case(dtype, rows=17, num_deltas=2, strided=True)
        yield Case(dtype, rows=17, num_deltas=1, baked=(0,), bias=None)
        for deltas in (0, 1, 2, 5):
            yield Case(dtype, rows=14, num_deltas=deltas, tasks=(2, 0, -1, 2, 0, 4, -1), num_tasks=5, bias="base")
        ids = (1, 3, -1, 1, 0, 0, 3, 1, 2, 2, -1)
        yield Case(dtype, rows=0, num_deltas=2, tasks=(), num_tasks=4, bias="task")
        yield Case(dtype, rows=11, num_deltas=4, tasks=ids, num_tasks=5, bias="task", zeros=(0, 5, 6, 7, 10))
        yield Case(dtype, rows=55, shape=(70, 33), num_deltas=4, tasks=ids, num_tasks=4, zeros=(1, 2, 3))
        yield Case(dtype, rows=22, num_deltas=3, tasks=ids, num_tasks=4, strided=True, bias="base")
        yield Case(dtype, rows=22, num_deltas=4, tasks=ids, num_tasks=4, baked=(1, 3), bias=None)
        yield Case(dtype, rows=11, num_deltas=4, tasks=(-1,) * 11, num_tasks=4, bias="base")


def epilogue_cases(dtypes: Sequence[torch.dtype], conv: bool) -> Iterator[Case]:
    """Scale, shift and activation. 16-bit rounding moves values across kinks, so gradients compare in 32 and 64."""
    ids = (1, 3, -1, 1, 0)
    kwargs: dict[str, Any] = dict(shape=(6, 4, 3, 3), conv=dict(padding=1)) if conv else dict(shape=(37, 11))
    for dtype in dtypes:
        for activation in (None, "relu", "relu6", "silu", "gelu"):
            yield Case(dtype, rows=3, scale="shared", shift="shared", activation=activation, **kwargs)
            mixed = dict(tasks=ids, num_tasks=5, scale="base", shift="task", activation=activation, **kwargs)
            yield Case(dtype, rows=10, num_deltas=4, **mixed)
        yield Case(dtype, rows=3, activation="silu", bias=None, **kwargs)
        yield Case(dtype, rows=5, tasks=ids, num_tasks=4, scale="task", bias="base", strided=True, **kwargs)
        yield Case(dtype, rows=5, tasks=ids, num_tasks=4, scale="shared", shift="base", activation="gelu", **kwargs)
        yield Case(dtype, rows=0, tasks=(), num_tasks=4, scale="task", shift="task", activation="silu", **kwargs)


def channels_last_cases(shape: tuple[int, ...], conv: dict[str, Any], dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    """One kind of convolution on channels last: one weight and mixed, adjacent ids and not, baked, absent tasks."""
    kwargs: dict[str, Any] = dict(shape=shape, conv=conv, channels_last=True)
    mixed = kwargs | dict(num_deltas=4, tasks=(1, 3, -1, 1, 0), num_tasks=4)
    for dtype in dtypes:
        yield Case(dtype, rows=3, num_deltas=2, **kwargs)
        yield Case(dtype, rows=10, zeros=(0, 9), bias="base", **mixed)
        yield Case(dtype, rows=6, num_deltas=2, tasks=(-1, -1, 0, 1, 1, 3), num_tasks=5, bias="task", **kwargs)
        yield Case(dtype, rows=5, baked=(1, 3), bias=None, **mixed)


def conv2d_cases(dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    """Strides, paddings, dilations, groups and 1 x 1, single and mixed."""
    ids = (1, 3, -1, 1, 0)
    shapes: list[tuple[tuple[int, ...], dict[str, Any]]] = [
        ((6, 4, 3, 3), {}),
        ((6, 4, 3, 3), dict(stride=2, padding=1)),
        ((6, 4, 2, 3), dict(padding="same")),
        ((6, 4, 3, 3), dict(padding=(2, 1), dilation=2)),
        ((6, 2, 3, 3), dict(groups=2, padding=1)),
        ((6, 1, 3, 3), dict(groups=6, stride=(2, 1))),
        ((6, 4, 1, 1), dict(stride=2)),
    ]
    for dtype in dtypes:
        for shape, conv in shapes:
            kwargs: dict[str, Any] = dict(shape=shape, conv=conv)
            yield Case(dtype, rows=3, num_deltas=1, **kwargs)
            yield Case(dtype, rows=5, num_deltas=4, tasks=ids, num_tasks=4, zeros=(0, 9), bias="base", **kwargs)
        shape, conv = shapes[1]
        for deltas in (0, 2, 5):
            yield Case(dtype, rows=2, shape=shape, num_deltas=deltas, conv=conv, bias=None)
        yield Case(dtype, rows=0, shape=shape, num_deltas=1, conv=conv)
        yield Case(dtype, rows=10, shape=shape, num_deltas=2, tasks=ids, num_tasks=5, conv=conv, bias="task")
        yield Case(dtype, rows=5, shape=shape, num_deltas=2, tasks=ids, num_tasks=4, conv=conv, strided=True)
        yield Case(dtype, rows=5, shape=shape, num_deltas=4, tasks=ids, num_tasks=4, conv=conv, baked=(1, 3), bias=None)
        yield Case(dtype, rows=5, shape=shape, num_deltas=1, tasks=(-1,) * 5, num_tasks=4, conv=conv)
        yield Case(dtype, rows=0, shape=shape, num_deltas=1, tasks=(), num_tasks=4, conv=conv)


def task_batch(case: Case, device: str = "cpu") -> TaskBatch:
    """The index of a case, for calling operators directly."""
    ids = torch.tensor(case.tasks or (), dtype=torch.int64)
    return TaskBatch.from_ids(ids, case.num_tasks, device=torch.device(device))


__all__ = [
    "Case",
    "Inputs",
    "assert_close_to_oracle",
    "assert_no_worse_than_torch",
    "available",
    "channels_last_cases",
    "conv2d_cases",
    "epilogue_cases",
    "linear_cases",
    "make_inputs",
    "oracle",
    "ours",
    "plain_torch",
    "run",
    "task_batch",
]
