"""What a grouped product wants to know of a batch: whose weight each sample uses, and where each group's rows are."""

import triton
import triton.language as tl

from ._launch import direct


@direct
@triton.jit(do_not_specialize=["B", "K"])
def joined_ids_kernel(
    ids_out_ptr,
    slots_ptr,
    ids_ptr,
    coeffs_ptr,
    base_coeffs_ptr,
    B,
    K,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAKED: tl.constexpr,
):
    """Each sample's task, or -1 where all of the task's gates are closed: there the base serves it. Slot: one more."""
    sample = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    real = sample < B
    task = tl.load(ids_ptr + sample, mask=real, other=-1)
    own = task >= 0
    is_open = tl.zeros((BLOCK_B,), tl.int32)
    for first in tl.range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        c = tl.load(coeffs_ptr + task[:, None] * K + k[None, :], mask=own[:, None] & (k < K)[None, :], other=0.0)
        is_open = tl.maximum(is_open, tl.max((c != 0.0).to(tl.int32), axis=1))
    if BAKED:
        is_open = tl.maximum(is_open, (tl.load(base_coeffs_ptr + task, mask=own, other=1.0) != 1.0).to(tl.int32))
    joined = tl.where(is_open > 0, task, -1)
    tl.store(ids_out_ptr + sample, joined, mask=real)
    tl.store(slots_ptr + sample, joined + 1, mask=real)


@direct
@triton.jit(do_not_specialize=["M", "B", "inner", "rows_per_sample", "groups"])
def grouped_rows_kernel(
    rows_ptr,
    ends_ptr,
    order_ptr,
    offsets_ptr,
    M,
    B,
    inner,
    rows_per_sample,
    groups,
    BLOCK: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """The row at each position of the grouped order, see `_tiles.locate`, and how many rows end with each group."""
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = position < M
    sample = tl.load(order_ptr + position // rows_per_sample, mask=real, other=0)
    within = position % rows_per_sample
    row = ((within // inner).to(tl.int64) * B + sample) * inner + within % inner
    tl.store(rows_ptr + position, row, mask=real)
    if tl.program_id(0) == 0:
        group = tl.arange(0, BLOCK_G)
        offset = tl.load(offsets_ptr + 1 + group, mask=group < groups, other=0)
        tl.store(ends_ptr + group, (offset * rows_per_sample).to(tl.int32), mask=group < groups)
