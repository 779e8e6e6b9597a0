"""What follows a product and what normalises in a mixed batch: `scale_shift` and `batch_norm`, in passes over x."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _ext, _problem
from ._autograd import BatchNorm, BatchNormOfTasks, Given, GroupNormOfTasks, Groups, ScaleShift
from .tasks import Index, TaskBatch

Tasks = TaskBatch | Tensor | Sequence[int]


def scale_shift(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    tasks: Tasks | None = None,
    batch_dim: int = 0,
    channel_dim: int = 1,
    activation: str | None = None,
    inplace: bool = False,
) -> Tensor:
    """A scale and a shift for each channel, chosen row by row, and an activation, in one pass over x.

    ::

        y_r = act(scale[t]·x_r + shift[t])          t = the task of row r

    An evaluated batch norm is one; so is the affine part of any norm.

    Args:
        x: [N, C, …], or [..., C] with ``channel_dim=-1``; float32, bfloat16, float16 or float64; contiguous and
            channels last stay as they are. Under autocast it keeps its dtype.
        scale, shift: [C]; with tasks also [T, C] (rows of id -1 then have 1 and 0) or [T + 1, C] (last row: id
            -1). Any floating-point dtype; used in float32 (float64 when x is). Default 1 and 0.
        tasks, batch_dim: as in `delta_linear`; with ``channel_dim=1`` the batch is axis 0. T comes from the tables,
            so a table [T, C] or [T + 1, C] is told from the other by a `TaskBatch`'s T; ids alone mean [T, C].
        channel_dim: 1, or the last axis.
        activation: None, "relu", "relu6", "silu" or "gelu" (the exact one).
        inplace: whether y may be written over x, where no gradient needs it.

    Returns:
        y like x. Gradients: x, scale, shift; sums over a task's rows have a fixed order.

    Raises:
        ValueError: shapes, devices or ids that do not fit, an unknown activation; TypeError: dtypes.

    Cost: x is read and y written once; in the backward x and dy are read once for dx and once for the sums.

    >>> x, scale = torch.randn(3, 4, 5, 5), torch.randn(2, 4)
    >>> y = scale_shift(x, scale, tasks=[1, 0, -1], activation="relu")
    >>> bool(torch.allclose(y[0], (x[0] * scale[1][:, None, None]).relu())), bool(torch.equal(y[2], x[2].relu()))
    (True, True)
    """
    name = "scale_shift"
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: x must be a Tensor, got {type(x).__name__}")
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return scale_shift(x, scale, shift, tasks=tasks, batch_dim=batch_dim, channel_dim=channel_dim,
                               activation=activation, inplace=inplace)  # fmt: skip
    if _problem.is_transformed():
        _problem.refuse_transforms(name, "taps_fast.reference.scale_shift, or ")
    if x.dtype not in _problem.DTYPES:
        raise TypeError(f"{name}: x must be one of {', '.join(map(str, _problem.DTYPES))}, got {x.dtype}")
    last = channel_dim in (-1, x.dim() - 1)
    if x.dim() < 2 or not (last or channel_dim == 1):
        raise ValueError(f"{name}: channel_dim must be 1 or the last axis, got {channel_dim} (x {tuple(x.shape)})")
    num_tasks = _tasks_of_tables(tasks, scale, shift)
    _problem.check_epilogue(name, scale, shift, activation, x.shape[channel_dim], num_tasks, x)
    index: Index = (None, None, None)
    inner = 1
    if tasks is not None and num_tasks is not None:
        batch = _problem.group(name, tasks, num_tasks, x)
        inner = _problem.rows_per_sample(name, x, batch.size, batch_dim, x.dim() - 1 if last else 1)
        index = batch.tensors
    rows = x.flatten(0, -2) if last and x.dim() > 2 else x
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    tables = (table(scale, num_tasks, 1.0, exact), table(shift, num_tasks, 0.0, exact))
    return follow(rows, *tables, Groups(index, inner, activation or "none"), owned=inplace).view(x.shape)


def _tasks_of_tables(tasks: Tasks | None, scale: Tensor | None, shift: Tensor | None) -> int | None:
    """T: a `TaskBatch` knows it; ids alone index tables [T, C]."""
    if tasks is None or isinstance(tasks, TaskBatch):
        return None if tasks is None else tasks.num_tasks
    rows = [table.shape[0] for table in (scale, shift) if isinstance(table, Tensor) and table.dim() == 2]
    return rows[0] if rows else None


def table(table: Tensor | None, num_tasks: int | None, base: float, dtype: torch.dtype) -> Tensor | None:
    """A table in ``dtype``, [C] or [T + 1, C]; the base's row is ``base`` where none was given."""
    if table is None:
        return None
    if table.dim() == 2 and table.shape[0] == num_tasks:
        table = F.pad(table, (0, 0, 0, 1), value=base)
    return table if table.dtype == dtype and table.is_contiguous() else table.to(dtype).contiguous()


