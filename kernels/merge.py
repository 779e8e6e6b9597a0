"""The host side of `_merge`: a layer's weight for each task, and `taps_fast::fold` for many layers in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._arguments import cdiv, common_power, grid, next_power_of_2, on_its_device, table, triton_dtype
from ._merge import merge_kernel
from ._problem import Rows, Weight, source_block

BYTES, WARPS = 4096, 4
"""Of a weight, written by one program."""
REGISTERS = 255  # left to its own guess, the assembler spills
SCRATCH = 2**28
"""Bytes that the weights of a mixed batch may take at once."""
LEAST = 64
"""Features that one part of a weight has at least; fewer would leave a GEMM's tiles empty."""


def part_of(features: int, summed: int, slots: int, itemsize: int) -> int:
    """How many of the features that a product makes fit in scratch at once, for the weights of all slots."""
    most = SCRATCH // (slots * summed * itemsize)
    whole = 128 if most >= 128 else LEAST  # whole tiles of a GEMM
    return min(features, max(most // whole * whole, LEAST))


def scratch_refusal(shape: Sequence[int], tasks: int, itemsize: int) -> str | None:
    """Why the weights of so many tasks are not summed beforehand, or None."""
    least = (tasks + 1) * LEAST * max(shape) * itemsize
    if least <= SCRATCH:
        return None
    return f"sums weights in at most {SCRATCH >> 20} MiB of scratch, {tasks} tasks need {least >> 20} MiB or more"


def merged(weight: Weight, rows: Rows, first: int, count: int, *, features: int = 0) -> Tensor:
    """Each group's weight in part, [T + 1, out, in] (one weight: [1, out, in]), in memory as the sources are.

    Of axis ``features`` of the weight, ``count`` from ``first`` on. Closed gates are skipped, groups without rows
    unwritten. The result comes from PyTorch's caching allocator: freed after use, it is the next layer's scratch.
    """
    shape = list(weight.sources[0].shape)
    shape[features] = count
    turned = weight.strides[0] < weight.strides[1]
    slow, fast = (1, 0) if turned else (0, 1)
    slots = weight.tasks + 1 if rows.mixed else 1
    bank = weight.sources[0].new_empty(slots, shape[slow], shape[fast])
    block = BYTES // bank.element_size()
    block_c = min(next_power_of_2(shape[fast]), block)
    block_r = block // block_c
    programs = cdiv(shape[slow], block_r) * cdiv(shape[fast], block_c) * slots
    merge_kernel[grid(programs, *shape, slots)](
        bank,
        weight.pointers.argument,
        None,
        weight.coeffs,
        weight.base_coeffs,
        rows.offsets,
        shape[slow],
        shape[fast],
        first * weight.strides[features],
        weight.count - 1,
        1,
        slots,
        weight.strides[slow],
        weight.strides[fast],
        dtype=triton_dtype(bank.dtype),
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        BLOCK_S=weight.source_block,
        BLOCK_L=0,
        WHOLE=1,
        MIXED=rows.mixed,
        BAKED=weight.base_coeffs is not None,
        TABLE=weight.pointers.table,
        num_warps=WARPS,
        maxnreg=REGISTERS,
    )
    return bank.transpose(1, 2) if turned else bank


@on_its_device
def fold(bases: Sequence[Tensor], deltas: Sequence[Tensor], coeffs: Tensor) -> list[Tensor]:
    """`taps_fast::fold` without parts and masks, for tensors of one type; deltas with coefficient 0 are not read.

    The tables of addresses are kept: while the results are given back to the allocator and the same layers folded
    again, which is what a loop does, one launch is all.
    """
    L, _, K = coeffs.shape
    out = [torch.empty_like(base) for base in bases]
    firsts, addresses, block = [0], [], BYTES // bases[0].element_size()
    for l, base in enumerate(bases):
        addresses += map(Tensor.data_ptr, (base, *deltas[l * K : (l + 1) * K]))
        firsts.append(firsts[-1] + cdiv(base.numel(), block))
    blocks = firsts.pop()
    if blocks == 0:
        return out
    programs = grid(blocks, L, K)  # before the tables are written
    made, lengths = list(map(Tensor.data_ptr, out)), list(map(Tensor.numel, bases))
    layers = table([*firsts, *lengths, *made], coeffs.device)
    merge_kernel[programs](
        None,
        table(addresses, coeffs.device),
        layers,
        coeffs.contiguous(),
        None,
        None,
        1,
        0,
        0,
        K,
        L,
        1,
        0,
        1,
        dtype=triton_dtype(bases[0].dtype),
        BLOCK_R=1,
        BLOCK_C=block,
        BLOCK_S=source_block(K + 1),
        BLOCK_L=next_power_of_2(L),
        WHOLE=common_power(lengths),
        MIXED=False,
        BAKED=False,
        TABLE=common_power([*made, *addresses]),
        num_warps=WARPS,
        maxnreg=REGISTERS,
    )
    return out
