"""Many rows: weights are summed once into scratch, and the vendor's GEMM does the rest."""

import triton
import triton.language as tl

from ._tiles import coefficient, next_source, pick


@triton.jit
def merge_kernel(
    weight_ptr,
    sources,
    coeffs_ptr,
    base_coeffs_ptr,
    offsets_ptr,
    size,
    K,
    dtype: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_S: tl.constexpr,
    MIXED: tl.constexpr,
    BAKED: tl.constexpr,
    TABLE: tl.constexpr,
):
    """weight[g] = Σ_s c[t, s]·W_s in float32, rounded once; sources with coefficient 0 are not read.

    Every W_s and weight[g] holds ``size`` numbers in one and the same order. With MIXED, slot g = t + 1 is task t's and
    slot 0 the base's, as in the groups of `TaskBatch`; a slot whose group has no samples is left as it is.
    """
    task = 0
    slot = tl.program_id(1)
    if MIXED:
        task = slot - 1
        if tl.load(offsets_ptr + slot) == tl.load(offsets_ptr + slot + 1):
            return
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = element < size
    acc = tl.zeros((BLOCK,), tl.float32)
    for first in tl.range(0, K + 1, BLOCK_S):
        candidates = first + tl.arange(0, BLOCK_S)
        table = coefficient(candidates, task, coeffs_ptr, base_coeffs_ptr, K, BAKED)
        used = (table != 0.0) & (candidates <= K)  # [BLOCK_S]
        source = -1
        for _ in tl.range(0, tl.sum(used.to(tl.int32), axis=0)):
            source = next_source(used, candidates, source)
            w = tl.load(pick(sources, source, dtype, TABLE) + element, mask=real, other=0.0).to(tl.float32)
            acc += coefficient(source, task, coeffs_ptr, base_coeffs_ptr, K, BAKED) * w
    tl.store(weight_ptr + slot.to(tl.int64) * size + element, acc.to(dtype), mask=real)
