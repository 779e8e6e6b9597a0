"""Weights summed into scratch for the vendor's GEMM or convolution: one layer's for each task, or many layers'."""

import triton
import triton.language as tl

from ._tiles import coefficient, next_source, pick


@triton.jit
def merge_kernel(
    weight_ptr,
    sources,
    layers_ptr,
    coeffs_ptr,
    base_coeffs_ptr,
    offsets_ptr,
    rows,
    columns,
    start,
    K,
    L,
    slots,
    stride_row,
    stride_column,
    dtype: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_L: tl.constexpr,
    MIXED: tl.constexpr,
    BAKED: tl.constexpr,
    TABLE: tl.constexpr,
):
    """weight = Σ_s c[t, s]·W_s in float32, rounded once; sources with coefficient 0 are not read.

    * One layer: weight [slots, rows, columns] is the part of the sources that begins at element ``start``. With
      MIXED, slot g = t + 1 is task t's and slot 0 the base's, as in the groups of `TaskBatch`; a slot whose group has
      no samples is left as it is. Slots of one tile are neighbours in time, so that base comes from memory once.
    * BLOCK_L > 0: L layers, each one row of any length, with coefficients of its own. ``layers`` holds the number of
      each one's first program, then their lengths, then the addresses of the weights; ``sources`` K + 1 for each.
    """
    tile = tl.program_id(0)
    slot = tile * 0
    task = slot
    down = slot
    if BLOCK_L:
        rl = tl.arange(0, BLOCK_L)
        firsts = tl.load(layers_ptr + rl, mask=rl < L, other=1 << 62)
        task = tl.sum((firsts <= tile).to(tl.int32), axis=0) - 1
        across = tile - tl.load(layers_ptr + task).to(tl.int32)
        columns = tl.load(layers_ptr + L + task)
        weight_ptr = pick(layers_ptr + 2 * L, task, dtype, TABLE)
        sources += task.to(tl.int64) * (K + 1)
    else:
        slot = tile % slots
        if MIXED:
            task = slot - 1
            if tl.load(offsets_ptr + slot) == tl.load(offsets_ptr + slot + 1):
                return
        tiles_row = tl.cdiv(columns, BLOCK_C)
        down = tile // slots // tiles_row
        across = tile // slots % tiles_row
    row = (down.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    column = (across.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    real = (row < rows) & (column < columns)
    element = start + row * stride_row + column * stride_column  # [BLOCK_R, BLOCK_C]
    acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for first in tl.range(0, K + 1, BLOCK_S):
        candidates = first + tl.arange(0, BLOCK_S)
        table = coefficient(candidates, task, coeffs_ptr, base_coeffs_ptr, K, BAKED)
        used = (table != 0.0) & (candidates <= K)  # [BLOCK_S]
        source = -1
        for _ in tl.range(0, tl.sum(used.to(tl.int32), axis=0)):
            source = next_source(used, candidates, source)
            w = tl.load(pick(sources, source, dtype, TABLE) + element, mask=real, other=0.0).to(tl.float32)
            acc += coefficient(source, task, coeffs_ptr, base_coeffs_ptr, K, BAKED) * w
    place = (slot.to(tl.int64) * rows + row) * columns + column
    tl.store(weight_ptr + place, acc.to(dtype), mask=real)
