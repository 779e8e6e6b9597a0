"""Convolution as a product that never lies in memory: rows are output pixels, read where the kernel's taps fall.

A block's rows are pixels of one image, so that it has one task: one coefficient a source, and only the deltas that
this task uses. Every source's product accumulates in float32, as in `_split`, and no weight is summed: summed in
registers it would be the left operand that Triton mis-compiles, and rounded.
"""

import triton
import triton.language as tl

from ._launch import direct
from ._split import bias_tile
from ._tiles import coefficient, inside, places, rounds, source_at

# What no address' alignment depends on: a network's layers share one compiled kernel.
_SHAPES = ("N", "H", "W", "pixels", "columns", "taps", "taps_w", "B", "inner")
_SETTINGS = ("step_h", "step_w", "pad_h", "pad_w", "dilate_h", "dilate_w")


@direct
@triton.jit(do_not_specialize=[*_SHAPES, *_SETTINGS])
def conv2d_kernel(
    y_ptr,
    x_ptr,
    sources,
    coeffs_ptr,
    base_coeffs_ptr,
    bias_ptr,
    ids_ptr,
    N,
    C,
    H,
    W,
    O,
    pixels,
    columns,
    taps,
    taps_w,
    K,
    T,
    B,
    inner,
    step_h,
    step_w,
    pad_h,
    pad_w,
    dilate_h,
    dilate_w,
    stride_ys,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_wo,
    stride_wc,
    stride_wh,
    stride_ww,
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
):
    """y[n, p, o] = Σ_s c[t(n), s] · Σ_{tap, i} x[n, p·step - pad + tap·dilate, i] · W_s[o, i, tap] + bias[t(n), o].

    y is [N, pixels, O], its ``pixels`` in rows of ``columns``; positions outside of x count as 0. BLOCK_I channels of
    one tap are a step of the sum. With SPLITS > 1, program s of them sums its range of steps into y[s] (float32, no
    bias), for `sum_splits_kernel`.
    """
    pid = tl.program_id(0)
    blocks_image = tl.cdiv(pixels, BLOCK_M)
    blocks_m = N * blocks_image
    blocks_o = tl.cdiv(O, BLOCK_O)
    # Row blocks of one weight tile are neighbours in time, so that the tile comes from memory once.
    block_m = pid % blocks_m
    block_o = (pid // blocks_m) % blocks_o
    split = pid // (blocks_m * blocks_o)

    image = block_m // blocks_image
    task = pid * 0
    if MIXED:
        task = tl.load(ids_ptr + (image // inner) % B).to(tl.int32)
    pixel = (block_m % blocks_image) * BLOCK_M + tl.arange(0, BLOCK_M)
    real = pixel < pixels
    top = (pixel // columns) * step_h - pad_h
    left = (pixel % columns) * step_w - pad_w
    ro = block_o * BLOCK_O + tl.arange(0, BLOCK_O)
    ri = tl.arange(0, BLOCK_I).to(tl.int64)
    corner = image.to(tl.int64) * stride_xn + top.to(tl.int64) * stride_xh + left.to(tl.int64) * stride_xw
    in_x = corner[:, None] + ri[None, :] * stride_xc  # [BLOCK_M, BLOCK_I]
    in_w = inside(ro, O).to(tl.int64)[:, None] * stride_wo + ri[None, :] * stride_wc  # [BLOCK_O, BLOCK_I]
    steps_tap = tl.cdiv(C, BLOCK_I)
    steps = taps * steps_tap
    chunk = tl.cdiv(steps, SPLITS)
    start = split * chunk
    stop = tl.minimum(start + chunk, steps)

    own = stop - start

    acc = tl.zeros((BLOCK_O, BLOCK_M), tl.float32)
    for first in tl.range(0, K + 1, BLOCK_S):
        candidates = first + tl.arange(0, BLOCK_S)
        wanted = coefficient(candidates, task, coeffs_ptr, base_coeffs_ptr, K, BAKED)
        used = ((wanted != 0.0) & (candidates <= K)).to(tl.int32)  # [BLOCK_S]
        place = places(used)
        product = tl.zeros((BLOCK_O, BLOCK_M), tl.float32)
        # One loop over all sources, as in `_split`.
        for n in tl.range(0, tl.sum(used, axis=0) * own):
            source, w_ptr = source_at(place, n // own, candidates, sources, K, x_ptr.dtype.element_ty, TABLE)
            step = start + n % own
            tap = step // steps_tap
            tap_h, tap_w = tap // taps_w, tap % taps_w
            channel = (step % steps_tap) * BLOCK_I
            real_i = (ri < C - channel)[None, :]
            down, along, far = tap_h * dilate_h, tap_w * dilate_w, channel.to(tl.int64)
            row, column = top + down, left + along
            real_x = real & (row >= 0) & (row < H) & (column >= 0) & (column < W)
            to_x = down.to(tl.int64) * stride_xh + along.to(tl.int64) * stride_xw + far * stride_xc
            to_w = tap_h.to(tl.int64) * stride_wh + tap_w.to(tl.int64) * stride_ww + far * stride_wc
            w = tl.load(w_ptr + to_w + in_w, mask=real_i, other=0.0)  # [BLOCK_O, BLOCK_I]
            x = tl.load(x_ptr + to_x + in_x, mask=real_x[:, None] & real_i, other=0.0)  # [BLOCK_M, BLOCK_I]
            product = tl.dot(w, tl.trans(x), product, input_precision=PRECISION)
            if (step + 1 == stop) | rounds(step, PRECISION, x_ptr.dtype.element_ty):
                acc += coefficient(source, task, coeffs_ptr, base_coeffs_ptr, K, BAKED) * product
                product = tl.zeros((BLOCK_O, BLOCK_M), tl.float32)

    y = tl.trans(acc)  # [BLOCK_M, BLOCK_O]
    if BIAS:
        y += bias_tile(bias_ptr, task + pixel * 0, ro, O, T, BIAS)
    place = (image.to(tl.int64) * pixels + pixel)[:, None] * O + ro[None, :]
    target = y_ptr + split.to(tl.int64) * stride_ys + place
    tl.store(target, y.to(y_ptr.dtype.element_ty), mask=real[:, None] & (ro < O)[None, :])
