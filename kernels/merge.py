"""The host side of `_merge`: a layer's weight for each task, and `taps_fast::fold` for many layers in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from ._arguments import common_power, on_its_device, pointers, table, triton_dtype
from ._merge import merge_kernel
from ._problem import Rows, Weight, source_block

BLOCK, WARPS = 2048, 4


def merged(weight: Weight, rows: Rows) -> Tensor:
    """Each group's weight [T + 1, O, I] (one weight: [1, O, I]), closed gates skipped, groups without rows unwritten.

    The result comes from PyTorch's caching allocator: freed after use, it is the next layer's scratch.
    """
    sources = weight.sources
    base = sources[0]
    transposed = base.t().is_contiguous() and not base.is_contiguous()
    if not transposed:
        sources = [s.contiguous() for s in sources]
    slots = weight.tasks + 1 if rows.mixed else 1
    bank = base.new_empty(slots, *(base.shape[::-1] if transposed else base.shape))
    found = pointers(sources)
    merge_kernel[(triton.cdiv(base.numel(), BLOCK), slots)](
        bank,
        found.argument,
        None,
        weight.coeffs,
        weight.base_coeffs,
        rows.offsets,
        base.numel(),
        len(sources) - 1,
        1,
        dtype=triton_dtype(base.dtype),
        BLOCK=BLOCK,
        BLOCK_S=weight.source_block,
        BLOCK_L=0,
        MIXED=rows.mixed,
        BAKED=weight.base_coeffs is not None,
        TABLE=found.table,
        num_warps=WARPS,
    )
    return bank.transpose(1, 2) if transposed else bank


@on_its_device
def fold(bases: Sequence[Tensor], deltas: Sequence[Tensor], coeffs: Tensor) -> list[Tensor]:
    """`taps_fast::fold` without parts and masks, for tensors of one type; deltas with coefficient 0 are not read.

    The table of addresses is kept: while the results are given back to the allocator and the same layers folded again,
    which is what a loop does, one launch is all.
    """
    L, _, K = coeffs.shape
    out = [torch.empty_like(base) for base in bases]
    firsts, addresses = [0], []
    for l, base in enumerate(bases):
        addresses += [t.data_ptr() for t in (out[l], base, *deltas[l * K : (l + 1) * K])]
        firsts.append(firsts[-1] + triton.cdiv(base.numel(), BLOCK))
    blocks = firsts.pop()
    if blocks == 0:
        return out
    layers = table([*firsts, *(base.numel() for base in bases), *addresses], coeffs.device)
    merge_kernel[(blocks, 1)](
        None,
        None,
        layers,
        coeffs.contiguous(),
        None,
        None,
        0,
        K,
        L,
        dtype=triton_dtype(bases[0].dtype),
        BLOCK=BLOCK,
        BLOCK_S=source_block(K + 1),
        BLOCK_L=triton.next_power_of_2(L),
        MIXED=False,
        BAKED=False,
        TABLE=common_power(addresses),
        num_warps=WARPS,
    )
    return out
