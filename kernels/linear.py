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

from taps_fast import _tuned

from . import _configs
from ._arguments import on_its_device, pointers
from ._gradients import linear_dw
from ._problem import Rows, Weight
from ._split import split_kernel, sum_splits_kernel
from .merge import merged

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
    if (problem.num_tasks or 0) >= 2**16 - 1:
        yield f"takes fewer than {2**16 - 1} tasks, got {problem.num_tasks}"
    if torch.cuda.is_available() and torch.cuda.get_device_properties().major < 8:
        yield f"needs compute capability 8.0 or newer, the device is {_tuned.arch()}"


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
    return _split("split", x, weight, rows, bias, base.shape[0], *weight.stride)


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
    return _split("dx", dy, weight, rows, None, base.shape[1], *reversed(weight.stride))


linear_dw = on_its_device(linear_dw)


def _algorithm(algorithm: str) -> str:
    if algorithm not in ALGORITHMS:
        raise ValueError(f"triton: algorithm must be {' or '.join(ALGORITHMS)}, got {algorithm!r}")
    return algorithm


def _split(
    kernel: str,
    x: Tensor,
    weight: Weight,
    rows: Rows,
    bias: Tensor | None,
    out_features: int,
    stride_wo: int,
    stride_wi: int,
) -> Tensor:
    M, I = x.shape
    y = x.new_empty(M, out_features)
    if y.numel() == 0:
        return y
    config = _configs.choose(kernel, M, x.element_size(), _configs.capability(x.device))
    tiles = triton.cdiv(M, config.block_m) * triton.cdiv(out_features, config.block_o)
    splits = _configs.splits(tiles, triton.cdiv(I, config.block_i), _configs.processors(x.device))
    # A power of two: each value compiles once.
    splits = 1 << splits.bit_length() - 1
    target = y if splits == 1 else torch.empty(splits, M, out_features, dtype=torch.float32, device=x.device)
    has_bias = 0 if bias is None else bias.dim()
    if bias is not None:
        bias = bias.contiguous()
    sources = pointers(weight.sources)
    split_kernel[(tiles * splits,)](
        target,
        x,
        sources.argument,
        weight.coeffs,
        weight.base_coeffs,
        bias,
        rows.ids,
        rows.order,
        M,
        I,
        out_features,
        len(weight.sources) - 1,
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
        TABLE=sources.table,
        PRECISION=_configs.precision(x.dtype),
        num_warps=config.warps,
        num_stages=config.stages,
        maxnreg=config.registers,
    )
    if splits > 1:
        block_m, block_o = min(16, triton.next_power_of_2(M)), 128
        sum_splits_kernel[(triton.cdiv(M, block_m) * triton.cdiv(out_features, block_o),)](
            y,
            target,
            bias,
            rows.ids,
            M,
            out_features,
            weight.tasks,
            rows.samples,
            rows.inner,
            SPLITS=splits,
            BLOCK_M=block_m,
            BLOCK_O=block_o,
            MIXED=rows.mixed,
            BIAS=has_bias,
            num_warps=4,
        )
    return y


def _merged_product(x: Tensor, weight: Weight, rows: Rows, bias: Tensor | None, *, transposed: bool) -> Tensor:
    """x·W_tᵀ + bias_t, or with ``transposed`` x·W_t, each weight summed first."""
    if not rows.mixed:
        whole = merged(weight, rows)[0]
        return x @ whole if transposed else F.linear(x, whole, bias)
    bias_row = None if bias is None or bias.dim() == 1 else _task_of_row(rows)
    ids, order, offsets = _joined(weight, rows)
    rows = rows._replace(ids=ids, order=order, offsets=offsets)
    bank = merged(weight, rows)
    bank = bank if transposed else bank.transpose(1, 2)  # [T + 1, in, out]
    if _grouped_mm_fits(x, bank):
        place = _rows_in_group_order(rows)
        ends = offsets[1:] * rows.per_sample
        y = x.new_empty(x.shape[0], bank.shape[2])
        y[place] = F.grouped_mm(x[place], bank, offs=ends.to(torch.int32))
    else:
        # Each row uses one source, its own group's weight: row g of this table is task g - 1's, the last the base's.
        eye = torch.eye(bank.shape[0], dtype=torch.float32, device=x.device)
        slot = torch.remainder(ids + 1, bank.shape[0])
        one = Weight(list(bank.unbind()), eye[:, 1:].contiguous(), eye[:, 0].contiguous())
        rows = rows._replace(ids=slot)
        y = _split("dx" if transposed else "split", x, one, rows, None, bank.shape[2], *reversed(bank.stride()[1:]))
    if bias is not None:
        y += bias if bias_row is None else bias[bias_row]
    return y


def _joined(weight: Weight, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """The index with the samples of tasks whose gates are all closed among the base's: one GEMM serves them."""
    closed = (weight.coeffs == 0).all(1)
    if weight.base_coeffs is not None:
        closed &= weight.base_coeffs == 1
    closed = F.pad(closed, (0, 1), value=True)  # id -1 finds the last entry
    ids = torch.where(closed[rows.ids], -1, rows.ids)
    ascending, order = torch.sort(ids, stable=True)
    return ids, order, torch.searchsorted(ascending, torch.arange(-1, weight.tasks + 1, device=ids.device))


def _rows_in_group_order(rows: Rows) -> Tensor:
    """int64 [M]: the row at each position of the grouped order; see `_tiles.locate`."""
    device = rows.order.device
    outer = torch.arange(rows.per_sample // rows.inner, device=device)[:, None]
    within = torch.arange(rows.inner, device=device)
    return ((outer * rows.samples + rows.order[:, None, None]) * rows.inner + within).flatten()


def _task_of_row(rows: Rows) -> Tensor:
    """int64 [M]: task of each row, -1 (the last entry of a table) for the base."""
    row = torch.arange(rows.count, device=rows.ids.device)
    return rows.ids[row // rows.inner % rows.samples]


def _grouped_mm_fits(x: Tensor, bank: Tensor) -> bool:
    """Whether F.grouped_mm runs this as one kernel; where it would not, it loops on the host and stalls the stream."""
    if x.dtype != torch.bfloat16 or any(size * 2 % 16 for size in bank.shape[1:]) or bank.shape[0] >= 1024:
        return False
    return x.device.type == "cpu" or torch.cuda.get_device_capability(x.device)[0] in (9, 10)
