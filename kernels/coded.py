"""Products with deltas of one bit or one byte a weight on CUDA; arguments are those of `taps_fast._ops`.

Codes are decoded into the right operand of a product of tiles: Triton 3.6 to 3.8 mis-compiles some products whose left
operand is formed by arithmetic. Ids are data; which delta a task uses is not, as in the operators.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _configs
from ._arguments import cdiv, grid, pointers, table, triton_dtype
from ._launch import direct
from ._problem import Rows
from ._tiles import locate, pick

FORMATS = {"bits": 0, "mask": 1, "int8": 2}
BLOCK_M, BLOCK_N, BLOCK_R = 16, 64, {2: 64, 4: 32}
"""Rows, features produced, and features of a step of the sum, these by the bytes of an element."""
REGISTERS = 255  # left to its own guess, the assembler spills


def coded_fwd(
    y: Tensor,
    x: Tensor,
    codes: Sequence[Tensor],
    tile: Tensor | None,
    factors: Tensor,
    which: Sequence[int],
    ids: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    inner: int,
    format: str,
) -> Tensor:
    """y + factors[t]∘(D x)."""
    out = y.clone(memory_format=torch.contiguous_format)
    rows = Rows(ids, order, offsets, x.shape[0], max(inner, 1))
    return _run(out, x, codes, tile, factors, which, rows, format, x.shape[1], dx=False)


def coded_dx(
    dy: Tensor,
    codes: Sequence[Tensor],
    tile: Tensor | None,
    factors: Tensor,
    which: Sequence[int],
    ids: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    inner: int,
    format: str,
    in_features: int,
) -> Tensor:
    """(factors[t]∘dy) D."""
    out = dy.new_zeros(dy.shape[0], in_features)
    rows = Rows(ids, order, offsets, dy.shape[0], max(inner, 1))
    return _run(out, dy, codes, tile, factors, which, rows, format, in_features, dx=True)


def _run(
    out: Tensor,
    x: Tensor,
    codes: Sequence[Tensor],
    tile: Tensor | None,
    factors: Tensor,
    which: Sequence[int],
    rows: Rows,
    format: str,
    in_features: int,
    *,
    dx: bool,
) -> Tensor:
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"triton: x must be float32, bfloat16 or float16 with compressed deltas, got {x.dtype}")
    if out.numel() == 0 or x.shape[1] == 0 or not codes:
        return out
    programs = cdiv(x.shape[0], BLOCK_M) * cdiv(out.shape[1], BLOCK_N)
    with torch.cuda.device_of(x):
        found = pointers(codes)
        coded_kernel[grid(programs, *out.shape)](
            out,
            x,
            found.argument,
            x if tile is None else tile,
            factors,
            table(_from_one(tuple(which)), x.device),
            rows.ids,
            rows.order,
            x.shape[0],
            in_features,
            factors.shape[1],
            rows.samples,
            rows.inner,
            rows.per_sample,
            codes[0].stride(0),
            dtype=triton_dtype(x.dtype),
            FORMAT=FORMATS[format],
            DX=dx,
            MIXED=rows.mixed,
            TABLE=found.table,
            PRECISION=_configs.precision(x.dtype),
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            BLOCK_R=BLOCK_R[x.element_size()],
            num_warps=4,
            num_stages=2,
            maxnreg=REGISTERS,
        )
    return out


@functools.lru_cache(maxsize=1024)
def _from_one(which: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(k + 1 for k in which)


# What no address' alignment depends on, and no loop divides by: batches of other sizes share one compiled kernel.
@direct
@triton.jit(do_not_specialize=["M", "B", "inner", "rows_per_sample"])
def coded_kernel(
    out_ptr,
    x_ptr,
    codes,
    tile_ptr,
    factors_ptr,
    which_ptr,
    ids_ptr,
    order_ptr,
    M,
    I,
    O,
    B,
    inner,
    rows_per_sample,
    stride_code,
    dtype: tl.constexpr,
    FORMAT: tl.constexpr,
    DX: tl.constexpr,
    MIXED: tl.constexpr,
    TABLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out[r, n] += Σ_i x[r, i]·factors[t, n]·D[n, i], or with DX Σ_o x[r, o]·factors[t, o]·D[o, n].

    A block's rows are taken task by task. ``which`` counts from 1; 0 is a task without a delta.
    """
    N = I if DX else O
    R = O if DX else I
    pid = tl.program_id(0)
    blocks_m = tl.cdiv(M, BLOCK_M)
    position = pid % blocks_m * BLOCK_M + tl.arange(0, BLOCK_M)
    real = position < M
    row, task = locate(tl.where(real, position, 0), ids_ptr, order_ptr, B, inner, rows_per_sample, MIXED)
    source = tl.load(which_ptr + task, mask=real & (task >= 0), other=0)
    task = tl.where(source > 0, task, 1 << 30)
    rn = pid // blocks_m * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    current = tl.min(task, axis=0)
    while current < (1 << 30):
        mine = task == current
        code = tl.load(which_ptr + current).to(tl.int32) - 1
        if FORMAT == 2:
            code_ptr = pick(codes, code, tl.int8, TABLE)
        else:
            code_ptr = pick(codes, code, tl.uint8, TABLE)
        factor_ptr = factors_ptr + current.to(tl.int64) * O
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for first in tl.range(0, R, BLOCK_R):
            rr = first + tl.arange(0, BLOCK_R)
            x = tl.load(x_ptr + row[:, None] * R + rr[None, :], mask=mine[:, None] & (rr < R)[None, :], other=0.0)
            if DX:
                o, i = rr[:, None], rn[None, :]
            else:
                o, i = rn[None, :], rr[:, None]
            inside = (rr < R)[:, None] & (rn < N)[None, :]  # [BLOCK_R, BLOCK_N]
            wide_o = o.to(tl.int64)
            if FORMAT == 2:
                weight = tl.load(code_ptr + wide_o * stride_code + i, mask=inside, other=0).to(tl.float32)
            else:
                byte = tl.load(code_ptr + wide_o * stride_code + i // 8, mask=inside, other=0).to(tl.int32)
                bit = byte >> (i % 8) & 1
                if FORMAT == 0:
                    weight = tl.where(inside, bit * 2 - 1, 0).to(tl.float32)
                else:
                    kept = tl.load(tile_ptr + wide_o * I + i, mask=inside & (bit > 0), other=0.0)
                    weight = kept.to(tl.float32)
            if DX:
                weight *= tl.load(factor_ptr + rr, mask=rr < R, other=0.0)[:, None]
            acc = tl.dot(x, weight.to(dtype), acc, input_precision=PRECISION)
        if not DX:
            acc *= tl.load(factor_ptr + rn, mask=rn < N, other=0.0)[None, :]
        total += tl.where(mine[:, None], acc, 0.0)
        current = tl.min(tl.where(task > current, task, 1 << 30), axis=0)
    place = out_ptr + row[:, None] * N + rn[None, :]
    inside_out = real[:, None] & (rn < N)[None, :]
    before = tl.load(place, mask=inside_out, other=0.0).to(tl.float32)
    tl.store(place, (before + total).to(out_ptr.dtype.element_ty), mask=inside_out)