def follow(x: Tensor, scale: Tensor | None, shift: Tensor | None, groups: Groups, *, owned: bool) -> Tensor:
    """act(scale·x + shift): over x where nobody else has it and no gradient needs it."""
    if all(table is None or table.dim() == 1 for table in (scale, shift)):
        groups = Groups((None, None, None), 1, groups.activation)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, scale, shift)):
        return cast(Tensor, ScaleShift.apply(groups, x, scale, shift))  # type: ignore[no-untyped-call]
    arguments = (scale, shift, *groups.batch, groups.inner, groups.activation)
    if owned:
        torch.ops.taps_fast.scale_shift_.default(x, *arguments)
        if not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version(x)  # a graph that has saved x must see that it changed
        return x
    y: Tensor = torch.ops.taps_fast.scale_shift.default(x, *arguments)
    return y


def batch_norm(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    running: Sequence[tuple[Tensor, Tensor] | None],
    eps: Sequence[float],
    tasks: TaskBatch,
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm in which the rows of each task are normalised by statistics of their own.

    ::

        y_r = (x_r - mean[t]) / √(var[t] + eps[t])·weight[t] + bias[t]          t = the task of row r

    Args:
        x: [N, C, …]; float32, bfloat16, float16 or float64.
        weight, bias: T + 1 tensors [C], the last for rows of id -1; none at all: 1 and 0.
        running: T + 1 entries: (mean, variance) [C] that a task is normalised by, or None for those of its rows.
        eps: T + 1 numbers.
        tasks: the task of each of B samples; N is a multiple of B.

    Returns:
        y like x; the mean and the biased variance [T + 1, C] of the rows of each task whose statistics were not given,
        0 where it has none, in float32 (float64 when x is). y has gradients for x, weight and bias.

    Cost: x is read once for the statistics and once for y; the backward reads x and dy twice and writes dx.

    >>> x, batch = torch.randn(8, 3, 4, 4), TaskBatch.from_ids([0, 1] * 4, 2)
    >>> y, mean, var = batch_norm(x, [], [], [None] * 3, [1e-5] * 3, batch)
    >>> bool(torch.allclose(y[::2], F.batch_norm(x[::2], None, None, training=True), atol=1e-5))
    True
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    inner = _problem.rows_per_sample("batch_norm", x, tasks.size, 0, 1)
    known = [pair for pair in running if pair is not None]
    own = tuple(pair is None for pair in running)
    with torch.autocast(x.device.type, enabled=False):
        if has_operators(x):
            fixed = [t for t, mine in enumerate(own) if not mine]
            means, variances = [mean for mean, _ in known], [variance for _, variance in known]
            given = Given(tasks.tensors, inner, len(weight), 1, eps, True, fixed, means, variances)
            found = BatchNormOfTasks.apply(given, x, *weight, *bias)  # type: ignore[no-untyped-call]
            return cast(tuple[Tensor, Tensor, Tensor], found)
        affine = [torch.stack(list(held)).to(wide) if held else None for held in (weight, bias)]
        more = eps[0] if len(set(eps)) == 1 else torch.stack([x.new_full((1,), value, dtype=wide) for value in eps])
        statistics = [statistic.to(wide) for pair in known for statistic in pair]
        groups = Groups(tasks.tensors, inner, "none")
        found = BatchNorm.apply(groups, own, more, x, *affine, *statistics)  # type: ignore[no-untyped-call]
    return cast(tuple[Tensor, Tensor, Tensor], found)


def batch_norm_eval(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    mean: Sequence[Tensor],
    variance: Sequence[Tensor],
    eps: Sequence[float],
    tasks: TaskBatch,
) -> Tensor:
    """Batch norm by statistics that each task has already.

    ::

        y_r = (x_r - mean[t]) / √(variance[t] + eps[t])·weight[t] + bias[t]          t = the task of row r

    Args:
        x: [N, C, …]; float32, bfloat16, float16 or float64; keeps its layout if that is dense.
        weight, bias: T + 1 tensors [C], those of the base last; none at all: 1 and 0.
        mean, variance, eps: T + 1 of each.
        tasks: the task of each of B samples; N is a multiple of B.

    Returns:
        y like x, with gradients for x, weight and bias.

    Cost: x is read and y written once. Without gradients on a CPU one operator reads all tensors where they are.

    >>> x, ones, zeros = torch.randn(4, 3, 2, 2), [torch.ones(3)] * 3, [torch.zeros(3)] * 3
    >>> y = batch_norm_eval(x, [], [], zeros, ones, [0.0] * 3, TaskBatch.from_ids([0, 1, -1, 0], 2))
    >>> bool(torch.allclose(y, x))
    True
    """
    inner = _problem.rows_per_sample("batch_norm_eval", x, tasks.size, 0, 1)
    if has_operators(x) and not _needs_gradients(x, weight, bias):
        operator = torch.ops.taps_fast.batch_norm_eval.default
        y: Tensor = operator(x, weight, bias, mean, variance, eps, *tasks.tensors, inner)
        return y
    wide = torch.promote_types(x.dtype, torch.float32)
    means = torch.stack(list(mean)).to(wide)
    # Filled on the device: a tensor made from Python numbers would be a copy from the host.
    more = eps[0] if len(set(eps)) == 1 else torch.stack([means.new_full((1,), value) for value in eps])
    scale = torch.rsqrt(torch.stack(list(variance)).to(wide) + more)
    scale = scale * torch.stack(list(weight)) if weight else scale
    shift = torch.addcmul(torch.stack(list(bias)).to(wide), means, scale, value=-1) if bias else -means * scale
    return scale_shift(x, scale, shift, tasks=tasks)


def group_norm(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    groups: int,
    eps: float,
    tasks: TaskBatch,
    *,
    center: bool = True,
    inner: int | None = None,
) -> Tensor:
    """Group, layer and RMS norms, then each task's own scale and shift.

    ::

        y_r = (x_r - mean) / √(mean of (x_r - mean)² + eps)·weight[t] + bias[t]      over each group of r's channels

    Args:
        x: [N, C, …]; float32, bfloat16, float16 or float64; keeps its layout if that is dense.
        weight, bias: T + 1 tensors of C elements, those of the base last; none at all: 1 and 0.
        groups: how many; they divide C. A layer norm of rows [M, C] has one.
        eps: what is added to the variance.
        tasks: the task of each of B samples.
        center: False: mean is 0, as in an RMS norm.
        inner: consecutive rows of a sample; default N / B.

    Returns:
        y like x, with gradients for x, weight and bias.

    Cost: on a CPU one operator, which reads x from memory once, and one for all gradients; else two passes.

    >>> x, batch = torch.randn(4, 6), TaskBatch.from_ids([0, 1, -1, 0], 2)
    >>> y = group_norm(x, [torch.ones(6)] * 3, [torch.zeros(6)] * 3, 1, 1e-5, batch)
    >>> bool(torch.allclose(y, F.layer_norm(x, (6,)), atol=1e-6))
    True
    """
    if inner is None:
        inner = _problem.rows_per_sample("group_norm", x, tasks.size, 0, 1)
    if has_operators(x) and _needs_gradients(x, weight, bias):
        given = Given(tasks.tensors, inner, len(weight), groups, (eps,), center)
        return cast(Tensor, GroupNormOfTasks.apply(given, x, *weight, *bias))  # type: ignore[no-untyped-call]
    if has_operators(x):
        operator = torch.ops.taps_fast.group_norm.default
        y: Tensor = operator(x, weight, bias, groups, eps, center, *tasks.tensors, inner)
        return y
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if not center:
        apart = wide.reshape(x.shape[0], groups, math.prod(x.shape[1:]) // groups)
        y = F.rms_norm(apart, apart.shape[2:], None, eps).view(x.shape)
    elif x.dim() == 2 and groups == 1:
        y = F.layer_norm(wide, x.shape[1:], None, None, eps)
    else:
        y = F.group_norm(wide, groups, None, None, eps)
    if x.dim() == 4:  # which PyTorch's norms keep on a CPU alone
        y = y.contiguous(memory_format=_problem.layout(x))
    scale, shift = (
        torch.stack([t.flatten() for t in held]).to(wide.dtype) if held else None for held in (weight, bias)
    )
    return follow(y, scale, shift, Groups(tasks.tensors, inner, "none"), owned=True).to(x.dtype)


def has_operators(x: Tensor) -> bool:
    """Whether the CPU's operators of norms are there for it."""
    return x.device.type == "cpu" and _ext.CPU_ERROR is None


def _needs_gradients(x: Tensor, weight: Sequence[Tensor], bias: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for held in ((x,), weight, bias) for t in held)
