"""What the host hands to kernels: pointers and small lists, without a copy from host memory.

A host-to-device copy would stall the stream, or be forbidden while a CUDA graph is captured, or need its source
kept alive for every replay. Kernel arguments have none of these troubles, so everything the host knows travels in
them: up to ARGUMENTS pointers directly, longer lists by a kernel that writes its arguments into a table.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

ARGUMENTS = 32
"""Pointers passed one by one. Each number of them compiles once; beyond, one table serves all."""
DEFAULT_STREAM = 0
"""Its handle, on every device."""


class Pointers(NamedTuple):
    """Equally shaped tensors, as `_tiles.pick` reads them."""

    argument: tuple[Tensor, ...] | Tensor
    table: int
    """0, or the bytes that every address in the table is a multiple of."""


def pointers(tensors: Sequence[Tensor]) -> Pointers:
    """Of tensors on one device. A few go as arguments; more as a table, which is found again while they stay put."""
    if len(tensors) <= ARGUMENTS:
        return Pointers(tuple(tensors), 0)
    addresses = tuple(map(Tensor.data_ptr, tensors))
    return _kept_or_written(_table_of_pointers, addresses, tensors[0].device)


def slots(bank: Tensor) -> Pointers:
    """Of the slots of one contiguous tensor."""
    first, size = bank.data_ptr(), bank.stride(0) * bank.element_size()
    end = first + size * bank.shape[0]
    return Pointers(torch.arange(first, end, size, dtype=torch.int64, device=bank.device), common_power((first, size)))


def common_power(addresses: Sequence[int]) -> int:
    """The largest power of two up to 16 that divides every address."""
    bits = functools.reduce(operator.or_, addresses, 16)
    return bits & -bits


def table(values: Sequence[int], device: torch.device) -> Tensor:
    """int64 [>= len(values)] on the device, written by kernels of ARGUMENTS values each.

    On the default stream a table of the same values is written once and kept. Elsewhere it is written anew: what a
    graph reads must be its own, and what it would write only its replays do. That a stream is being captured does not
    tell: `torch.compile(mode="reduce-overhead")` first runs a call uncaptured, on a stream of its own, in memory that
    its graphs will write over. Nothing is ever captured from the default stream.
    """
    return _kept_or_written(_written, tuple(values), device)


def _kept_or_written(make: Callable[..., Any], values: tuple[int, ...], device: torch.device) -> Any:
    if device.type == "cuda" and torch.cuda.current_stream(device).cuda_stream == DEFAULT_STREAM:
        return _kept(make, values, device)
    return make(values, device)


@functools.lru_cache(maxsize=1024)
def _kept(make: Callable[..., Any], values: tuple[int, ...], device: torch.device) -> Any:
    """The values are the key: never stale. What was allocated under `torch.cuda.use_mem_pool` outlives the pool."""
    return make(values, device)


def _table_of_pointers(addresses: tuple[int, ...], device: torch.device) -> Pointers:
    return Pointers(_written(addresses, device), common_power(addresses))


def _written(values: tuple[int, ...], device: torch.device) -> Tensor:
    written = torch.empty(cdiv(len(values), ARGUMENTS) * ARGUMENTS, dtype=torch.int64, device=device)
    for first in range(0, len(values), ARGUMENTS):
        some = [_disguise(v) for v in values[first : first + ARGUMENTS]]
        some += [_disguise(0)] * (ARGUMENTS - len(some))
        write_kernel[grid(1)](written[first:], tuple(some), COUNT=ARGUMENTS, num_warps=1)
    return written


def _disguise(value: int) -> int:
    """Never 1, never a multiple of 16, always 64 bits wide: Triton would compile anew for each such pattern."""
    return 1 << 61 | value << 4 | 2


@triton.jit
def write_kernel(table_ptr, values, COUNT: tl.constexpr):
    """table[n] = values[n], without the disguise."""
    for n in tl.static_range(COUNT):
        tl.store(table_ptr + n, (values[n] & ((1 << 61) - 1)) >> 4)


def grid(programs: int, *sizes: int) -> tuple[int]:
    """Of one axis, as the others end at 65535 programs; it ends at 2³¹ - 1. ``sizes``: what makes so many."""
    if programs >= 2**31:
        raise ValueError(f"triton: sizes must make fewer than 2**31 programs, got {programs} (sizes {sizes})")
    return (programs,)


def cdiv(size: int, block: int) -> int:
    """Blocks that hold so many; Triton's own is for kernels, and takes microseconds on the host."""
    return -(-size // block)


def next_power_of_2(size: int) -> int:
    """The least that is not below ``size``, which is at least 1."""
    return 1 << (size - 1).bit_length()


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


def on_its_device(run: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, wherever the tensors are."""

    @functools.wraps(run)
    def guarded(first: Any, *rest: Any) -> Any:
        tensor = first[0] if isinstance(first, Sequence) else first
        if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
            return run(first, *rest)
        with torch.cuda.device_of(tensor):
            return run(first, *rest)

    return guarded
