"""The host side of `_dw`: who alone contributes to what, and by whose product."""

from __future__ import annotations

import bisect
import collections
import functools
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from . import _configs
from ._arguments import cdiv, grid, pointers, table
from ._dw import dw_product_kernel, dw_shared_kernel, dw_task_kernel
from ._problem import Rows, Weight
from .pointwise import sums_of_rows

PASS = _configs.Config(1, 32, 128, warps=4, stages=1)
"""Of the programs that go once over the vendor's product."""


def linear_dw(
    dy: Tensor,
    x: Tensor,
    base: Tensor,
    deltas: Sequence[Tensor],
    coeffs: Tensor,
    base_coeffs: Tensor | None,
    ids: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    inner: int,
    pairs: Sequence[int],
    ddeltas_for: Sequence[int],
    need_dcoeffs: bool,
    need_dbase: bool,
    need_dbias: bool,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    weight = Weight.of(base, deltas, coeffs, base_coeffs)
    rows = Rows(ids, order, offsets, x.shape[0], max(inner, 1))
    shape = (dy.shape[1], x.shape[1])
    plan = _plan(tuple(pairs), tuple(ddeltas_for), len(deltas), weight.tasks, rows.mixed, need_dbase)
    nothing = rows.count == 0 or math.prod(shape) == 0
    if not need_dcoeffs:
        dcoeffs = coeffs.new_empty(0)
    else:  # without a list of pairs each entry is written
        dcoeffs = (torch.zeros_like if nothing or plan.pairs else torch.empty_like)(coeffs)
    if not need_dbias:
        dbias = coeffs.new_empty(0)
    elif rows.mixed:
        dbias = sums_of_rows(dy, ids, order, offsets, inner)
    else:
        dbias = dy.sum(0, keepdim=True, dtype=torch.float32)
    unwanted = base.new_empty(0)
    dbase = base.new_empty(shape) if need_dbase else unwanted
    ddeltas = list(map(base.new_empty, itertools.repeat(shape, len(ddeltas_for))))
    made = (unwanted, dbase, *ddeltas)
    if nothing:
        torch._foreach_zero_([dbase, *ddeltas])
        return dcoeffs, ddeltas, dbase, dbias
    for n in plan.unused:
        made[n].zero_()
    if weight.tasks and (need_dcoeffs or plan.writes or plan.writes_base):
        _dw_by_task(dy, x, weight, rows, plan, plan.alone(made), dcoeffs)
    if plan.shared:
        _dw_shared(dy, x, weight, rows, plan.shared, plan.sums(made))
    return dcoeffs, ddeltas, dbase, dbias


class Plan(NamedTuple):
    """Which tasks contribute to which result. Results are counted as in (unwanted, dbase, *ddeltas)."""

    listed: tuple[int, ...]
    """The pairs t·K + k in order, for each task how many come before its own, and their number; empty: all pairs."""
    pairs: int
    unused: tuple[int, ...]
    """Results to which no task contributes: zeros."""
    alone: Callable[[Sequence[Tensor]], tuple[Tensor, ...]]
    """For each source the result that one task alone contributes to, written from that task's tile, or unwanted."""
    writes: bool
    writes_base: bool
    shared: tuple[int, ...]
    """The sources whose gradients are sums over tasks, which take a pass of their own."""
    sums: Callable[[Sequence[Tensor]], tuple[Tensor, ...]]
    """The results of those."""


@functools.lru_cache(maxsize=1024)
def _plan(
    pairs: tuple[int, ...], ddeltas_for: tuple[int, ...], count: int, tasks: int, mixed: bool, need_dbase: bool
) -> Plan:
    """Kept: a layer's are the same each step, and work a delta on the host is done once."""
    listed = sorted(set(pairs))
    used = collections.Counter(pair % count for pair in listed)
    owners = {k: used[k] if listed else tasks for k in ddeltas_for}
    results = {k + 1: n + 2 for n, k in enumerate(ddeltas_for)} | ({0: 1} if need_dbase else {})
    alone = {k + 1 for k in ddeltas_for if owners[k] == 1} | ({0} if need_dbase and not mixed else set())
    shared = [k + 1 for k in ddeltas_for if owners[k] > 1] + [0] * (need_dbase and mixed)
    starts = [bisect.bisect_left(listed, task * count) for task in range(tasks + 1)] if listed else []
    return Plan(
        (*listed, *starts),
        len(listed),
        tuple(results[k + 1] for k in ddeltas_for if owners[k] == 0),
        _picked([results[s] if s in alone else 0 for s in range(count + 1)]),
        bool(alone - {0}),
        0 in alone,
        tuple(shared),
        _picked([results[s] for s in shared]),
    )


def _picked(places: list[int]) -> Callable[[Sequence[Tensor]], tuple[Tensor, ...]]:
    """What is at these places of a sequence."""
    if len(places) > 1:
        return operator.itemgetter(*places)
    return lambda made: tuple(made[n] for n in places)


def _dw_by_task(
    dy: Tensor, x: Tensor, weight: Weight, rows: Rows, plan: Plan, outputs: tuple[Tensor, ...], dcoeffs: Tensor
) -> None:
    """dcoeffs at the plan's pairs, and each output (0 elements: not wanted) of one task alone."""
    M, I = x.shape
    O = dy.shape[1]
    count = weight.count - 1
    device = x.device
    dots = dcoeffs.numel() > 0
    config = PASS
    if rows.mixed:
        config = _configs.choose(_configs.named("dw", x.dtype), M, x.element_size(), _configs.capability(device))
    tiles = cdiv(O, config.block_o) * cdiv(I, config.block_i)
    wanted = plan.pairs or weight.tasks * count
    slots = torch.empty((wanted, tiles) if dots else (0,), dtype=torch.float32, device=device)
    pairs = table(plan.listed, device) if plan.pairs else None
    into = pointers(outputs)
    used = (weight.pointers.argument, weight.coeffs, weight.base_coeffs, pairs)
    how = {
        "BLOCK_O": config.block_o,
        "BLOCK_I": config.block_i,
        "PAIRS": plan.pairs > 0,
        "DOTS": dots,
        "WRITES": plan.writes,
        "WRITE_BASE": plan.writes_base and (rows.mixed or weight.base_coeffs is not None),  # else it is there
        "BAKED": weight.base_coeffs is not None,
        "TABLE": weight.pointers.table,
        "OUT_TABLE": into.table,
    }
    if rows.mixed:
        dw_task_kernel[grid(tiles * weight.tasks, O, I, weight.tasks)](
            slots,
            into.argument,
            dy,
            x,
            *used,
            rows.ids,
            rows.order,
            rows.offsets,
            I,
            O,
            count,
            wanted,
            rows.samples,
            rows.inner,
            rows.per_sample,
            *dy.stride(),
            *x.stride(),
            *weight.strides,
            BLOCK_M=config.block_m,
            PRECISION=_configs.precision(x.dtype),
            num_warps=config.warps,
            num_stages=_stages(config),
            maxnreg=config.registers,
            **how,
        )
    else:
        programs = grid(tiles, O, I)
        place = next((t for t in outputs if t.numel()), None)
        product = torch.mm(dy.detach().t(), x.detach(), out=x.new_empty(O, I) if place is None else place)
        if not (dots or plan.writes or weight.base_coeffs is not None):
            return  # it is the base's gradient
        dw_product_kernel[programs](
            slots, into.argument, product, *used, I, O, count, wanted, *weight.strides, num_warps=config.warps, **how
        )
    if dots and pairs is None:
        torch.sum(slots, 1, out=dcoeffs.view(-1))
    elif dots:
        dcoeffs.view(-1).index_copy_(0, pairs[:wanted], slots.sum(1))


def _dw_shared(
    dy: Tensor, x: Tensor, weight: Weight, rows: Rows, wanted: tuple[int, ...], outputs: tuple[Tensor, ...]
) -> None:
    """outputs[n] = Σ over tasks of the gradient of source ``wanted[n]``."""
    M, I = x.shape
    O = dy.shape[1]
    config = _configs.choose(_configs.named("dw", x.dtype), M, x.element_size(), _configs.capability(x.device))
    config = replace(config, block_i=min(config.block_i, 128))  # it holds a sum beside each task's product
    into = pointers(outputs)
    tiles = cdiv(O, config.block_o) * cdiv(I, config.block_i)
    dw_shared_kernel[grid(tiles * len(wanted), O, I, len(wanted))](
        into.argument,
        dy,
        x,
        table(wanted, x.device),
        weight.coeffs,
        weight.base_coeffs,
        rows.ids,
        rows.order,
        rows.offsets,
        I,
        O,
        weight.count - 1,
        weight.tasks,
        rows.samples,
        rows.inner,
        rows.per_sample,
        *dy.stride(),
        *x.stride(),
        BLOCK_M=config.block_m,
        BLOCK_O=config.block_o,
        BLOCK_I=config.block_i,
        BAKED=weight.base_coeffs is not None,
        OUT_TABLE=into.table,
        PRECISION=_configs.precision(x.dtype),
        num_warps=config.warps,
        num_stages=_stages(config),
        maxnreg=config.registers,
    )


def _stages(config: _configs.Config) -> int:
    """Rows found through ``order`` are loaded in two steps, and Triton gives each half of the stages."""
    return 2 * config.stages - 1
