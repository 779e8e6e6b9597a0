"""The linear operators on CUDA; arguments and results are those of `taps_fast._ops`.

Rows many or few, sorted or not, gates open or closed, coefficients and ids are data: nothing here reads a tensor's
value, so a captured CUDA graph replays with others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from taps_fast import _ext, _tuned
from taps_fast.tasks import PLAN_SAMPLES, PLAN_TASKS
from taps_fast.tasks import grouped as group_by_task

from . import _configs
from ._arguments import cdiv, grid, next_power_of_2, on_its_device
from ._gradients import linear_dw
from ._order import grouped_rows_kernel, joined_ids_kernel
from ._problem import Rows, Weight
from ._split import split_kernel, sum_splits_kernel
from .merge import merged, part_of

if TYPE_CHECKING:
    from taps_fast._problem import Problem

ALGORITHMS = ("split", "merge")
OLDEST_TRITON = (3, 6)


def not_supported_reasons(problem: Problem) -> Iterator[str]:
    """Why these kernels cannot take a problem; nothing if they can."""
    if _configs.version() < OLDEST_TRITON:
        yield f"needs Triton {'.'.join(map(str, OLDEST_TRITON))} or newer, found {triton.__version__}"
    if problem.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        yield f"computes float32, bfloat16 and float16, the tensors are {problem.dtype}"
    if max(problem.rows, *problem.shape) >= 2**31 - 2**16:
        yield f"counts rows and features in 31 bits, got {problem.rows} rows and weight {problem.shape}"
    out_tiles, in_tiles = (cdiv(size, 64) for size in problem.shape[:2])
    forward = cdiv(problem.rows, 16) * max(out_tiles, in_tiles)
    tasks = problem.num_tasks or 1
    if max(forward, out_tiles * in_tiles * tasks, tasks * problem.num_deltas) >= 2**31:
        yield (
            f"numbers its programs in 31 bits, got {problem.rows} rows, {tasks} tasks, {problem.num_deltas} deltas, "
            f"weight {problem.shape}"
        )
    if torch.cuda.is_available() and torch.cuda.get_device_properties(problem.gpu).major < 8:
        yield f"needs compute capability 8.0 or newer, the device is {_tuned.arch(problem.gpu)}"


@on_its_device
def linear_fwd(
    x: Tensor,
    base: Tensor,
    deltas: Sequence[Tensor],
    coeffs: Tensor,
    base_coeffs: Tensor | None,
    bias: Tensor | None,
    ids: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    inner: int,
    algorithm: str,
) -> Tensor:
    weight = Weight.of(base, deltas, coeffs, base_coeffs)
    rows = Rows(ids, order, offsets, x.shape[0], max(inner, 1))
    if _algorithm(algorithm) == "merge":
        return _merged_product(x, weight, rows, bias, transposed=False)
    y = x.new_empty(x.shape[0], base.shape[0])
    return _split("split", y, x, weight, rows, bias, *weight.strides)


@on_its_device
def linear_dx(
    dy: Tensor,
    base: Tensor,
    deltas: Sequence[Tensor],
    coeffs: Tensor,
    base_coeffs: Tensor | None,
    ids: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    inner: int,
    algorithm: str,
) -> Tensor:
    weight = Weight.of(base, deltas, coeffs, base_coeffs)
    rows = Rows(ids, order, offsets, dy.shape[0], max(inner, 1))
    if _algorithm(algorithm) == "merge":
        return _merged_product(dy, weight, rows, None, transposed=True)
    dx = dy.new_empty(dy.shape[0], base.shape[1])
    return _split("dx", dx, dy, weight, rows, None, *reversed(weight.strides))


linear_dw = on_its_device(linear_dw)


def linear_grad(
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
    algorithm: str,
    need_dx: bool,
    pairs: Sequence[int],
    ddeltas_for: Sequence[int],
    need_dcoeffs: bool,
    need_dbase: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor, Tensor]:
    arguments = (base, deltas, coeffs, base_coeffs, ids, order, offsets, inner)
    dx = linear_dx(dy, *arguments, algorithm) if need_dx else dy.new_empty(0)
    if not (ddeltas_for or need_dcoeffs or need_dbase or need_dbias):
        return dx, coeffs.new_empty(0), [], base.new_empty(0), coeffs.new_empty(0)
    return dx, *linear_dw(dy, x, *arguments, pairs, ddeltas_for, need_dcoeffs, need_dbase, need_dbias)


def _algorithm(algorithm: str) -> str:
    if algorithm not in ALGORITHMS:
        raise ValueError(f"triton: algorithm must be {' or '.join(ALGORITHMS)}, got {algorithm!r}")
    return algorithm


def _split(
    kernel: str,
    y: Tensor,
    x: Tensor,
    weight: Weight,
    rows: Rows,
    bias: Tensor | None,
    stride_wo: int,
    stride_wi: int,
) -> Tensor:
    """Into y, whose rows may be parts of longer ones."""
    (M, I), out_features = x.shape, y.shape[1]
    if y.numel() == 0:
        return y
    name = _configs.named(kernel, x.dtype)
    capability, itemsize = _configs.capability(x.device), x.element_size()
    config = _configs.choose(name, M, itemsize, capability)
    tiles = cdiv(M, config.block_m) * cdiv(out_features, config.block_o)
    packed = name.endswith(_configs.IEEE)
    if packed:
        x = _packed(x, rows)
    resident = _configs.resident(config, name, itemsize, capability)
    splits = _configs.splits(tiles, cdiv(I, config.block_i), _configs.processors(x.device), resident)
    target = y if splits == 1 else torch.empty(splits, M, out_features, dtype=torch.float32, device=x.device)
    has_bias = 0 if bias is None else bias.dim()
    if bias is not None:
        bias = bias.contiguous()
    split_kernel[grid(tiles * splits, M, out_features)](
        target,
        x,
        weight.pointers.argument,
        weight.coeffs,
        weight.base_coeffs,
        bias,
        rows.ids,
        rows.order,
        M,
        I,
        out_features,
        weight.count - 1,
        weight.tasks,
        rows.samples,
        rows.inner,
        rows.per_sample,
        target.stride(0) if splits > 1 else 0,
        *target.stride()[-2:],
        *x.stride(),
        stride_wo,
        stride_wi,
        BLOCK_M=config.block_m,
        BLOCK_O=config.block_o,
        BLOCK_I=config.block_i,
        BLOCK_S=weight.source_block,
        SPLITS=splits,
        MIXED=rows.mixed,
        BAKED=weight.base_coeffs is not None,
        BIAS=has_bias if splits == 1 else 0,
        TABLE=weight.pointers.table,
        PRECISION=_configs.precision(x.dtype),
        PACKED=packed,
        num_warps=config.warps,
        num_stages=config.stages,
        maxnreg=config.registers,
    )
    if splits > 1:
        sum_splits(y, target, bias, rows.ids, weight.tasks, rows.samples, rows.inner)
    return y


def _packed(x: Tensor, rows: Rows) -> Tensor:
    """x [M, I] in the grouped order, neighbouring rows side by side in memory.

    Products on ordinary units read x along the rows from shared memory; as x lies, all of those would share a bank.
    """
    M, I = x.shape
    columns = x.new_empty(I, 16 * cdiv(M, 16))[:, :M]
    if rows.mixed:
        x = x[_rows_in_group_order(rows)[0] if rows.place is None else rows.place]
    return columns.copy_(x.t()).t()


def sum_splits(
    y: Tensor, partial: Tensor, bias: Tensor | None, ids: Tensor | None, tasks: int, samples: int, inner: int
) -> None:
    """y = Σ_s partial[s] + bias; the last axis of y is contiguous, and its others are rows."""
    splits, M, O = partial.shape
    block_m, block_o = min(16, next_power_of_2(M)), 128
    sum_splits_kernel[grid(cdiv(M, block_m) * cdiv(O, block_o), M, O)](
        y,
        partial,
        bias,
        ids,
        M,
        O,
        tasks,
        samples,
        inner,
        y.stride(-2),
        SPLITS=splits,
        BLOCK_M=block_m,
        BLOCK_O=block_o,
        MIXED=ids is not None,
        BIAS=0 if bias is None else bias.dim(),
        num_warps=4,
    )


def _merged_product(x: Tensor, weight: Weight, rows: Rows, bias: Tensor | None, *, transposed: bool) -> Tensor:
    """x·W_tᵀ + bias_t, or with ``transposed`` x·W_t, each weight summed first.

    Of a mixed batch so many features at a time as fit in scratch for every task: the host knows how many those are,
    and not how many rows a task has.
    """
    axis = 1 if transposed else 0
    features, summed = weight.sources[0].shape[axis], x.shape[1]
    if not rows.mixed:
        whole = merged(weight, rows, 0, features, features=axis)[0]
        return x @ whole if transposed else F.linear(x, whole, bias)
    y = x.new_empty(x.shape[0], features)
    if y.numel() and summed:
        _mixed_product(y, x, weight, *_joined(weight, rows), axis)
    elif summed == 0:
        y.zero_()
    if bias is not None and bias.dim() == 1:
        y += bias
    elif bias is not None:
        index = (rows.ids, rows.order, rows.offsets, rows.inner)
        torch.ops.taps_fast.scale_shift_(y, None, bias.float(), *index, "none")
    return y


def _mixed_product(y: Tensor, x: Tensor, weight: Weight, rows: Rows, ends: Tensor, axis: int) -> None:
    """``rows``: each id is that of the weight in the bank. ``ends``: positions before each group's end."""
    features, summed = y.shape[1], x.shape[1]
    part = part_of(features, summed, weight.tasks + 1, x.element_size())
    grouped = _grouped_mm_fits(x, summed, features, weight.tasks + 1)
    if grouped:
        x = x[rows.place]
    for first in range(0, features, part):
        count = min(part, features - first)
        bank = merged(weight, rows, first, count, features=axis)
        bank = bank if axis else bank.transpose(1, 2)  # [T + 1, in, out]
        own = y[:, first : first + count]
        if grouped:
            own[rows.place] = F.grouped_mm(x, bank, offs=ends)
        else:
            stride = bank.stride()[:0:-1]
            _split("dx" if axis else "split", own, x, Weight.of_bank(bank, stride), rows, None, *stride)


