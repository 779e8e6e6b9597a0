"""What the host hands to kernels: pointers and small lists, without a copy from host memory.

A host-to-device copy would stall the stream, or be forbidden while a CUDA graph is captured, or need its source
kept alive for every replay. Kernel arguments have none of these troubles, so everything the host knows travels in
them: up to ARGUMENTS pointers directly, longer lists by a kernel that writes its arguments into a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

ARGUMENTS = 32
"""Pointers passed one by one. Each number of them compiles once; beyond, one table serves all."""


class Pointers(NamedTuple):
    """Equally shaped tensors, as `_tiles.pick` reads them."""

    argument: tuple[Tensor, ...] | Tensor
    table: int
    """0, or the bytes that every address in the table is a multiple of."""


def pointers(tensors: Sequence[Tensor]) -> Pointers:
    if len(tensors) <= ARGUMENTS:
        return Pointers(tuple(tensors), 0)
    addresses = [t.data_ptr() for t in tensors]
    lowest_bit = 16
    for address in addresses:
        lowest_bit |= address
    return Pointers(table(addresses, tensors[0].device), lowest_bit & -lowest_bit)


def table(values: Sequence[int], device: torch.device) -> Tensor:
    """int64 [>= len(values)] on the device, written by kernels of ARGUMENTS values each."""
    written = torch.empty(triton.cdiv(len(values), ARGUMENTS) * ARGUMENTS, dtype=torch.int64, device=device)
    for first in range(0, len(values), ARGUMENTS):
        some = [_disguise(v) for v in values[first : first + ARGUMENTS]]
        some += [_disguise(0)] * (ARGUMENTS - len(some))
        write_kernel[(1,)](written[first:], tuple(some), COUNT=ARGUMENTS, num_warps=1)
    return written


def _disguise(value: int) -> int:
    """Never 1, never a multiple of 16, always 64 bits wide: Triton would compile anew for each such pattern."""
    return 1 << 61 | value << 4 | 2


@triton.jit
def write_kernel(table_ptr, values, COUNT: tl.constexpr):
    """table[n] = values[n], without the disguise."""
    for n in tl.static_range(COUNT):
        tl.store(table_ptr + n, (values[n] & ((1 << 61) - 1)) >> 4)


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]
