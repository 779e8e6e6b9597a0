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
    size,
    K,
    L,
    dtype: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_L: tl.constexpr,
    MIXED: tl.constexpr,
    BAKED: tl.constexpr,
    TABLE: tl.constexpr,
):
    """weight = Σ_s c[row, s]·W_s in float32, rounded once; sources with coefficient 0 are not read.

    Each weight and its sources hold equally many numbers in one and the same order.

    * One layer: ``size`` numbers. With MIXED, slot g = t + 1 of weight is task t's and slot 0 the base's, as in the
      groups of `TaskBatch`; a slot whose group has no samples is left as it is.
    * BLOCK_L > 0: L layers, each with a row of coefficients. ``layers`` holds the number of each one's first program,
      then their sizes, then for each layer the addresses of its weight and of its K + 1 sources.
    """
    block = tl.program_id(0)
    row = tl.program_id(1)
    if BLOCK_L:
        rl = tl.arange(0, BLOCK_L)
        firsts = tl.load(layers_ptr + rl, mask=rl < L, other=1 << 62)
        row = tl.sum((firsts <= block).to(tl.int32), axis=0) - 1
        block -= tl.load(layers_ptr + row).to(tl.int32)
        size = tl.load(layers_ptr + L + row)
        own = layers_ptr + 2 * L + row.to(tl.int64) * (K + 2)
        weight_ptr = pick(own, 0, dtype, TABLE)
        sources = own + 1
    elif MIXED:
        if tl.load(offsets_ptr + row) == tl.load(offsets_ptr + row + 1):
            return
        weight_ptr += row.to(tl.int64) * size
        row -= 1
    element = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = element < size
    acc = tl.zeros((BLOCK,), tl.float32)
    for first in tl.range(0, K + 1, BLOCK_S):
        candidates = first + tl.arange(0, BLOCK_S)
        table = coefficient(candidates, row, coeffs_ptr, base_coeffs_ptr, K, BAKED)
        used = (table != 0.0) & (candidates <= K)  # [BLOCK_S]
        source = -1
        for _ in tl.range(0, tl.sum(used.to(tl.int32), axis=0)):
            source = next_source(used, candidates, source)
            w = tl.load(pick(sources, source, dtype, TABLE) + element, mask=real, other=0.0).to(tl.float32)
            acc += coefficient(source, row, coeffs_ptr, base_coeffs_ptr, K, BAKED) * w
    tl.store(weight_ptr + element, acc.to(dtype), mask=real)
