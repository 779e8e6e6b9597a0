"""The weight gradient P_t = Σ_{r in t} dy_r ⊗ x_r of a task. Of a mixed batch it is never stored: each tile is dotted,
scaled and dropped. Of one weight it is the vendor's product, which a pass goes over.

Nothing is atomic. A tile's contribution to a coefficient's gradient goes to a slot of its own; PyTorch adds the slots.
"""

import triton
import triton.language as tl

from ._launch import direct
from ._tiles import coefficient, group_range, inside, locate, pick, weighted


@triton.jit
def outer_products(
    dy_ptr,
    x_ptr,
    ids_ptr,
    order_ptr,
    start,
    stop,
    ro,
    ri,
    O,
    I,
    B,
    inner,
    rows_per_sample,
    stride_dym,
    stride_dyo,
    stride_xm,
    stride_xi,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Σ over positions [start, stop) of dy[row, ro] ⊗ x[row, ri], float32 [BLOCK_O, BLOCK_I]."""
    in_dy = inside(ro, O).to(tl.int64)[None, :] * stride_dyo  # [1, BLOCK_O]
    in_x = inside(ri, I).to(tl.int64)[None, :] * stride_xi  # [1, BLOCK_I]
    product = tl.zeros((ro.shape[0], ri.shape[0]), tl.float32)
    # At least one step, if masked: with a loop that may not run, ptxas of Triton 3.6 serialises wgmma (C7515).
    for step in tl.range(0, tl.maximum(tl.cdiv(stop - start, BLOCK_M), 1)):
        position = start + step * BLOCK_M + tl.arange(0, BLOCK_M)
        real = position < stop
        row, _ = locate(tl.where(real, position, 0), ids_ptr, order_ptr, B, inner, rows_per_sample, True)
        dy = tl.load(dy_ptr + row[:, None] * stride_dym + in_dy, mask=real[:, None], other=0.0)  # [BLOCK_M, BLOCK_O]
        x = tl.load(x_ptr + row[:, None] * stride_xm + in_x, mask=real[:, None], other=0.0)  # [BLOCK_M, BLOCK_I]
        product = tl.dot(tl.trans(dy), x, product, input_precision=PRECISION)
    return product


@triton.jit
def use_product(
    product,
    slots_ptr,
    outputs,
    sources,
    coeffs_ptr,
    base_coeffs_ptr,
    pairs_ptr,
    task,
    empty,
    tile,
    tiles,
    ro,
    first,
    O,
    I,
    K,
    P,
    stride_wo,
    stride_wi,
    dtype: tl.constexpr,
    PAIRS: tl.constexpr,
    DOTS: tl.constexpr,
    WRITES: tl.constexpr,
    WRITE_BASE: tl.constexpr,
    BAKED: tl.constexpr,
    TABLE: tl.constexpr,
    OUT_TABLE: tl.constexpr,
):
    """slots[p, tile] = <product, Δ_k> and ddeltas[k] = c[t, k]·product for every pair p = (t, k) of this task.

    Without PAIRS all K deltas belong to each task. With it, ``pairs`` holds P of them as t·K + k in order, then for
    each task how many come before its own, and P. An output whose pointer is null is not wanted. The deltas of a task
    with no rows (``empty``) are not read.
    """
    # In halves where the product alone takes most registers.
    parts: tl.constexpr = 2 if product.shape[1] > 128 else 1
    width: tl.constexpr = product.shape[1] // parts
    ri = first + tl.arange(0, width)
    if parts == 2:
        products = tl.split(tl.permute(tl.reshape(product, (product.shape[0], 2, width)), (0, 2, 1)))
    else:
        products = (product,)
    if PAIRS:
        before = tl.load(pairs_ptr + P + task).to(tl.int32)
        after = tl.load(pairs_ptr + P + task + 1).to(tl.int32)
    else:
        before = task * K
        after = before + K
    if WRITE_BASE:
        c = coefficient(0, task, coeffs_ptr, base_coeffs_ptr, K, BAKED)
        into = pick(outputs, 0, dtype, OUT_TABLE)
        for n in tl.static_range(parts):
            store_part(into, weighted(c, products[n]).to(dtype), ro, ri + n * width, O, I)
    for p in tl.range(before, after):
        if PAIRS:
            source = (tl.load(pairs_ptr + p) - task.to(tl.int64) * K).to(tl.int32) + 1
        else:
            source = p - before + 1
        if DOTS:
            w_ptr = pick(sources, source, dtype, TABLE)
            dot = 0.0
            for n in tl.static_range(parts):
                at = ri + n * width
                real = (ro < O)[:, None] & (at < I)[None, :] & ~empty
                in_w = ro.to(tl.int64)[:, None] * stride_wo + at.to(tl.int64)[None, :] * stride_wi  # [BLOCK_O, width]
                dot += tl.sum(products[n] * tl.load(w_ptr + in_w, mask=real, other=0.0).to(tl.float32))
            tl.store(slots_ptr + tl.cast(p, tl.int64) * tiles + tile, dot)
        if WRITES:
            into = pick(outputs, source, dtype, OUT_TABLE)
            if into.to(tl.int64) != 0:
                c = coefficient(source, task, coeffs_ptr, base_coeffs_ptr, K, BAKED)
                for n in tl.static_range(parts):
                    store_part(into, weighted(c, products[n]).to(dtype), ro, ri + n * width, O, I)


@triton.jit
def store_part(into, values, ro, ri, O, I):
    """into[ro, ri] = values, rows of I."""
    offset = ro.to(tl.int64)[:, None] * I + ri.to(tl.int64)[None, :]
    tl.store(into + offset, values, mask=(ro < O)[:, None] & (ri < I)[None, :])


@direct
@triton.jit(do_not_specialize=["K", "P", "B"])
def dw_task_kernel(
    slots_ptr,
    outputs,
    dy_ptr,
    x_ptr,
    sources,
    coeffs_ptr,
    base_coeffs_ptr,
    pairs_ptr,
    ids_ptr,
    order_ptr,
    offsets_ptr,
    I,
    O,
    K,
    P,
    B,
    inner,
    rows_per_sample,
    stride_dym,
    stride_dyo,
    stride_xm,
    stride_xi,
    stride_wo,
    stride_wi,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PAIRS: tl.constexpr,
    DOTS: tl.constexpr,
    WRITES: tl.constexpr,
    WRITE_BASE: tl.constexpr,
    BAKED: tl.constexpr,
    TABLE: tl.constexpr,
    OUT_TABLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of one task's P, used at once.

    Programs of one task are neighbours in time, so that its rows come from memory once.
    """
    tiles_i = tl.cdiv(I, BLOCK_I)
    tiles = tiles_i * tl.cdiv(O, BLOCK_O)
    tile = tl.program_id(0) % tiles
    task = tl.program_id(0) // tiles
    ro = (tile // tiles_i) * BLOCK_O + tl.arange(0, BLOCK_O)
    ri = (tile % tiles_i) * BLOCK_I + tl.arange(0, BLOCK_I)
    start, stop = group_range(task + 1, offsets_ptr, rows_per_sample)
    product = outer_products(
        dy_ptr, x_ptr, ids_ptr, order_ptr, start, stop, ro, ri, O, I, B, inner, rows_per_sample,
        stride_dym, stride_dyo, stride_xm, stride_xi, BLOCK_M, PRECISION,
    )  # fmt: skip
    use_product(
        product, slots_ptr, outputs, sources, coeffs_ptr, base_coeffs_ptr, pairs_ptr, task, start >= stop,
        tile, tiles, ro, (tile % tiles_i) * BLOCK_I, O, I, K, P, stride_wo, stride_wi, x_ptr.dtype.element_ty,
        PAIRS, DOTS, WRITES, WRITE_BASE, BAKED, TABLE, OUT_TABLE,
    )  # fmt: skip


@direct
@triton.jit(do_not_specialize=["K", "P"])
def dw_product_kernel(
    slots_ptr,
    outputs,
    product_ptr,
    sources,
    coeffs_ptr,
    base_coeffs_ptr,
    pairs_ptr,
    I,
    O,
    K,
    P,
    stride_wo,
    stride_wi,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PAIRS: tl.constexpr,
    DOTS: tl.constexpr,
    WRITES: tl.constexpr,
    WRITE_BASE: tl.constexpr,
    BAKED: tl.constexpr,
    TABLE: tl.constexpr,
    OUT_TABLE: tl.constexpr,
):
    """What `dw_task_kernel` does with its P, done with a P that is there, of one weight. It may lie in an output."""
    tiles_i = tl.cdiv(I, BLOCK_I)
    tiles = tiles_i * tl.cdiv(O, BLOCK_O)
    tile = tl.program_id(0)
    ro = (tile // tiles_i) * BLOCK_O + tl.arange(0, BLOCK_O)
    ri = (tile % tiles_i) * BLOCK_I + tl.arange(0, BLOCK_I)
    real = (ro < O)[:, None] & (ri < I)[None, :]
    offset = ro.to(tl.int64)[:, None] * I + ri[None, :]  # [BLOCK_O, BLOCK_I]
    product = tl.load(product_ptr + offset, mask=real, other=0.0).to(tl.float32)
    use_product(
        product, slots_ptr, outputs, sources, coeffs_ptr, base_coeffs_ptr, pairs_ptr, tile * 0, tile < 0,
        tile, tiles, ro, (tile % tiles_i) * BLOCK_I, O, I, K, P, stride_wo, stride_wi, product_ptr.dtype.element_ty,
        PAIRS, DOTS, WRITES, WRITE_BASE, BAKED, TABLE, OUT_TABLE,
    )  # fmt: skip


@direct
@triton.jit(do_not_specialize=["K", "T", "B"])
def dw_shared_kernel(
    outputs,
    dy_ptr,
    x_ptr,
    wanted_ptr,
    coeffs_ptr,
    base_coeffs_ptr,
    ids_ptr,
    order_ptr,
    offsets_ptr,
    I,
    O,
    K,
    T,
    B,
    inner,
    rows_per_sample,
    stride_dym,
    stride_dyo,
    stride_xm,
    stride_xi,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BAKED: tl.constexpr,
    OUT_TABLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """d_s = Σ_t c[t, s]·P_t for each source s in ``wanted``, which several tasks use; group 0 is one of them.

    A task whose coefficient is 0, or that has no rows, is passed over.
    """
    tiles_i = tl.cdiv(I, BLOCK_I)
    tiles = tiles_i * tl.cdiv(O, BLOCK_O)
    tile = tl.program_id(0) % tiles
    which = tl.program_id(0) // tiles
    source = tl.load(wanted_ptr + which).to(tl.int32)
    ro = (tile // tiles_i) * BLOCK_O + tl.arange(0, BLOCK_O)
    ri = (tile % tiles_i) * BLOCK_I + tl.arange(0, BLOCK_I)
    acc = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for group in tl.range(0, T + 1):
        c = coefficient(source, group - 1, coeffs_ptr, base_coeffs_ptr, K, BAKED)
        start, stop = group_range(group, offsets_ptr, rows_per_sample)
        if (c != 0.0) & (start < stop):
            acc += c * outer_products(
                dy_ptr, x_ptr, ids_ptr, order_ptr, start, stop, ro, ri, O, I, B, inner, rows_per_sample,
                stride_dym, stride_dyo, stride_xm, stride_xi, BLOCK_M, PRECISION,
            )  # fmt: skip
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    offset = ro.to(tl.int64)[:, None] * I + ri.to(tl.int64)[None, :]
    tl.store(
        pick(outputs, which, dtype, OUT_TABLE) + offset,
        acc.to(dtype),
        mask=(ro < O)[:, None] & (ri < I)[None, :],
    )
