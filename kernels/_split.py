"""Few rows: every source's product accumulates in float32; weights are read once and never summed.

The kernel names its own sides: in features I are reduced, out features O are produced. `linear_dx` runs it with
the weight's strides exchanged, so that there I is the layer's out features and O its in features.
"""

import triton
import triton.language as tl

from ._launch import direct
from ._tiles import coefficient, inside, locate, places, rounds, source_at, weighted

# What no address' alignment depends on, and no loop divides by: batches of other sizes share one compiled kernel.
# Whether M is in whole sixteens stays known: exact float32 then takes half as many registers (sm_80).
_BATCH = ("T", "B", "inner")


@direct
@triton.jit(do_not_specialize=["K", "rows_per_sample", *_BATCH])
def split_kernel(
    y_ptr,
    x_ptr,
    sources,
    coeffs_ptr,
    base_coeffs_ptr,
    bias_ptr,
    ids_ptr,
    order_ptr,
    M,
    I,
    O,
    K,
    T,
    B,
    inner,
    rows_per_sample,
    stride_ys,
    stride_ym,
    stride_yo,
    stride_xm,
    stride_xi,
    stride_wo,
    stride_wi,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SPLITS: tl.constexpr,
    MIXED: tl.constexpr,
    BAKED: tl.constexpr,
    BIAS: tl.constexpr,
    TABLE: tl.constexpr,
    PRECISION: tl.constexpr,
    PACKED: tl.constexpr,
):
    """y[r, o] = Σ_s c[t(r), s] · Σ_i x[r, i] · W_s[o, i] + bias[t(r), o], over sources s that the block's rows use.

    With SPLITS > 1, program s of them sums its range of i into y[s] (float32, no bias), for `sum_splits_kernel`.
    PACKED: the rows of x are in the grouped order.
    """
    pid = tl.program_id(0)
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_o = tl.cdiv(O, BLOCK_O)
    # Row blocks of one weight tile are neighbours in time, so that the tile comes from memory once.
    block_m = pid % blocks_m
    block_o = (pid // blocks_m) % blocks_o
    split = pid // (blocks_m * blocks_o)

    position = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    real = position < M
    row, task = locate(tl.where(real, position, 0), ids_ptr, order_ptr, B, inner, rows_per_sample, MIXED)
    ro = block_o * BLOCK_O + tl.arange(0, BLOCK_O)
    ri = tl.arange(0, BLOCK_I)
    rx = inside(position, M).to(tl.int64) if PACKED else row
    in_x = rx[:, None] * stride_xm + ri.to(tl.int64)[None, :] * stride_xi  # [BLOCK_M, BLOCK_I]
    in_w = inside(ro, O).to(tl.int64)[:, None] * stride_wo + ri.to(tl.int64)[None, :] * stride_wi  # [BLOCK_O, BLOCK_I]
    chunk = tl.cdiv(tl.cdiv(I, BLOCK_I), SPLITS) * BLOCK_I
    start = split * chunk
    stop = tl.minimum(start + chunk, I)
    steps = tl.cdiv(stop - start, BLOCK_I)

    acc = tl.zeros((BLOCK_O, BLOCK_M), tl.float32)
    for first in tl.range(0, K + 1, BLOCK_S):
        candidates = first + tl.arange(0, BLOCK_S)
        table = coefficient(candidates[None, :], task[:, None], coeffs_ptr, base_coeffs_ptr, K, BAKED)
        table = tl.where(real[:, None] & (candidates <= K)[None, :], table, 0.0)  # [BLOCK_M, BLOCK_S]
        used = tl.max((table != 0.0).to(tl.int32), axis=0)  # [BLOCK_S]
        place = places(used)
        product = tl.zeros((BLOCK_O, BLOCK_M), tl.float32)
        # One loop over all sources, not one in another: loads of the next source start while this one's are summed.
        # Where a step reads follows from its number alone, without which no load could start ahead.
        for step in tl.range(0, tl.sum(used, axis=0) * steps):
            source, w_ptr = source_at(place, step // steps, candidates, sources, K, x_ptr.dtype.element_ty, TABLE)
            i = start + (step % steps) * BLOCK_I
            real_i = (ri < I - i)[None, :]
            far = tl.cast(i, tl.int64)
            w = tl.load(w_ptr + far * stride_wi + in_w, mask=real_i, other=0.0)  # [BLOCK_O, BLOCK_I]
            x = tl.load(x_ptr + far * stride_xi + in_x, mask=real_i, other=0.0)  # [BLOCK_M, BLOCK_I]
            product = tl.dot(w, tl.trans(x), product, input_precision=PRECISION)
            if (i + BLOCK_I >= stop) | rounds(step % steps, PRECISION, x_ptr.dtype.element_ty):
                c = coefficient(source, task, coeffs_ptr, base_coeffs_ptr, K, BAKED)  # [BLOCK_M]
                acc += weighted(c[None, :], product)
                product = tl.zeros((BLOCK_O, BLOCK_M), tl.float32)

    y = tl.trans(acc)  # [BLOCK_M, BLOCK_O]
    if PACKED:  # nothing in the loop needs rows, which would take its registers
        position = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
        real = position < M
        row, task = locate(tl.where(real, position, 0), ids_ptr, order_ptr, B, inner, rows_per_sample, MIXED, True)
    real_y = real[:, None] & (ro < O)[None, :]
    if BIAS:
        y += bias_tile(bias_ptr, task, ro, O, T, BIAS)
    target = y_ptr + split.to(tl.int64) * stride_ys + row[:, None] * stride_ym + ro.to(tl.int64)[None, :] * stride_yo
    tl.store(target, y.to(y_ptr.dtype.element_ty), mask=real_y)


@triton.jit
def bias_tile(bias_ptr, task, ro, O, T, BIAS: tl.constexpr):
    """bias[o] (BIAS 1) or bias[t(r), o] (BIAS 2, whose row T serves task -1), as float32 [BLOCK_M or 1, BLOCK_O]."""
    offset = ro[None, :].to(tl.int64)
    if BIAS == 2:
        offset += tl.where(task < 0, T, task).to(tl.int64)[:, None] * O
    return tl.load(bias_ptr + offset, mask=(ro < O)[None, :], other=0.0).to(tl.float32)


@direct
@triton.jit(do_not_specialize=["M", *_BATCH])
def sum_splits_kernel(
    y_ptr,
    partial_ptr,
    bias_ptr,
    ids_ptr,
    M,
    O,
    T,
    B,
    inner,
    stride_ym,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    MIXED: tl.constexpr,
    BIAS: tl.constexpr,
):
    """y[r, o] = Σ_s partial[s, r, o] + bias[t(r), o], summed in the order of s."""
    blocks_m = tl.cdiv(M, BLOCK_M)
    rm = (tl.program_id(0) % blocks_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    ro = (tl.program_id(0) // blocks_m) * BLOCK_O + tl.arange(0, BLOCK_O)
    real = (rm < M)[:, None] & (ro < O)[None, :]
    offset = rm.to(tl.int64)[:, None] * O + ro[None, :]  # [BLOCK_M, BLOCK_O]
    y = tl.load(partial_ptr + offset, mask=real, other=0.0)
    for s in tl.static_range(1, SPLITS):
        y += tl.load(partial_ptr + tl.cast(M, tl.int64) * O * s + offset, mask=real, other=0.0)
    if BIAS:
        task = rm * 0
        if MIXED:
            task = tl.load(ids_ptr + (rm // inner) % B, mask=rm < M, other=0).to(tl.int32)
        y += bias_tile(bias_ptr, task, ro, O, T, BIAS)
    place = y_ptr + rm.to(tl.int64)[:, None] * stride_ym + ro[None, :]
    tl.store(place, y.to(y_ptr.dtype.element_ty), mask=real)
