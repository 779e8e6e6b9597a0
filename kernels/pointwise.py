"""The pointwise operators on CUDA; arguments and results are those of `taps_fast._ops`. Nothing is read on the host."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import _configs
from ._arguments import cdiv, grid, next_power_of_2, on_its_device
from ._pointwise import scale_shift_kernel, sum_parts_kernel, task_sums_kernel

Ids = Tensor | None
TILE = 2048
"""Elements a program reads at a time."""


def _form(x: Tensor) -> tuple[Tensor, int, bool]:
    """x as the kernels take it: dense, its pixels, and whether channels are last."""
    if x.dim() == 2:
        return x.contiguous(), 1, True
    pixels = math.prod(x.shape[2:])
    if not x.is_contiguous() and x.movedim(1, -1).is_contiguous():
        return x, pixels, True
    return x.contiguous(), pixels, False


def _like(t: Tensor, last: bool) -> Tensor:
    """t with its numbers in the order of x's."""
    return t.movedim(1, -1).contiguous().movedim(-1, 1) if last else t.contiguous()


def _kind(table: Tensor | None) -> int:
    return 0 if table is None else table.dim()


def _tasks(offsets: Tensor | None) -> int:
    return 0 if offsets is None else offsets.shape[0] - 2


@on_its_device
def scale_shift(x: Tensor, scale: Ids, shift: Ids, *groups: Any) -> Tensor:
    dense, pixels, last = _form(x)
    y = torch.empty_like(dense)
    _pass(y, dense, None, (scale, shift, None, None), groups, pixels, last)
    return y


@on_its_device
def scale_shift_(x: Tensor, scale: Ids, shift: Ids, *groups: Any) -> None:
    dense, pixels, last = _form(x)
    _pass(dense, dense, None, (scale, shift, None, None), groups, pixels, last)
    if dense is not x:
        x.copy_(dense)


@on_its_device
def scale_shift_dx(dy: Tensor, x: Tensor, scale: Ids, shift: Ids, slope: Ids, offset: Ids, *groups: Any) -> Tensor:
    dense, pixels, last = _form(x)
    dx = torch.empty_like(dense)
    _pass(dx, dense, _like(dy, last), (scale, shift, slope, offset), groups, pixels, last)
    return dx


def _pass(
    y: Tensor, x: Tensor, dy: Tensor | None, tables: tuple[Ids, Ids, Ids, Ids], groups: Any, pixels: int, last: bool
) -> None:
    ids, _, offsets, inner, activation = groups
    if x.numel() == 0:
        return
    N, C = x.shape[:2]
    outer, width = (N * pixels, C) if last else (N * C, pixels)
    block_e = min(next_power_of_2(width), 512)
    block_r = max(TILE // block_e, 1)
    scale_shift_kernel[grid(cdiv(outer, block_r) * cdiv(width, block_e), *x.shape)](
        y,
        x,
        dy,
        *(None if t is None else t.contiguous() for t in tables),
        ids,
        N,
        C,
        pixels,
        _tasks(offsets),
        1 if ids is None else max(ids.shape[0], 1),
        max(inner, 1),
        BLOCK_R=block_r,
        BLOCK_E=block_e,
        LAST=last,
        MIXED=ids is not None,
        SCALE=_kind(tables[0]),
        SHIFT=_kind(tables[1]),
        SLOPE=_kind(tables[2]),
        OFFSET=_kind(tables[3]),
        BACKWARD=dy is not None,
        ACTIVATION=activation,
        num_warps=4,
    )


@on_its_device
def scale_shift_sums(dy: Tensor, x: Tensor, scale: Ids, shift: Ids, center: Ids, *groups: Any) -> tuple[Tensor, Tensor]:
    dense, pixels, last = _form(x)
    tables: dict[str, Any] = dict(scale=scale, shift=shift, center=center)
    first, second = _sums("gradients", dense, pixels, last, groups, dy=_like(dy, last), **tables)
    return first, second


@on_its_device
def moments(x: Tensor, *groups: Any) -> tuple[Tensor, Tensor]:
    dense, pixels, last = _form(x)
    (mean,) = _sums("sum", dense, pixels, last, (*groups, "none"), average=True)
    (variance,) = _sums("variance", dense, pixels, last, (*groups, "none"), center=mean, average=True)
    return mean, variance


def sums_of_rows(rows: Tensor, *groups: Any) -> Tensor:
    """`taps_fast.tasks.sums_of_rows` in one pass."""
    (sums,) = _sums("sum", rows.contiguous(), 1, True, (*groups, "none"))
    return sums


def _sums(
    what: str,
    x: Tensor,
    pixels: int,
    last: bool,
    groups: Any,
    *,
    dy: Tensor | None = None,
    scale: Ids = None,
    shift: Ids = None,
    center: Ids = None,
    average: bool = False,
) -> list[Tensor]:
    """Two stages in a fixed order: parts of each task's rows, then the sum of the parts."""
    ids, order, offsets, inner, activation = groups
    N, C = x.shape[:2]
    tasks = _tasks(offsets)
    slots = tasks + 1 if ids is not None else 1
    results = [x.new_empty(slots, C, dtype=torch.float32) for _ in range(2 if what == "gradients" else 1)]
    if x.numel() == 0:
        return [out.zero_() for out in results]
    block_c, block_q = (64, 32) if last else (16, 128)
    programs = cdiv(C, block_c) * slots
    steps = cdiv(N * pixels, block_q * slots)
    parts = _configs.splits(programs, steps, _configs.processors(x.device))
    partial = x.new_empty(len(results), slots, parts, C, dtype=torch.float32)
    samples = 1 if ids is None else max(ids.shape[0], 1)
    per_sample = max(N // samples, 1)
    mixed = ids is not None
    task_sums_kernel[grid(programs * parts, *x.shape, tasks)](
        partial[0],
        partial[-1],
        x,
        dy,
        None if scale is None else scale.contiguous(),
        None if shift is None else shift.contiguous(),
        None if center is None else center.contiguous(),
        ids,
        order,
        offsets,
        N,
        C,
        pixels,
        tasks,
        samples,
        max(inner, 1),
        per_sample,
        BLOCK_C=block_c,
        BLOCK_Q=block_q,
        PARTS=parts,
        LAST=last,
        MIXED=mixed,
        SCALE=_kind(scale),
        SHIFT=_kind(shift),
        CENTER=_kind(center),
        WHAT=what,
        ACTIVATION=activation,
        num_warps=4,
        maxnreg=255,
    )
    for out, part in zip(results, partial, strict=True):
        sum_parts_kernel[grid(cdiv(C, 128) * slots, C, tasks)](
            out, part, offsets, N, C, pixels, tasks, per_sample,
            BLOCK_C=128, PARTS=parts, MIXED=mixed, AVERAGE=average, num_warps=4,
        )  # fmt: skip
    return results
