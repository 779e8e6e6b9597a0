"""The host side of `_dw`: who alone contributes to what, and in how many parts it is summed."""

from __future__ import annotations

import collections
import functools
import math
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from . import _configs
from ._arguments import pointers, table, triton_dtype
from ._dw import dw_shared_kernel, dw_splits_kernel, dw_task_kernel, sum_slots_kernel
from ._problem import Rows, Weight


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
) -> tuple[Tensor, list[Tensor], Tensor]:
    weight = Weight.of(base, deltas, coeffs, base_coeffs)
    rows = Rows(ids, order, offsets, x.shape[0], max(inner, 1))
    shape = (dy.shape[1], x.shape[1])
    dcoeffs = torch.zeros_like(coeffs) if need_dcoeffs else coeffs.new_empty(0)
    dbase = base.new_empty(shape) if need_dbase else base.new_empty(0)
    ddeltas = {k: base.new_empty(shape) for k in ddeltas_for}
    unwanted = base.new_empty(0)
    outputs = [dbase, *(ddeltas.get(k, unwanted) for k in range(len(deltas)))]

    # What one task alone contributes to is written from that task's tile; a sum over tasks takes its own pass.
    count = len(deltas)
    listed, owners = _owners(tuple(pairs), count)
    owners = owners or (weight.tasks,) * count
    for k in ddeltas:
        if owners[k] == 0:
            ddeltas[k].zero_()
    alone = [k + 1 for k in ddeltas if owners[k] == 1] + [0] * (need_dbase and not rows.mixed)
    shared = [k + 1 for k in ddeltas if owners[k] > 1] + [0] * (need_dbase and rows.mixed)
    if rows.count == 0 or math.prod(shape) == 0:
        for out in outputs:
            out.zero_()
        return dcoeffs, list(ddeltas.values()), dbase
    if weight.tasks and (need_dcoeffs or alone):
        own = set(alone)
        kept = [out if s in own else unwanted for s, out in enumerate(outputs)]
        _dw_by_task(dy, x, weight, rows, listed, kept, dcoeffs)
    if shared:
        _dw_shared(dy, x, weight, rows, shared, [outputs[s] for s in shared])
    return dcoeffs, list(ddeltas.values()), dbase


@functools.lru_cache(maxsize=1024)
def _owners(pairs: tuple[int, ...], count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The pairs in order, and how many tasks use each of ``count`` deltas. Kept: a layer's are the same each step."""
    listed = tuple(sorted(set(pairs)))
    used = collections.Counter(pair % count for pair in listed)
    return listed, tuple(used[k] for k in range(count)) if listed else ()


def _dw_by_task(
    dy: Tensor, x: Tensor, weight: Weight, rows: Rows, listed: Sequence[int], outputs: list[Tensor], dcoeffs: Tensor
) -> None:
    """dcoeffs at ``listed`` pairs (empty: all), and each output (0 elements: not wanted) of one task alone."""
    M, I = x.shape
    O = dy.shape[1]
    count = len(weight.sources) - 1
    device, itemsize = x.device, x.element_size()
    config = _configs.choose("dw", M, itemsize, _configs.capability(device))
    tiles = triton.cdiv(O, config.block_o) * triton.cdiv(I, config.block_i)
    splits = 1
    if not rows.mixed:
        splits = _configs.splits(tiles, triton.cdiv(M, config.block_m), _configs.processors(device))
        splits = 1 << splits.bit_length() - 1
    partial = torch.empty((splits, O, I) if splits > 1 else (0,), dtype=torch.float32, device=device)
    wanted = len(listed) or weight.tasks * count
    dots = dcoeffs.numel() > 0
    slots = torch.empty((wanted, tiles) if dots else (0,), dtype=torch.float32, device=device)
    pairs = table(listed, device) if listed else None
    sources, into = pointers(weight.sources), pointers(outputs)
    how = {
        "BLOCK_O": config.block_o,
        "BLOCK_I": config.block_i,
        "BLOCK_P": triton.next_power_of_2(len(listed)) if listed else 0,
        "SPLITS": splits,
        "DOTS": dots,
        "WRITES": any(out.numel() for out in outputs[1:]),
        "WRITE_BASE": outputs[0].numel() > 0,
        "BAKED": weight.base_coeffs is not None,
        "TABLE": sources.table,
        "OUT_TABLE": into.table,
    }
    dw_task_kernel[(tiles, weight.tasks if rows.mixed else splits)](
        partial,
        slots,
        into.argument,
        dy,
        x,
        sources.argument,
        weight.coeffs,
        weight.base_coeffs,
        pairs,
        rows.ids,
        rows.order,
        rows.offsets,
        M,
        I,
        O,
        count,
        wanted,
        rows.samples,
        rows.inner,
        rows.per_sample,
        *dy.stride(),
        *x.stride(),
        *weight.stride,
        BLOCK_M=config.block_m,
        MIXED=rows.mixed,
        PRECISION=_configs.precision(x.dtype),
        num_warps=config.warps,
        num_stages=_stages(config, rows),
        maxnreg=config.registers,
        **how,
    )
    if splits > 1:
        dw_splits_kernel[(tiles,)](
            slots,
            into.argument,
            partial,
            sources.argument,
            weight.coeffs,
            weight.base_coeffs,
            pairs,
            I,
            O,
            count,
            wanted,
            *weight.stride,
            dtype=triton_dtype(x.dtype),
            num_warps=config.warps,
            **how,
        )
    if dots and wanted:
        sum_slots_kernel[(wanted,)](dcoeffs, slots, pairs, tiles, BLOCK=512, PAIRS=bool(listed), num_warps=4)


def _dw_shared(dy: Tensor, x: Tensor, weight: Weight, rows: Rows, wanted: list[int], outputs: list[Tensor]) -> None:
    """outputs[n] = Σ over tasks of the gradient of source ``wanted[n]``."""
    M, I = x.shape
    O = dy.shape[1]
    config = _configs.choose("dw", M, x.element_size(), _configs.capability(x.device))
    into = pointers(outputs)
    tiles = triton.cdiv(O, config.block_o) * triton.cdiv(I, config.block_i)
    dw_shared_kernel[(tiles, len(wanted))](
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
        len(weight.sources) - 1,
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
        num_stages=_stages(config, rows),
        maxnreg=config.registers,
    )


def _stages(config: _configs.Config, rows: Rows) -> int:
    """Rows found through ``order`` are loaded in two steps, and Triton gives each half of the stages."""
    return 2 * config.stages - 1 if rows.mixed else config.stages