def _joined(weight: Weight, rows: Rows) -> tuple[Rows, Tensor]:
    """The rows with the samples of tasks whose gates are all closed among the base's: one GEMM serves them.

    Each id is the number of its group. And int32 [T + 1]: positions before each group's end.
    """
    if _planned_by_extension(rows, weight.tasks):
        plan = torch.ops.taps_fast.layer_plan(rows.ids, weight.coeffs, weight.base_coeffs, rows.count, rows.inner)
        slots, order, offsets, place, ends = plan
        return rows._replace(ids=slots, order=order, offsets=offsets, place=place), ends
    ids, slots = torch.empty_like(rows.ids), torch.empty_like(rows.ids)
    count, block = weight.count - 1, 128
    joined_ids_kernel[grid(cdiv(rows.samples, block))](
        ids,
        slots,
        rows.ids,
        weight.coeffs,
        weight.base_coeffs,
        rows.samples,
        count,
        BLOCK_B=block,
        BLOCK_K=min(32, next_power_of_2(max(count, 1))),
        BAKED=weight.base_coeffs is not None,
        num_warps=4,
    )
    order, offsets, _ = group_by_task(ids, weight.tasks)
    joined = rows._replace(ids=slots, order=order, offsets=offsets)
    place, ends = _rows_in_group_order(joined)
    return joined._replace(place=place), ends


