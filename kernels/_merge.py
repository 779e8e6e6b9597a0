"""Weights summed into scratch for the vendor's GEMM or convolution: one layer's for each task, or many layers'."""

import triton
import triton.language as tl

from ._launch import direct
from ._tiles import coefficient, next_source, pick


@direct
@triton.jit(do_not_specialize=["K", "L", "slots"])
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
    WHOLE: tl.constexpr,
    MIXED: tl.constexpr,
    BAKED: tl.constexpr,
    TABLE: tl.constexpr,
):
    """weight = Σ_s c[t, s]·W_s in float32, rounded once; sources with coefficient 0 are not read.

    * One layer: weight [slots, rows, columns] is the part of the sources that begins at element ``start``. With
      MIXED, slot g = t + 1 is task t's and slot 0 the base's, as in the groups of `TaskBatch`; a slot whose group has
      no samples is left as it is. Slots of one tile are neighbours in time, so that base comes from memory once.
    * BLOCK_L > 0: L layers, each one row of any length, with coefficients of its own. ``layers`` holds the number of
      each one's first program, then their lengths, multiples of WHOLE, then the addresses of the weights; ``sources``
      K + 1 for each.
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
        columns = tl.multiple_of(tl.load(layers_ptr + L + task), WHOLE)
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
    place = (slot.to(tl.int64) * rows + row) * columns + column
    # A mask whose bound comes from memory, as each layer's does, makes loads as narrow as WHOLE.
    if (down + 1) * BLOCK_R <= rows and (across.to(tl.int64) + 1) * BLOCK_C <= columns:
        acc = summed(
            sources, element, None, task, coeffs_ptr, base_coeffs_ptr, K, dtype, BLOCK_R, BLOCK_C, BLOCK_S, BAKED, TABLE
        )
        tl.store(weight_ptr + place, acc.to(dtype))
    else:
        acc = summed(
            sources, element, real, task, coeffs_ptr, base_coeffs_ptr, K, dtype, BLOCK_R, BLOCK_C, BLOCK_S, BAKED, TABLE
        )
        tl.store(weight_ptr + place, acc.to(dtype), mask=real)


@triton.jit
def summed(
    sources,
    element,
    mask,
    task,
    coeffs_ptr,
    base_coeffs_ptr,
    K,
    dtype: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BAKED: tl.constexpr,
    TABLE: tl.constexpr,
):
    """Σ_s c[t, s]·W_s[element], float32 [BLOCK_R, BLOCK_C]; all of it is there where ``mask`` is None."""
    acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for first in tl.range(0, K + 1, BLOCK_S):
        candidates = first + tl.arange(0, BLOCK_S)
        table = coefficient(candidates, task, coeffs_ptr, base_coeffs_ptr, K, BAKED)
        used = (table != 0.0) & (candidates <= K)  # [BLOCK_S]
        count = tl.sum(used.to(tl.int32), axis=0)
        source = -1
        if mask is None:
            # Two at a time, so that the second is on its way while the first arrives.
            for _ in tl.range(0, tl.cdiv(count, 2)):
                one = next_source(used, candidates, source)
                source = next_source(used, candidates, one)
                more = source <= K
                two = tl.where(more, source, one)
                w = tl.load(pick(sources, one, dtype, TABLE) + element)
                v = tl.load(pick(sources, two, dtype, TABLE) + element, mask=more, other=0.0)
                acc += coefficient(one, task, coeffs_ptr, base_coeffs_ptr, K, BAKED) * w.to(tl.float32)
                acc += coefficient(two, task, coeffs_ptr, base_coeffs_ptr, K, BAKED) * v.to(tl.float32)
        else:
            for _ in tl.range(0, count):
                source = next_source(used, candidates, source)
                w = tl.load(pick(sources, source, dtype, TABLE) + element, mask=mask, other=0.0)
                acc += coefficient(source, task, coeffs_ptr, base_coeffs_ptr, K, BAKED) * w.to(tl.float32)
    return acc