def _planned_by_extension(rows: Rows, tasks: int) -> bool:
    """Whether one block of the CUDA extension does it all: fewer launches, until there is too much for a block."""
    small = max(rows.count, rows.samples) <= PLAN_SAMPLES and tasks <= PLAN_TASKS
    if not small or rows.ids is None or not rows.ids.is_cuda:
        return False
    return _ext.cuda_refusal(rows.ids.device.index) is None


def _rows_in_group_order(rows: Rows) -> tuple[Tensor, Tensor]:
    """int64 [M]: the row at each position of the grouped order. int32 [groups]: positions before each group's end."""
    groups = rows.offsets.shape[0] - 1
    place = torch.empty(rows.count, dtype=torch.int64, device=rows.order.device)
    ends = torch.empty(groups, dtype=torch.int32, device=rows.order.device)
    block = 512
    grouped_rows_kernel[grid(max(cdiv(rows.count, block), 1))](
        place,
        ends,
        rows.order,
        rows.offsets,
        rows.count,
        rows.samples,
        rows.inner,
        rows.per_sample,
        groups,
        BLOCK=block,
        BLOCK_G=next_power_of_2(groups),
        num_warps=4,
    )
    return place, ends


def _grouped_mm_fits(x: Tensor, summed: int, features: int, groups: int) -> bool:
    """Whether F.grouped_mm runs this as one kernel; where it would not, it loops on the host and stalls the stream."""
    if x.dtype != torch.bfloat16 or summed % 8 or features % 8 or groups >= 1024:
        return False
    return x.device.type == "cpu" or _configs.capability(x.device)[0] in (9, 10)
