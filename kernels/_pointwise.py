"""Scale, shift and activation by task in one pass over x, and the sums over each task's rows that training needs.

x [N, C, P] is dense, channels first or last, P its pixels. A table is [C] or [T + 1, C], whose last row is the base's.
"""

import triton
import triton.language as tl

from ._launch import direct
from ._tiles import group_range, locate


@triton.jit
def table_tile(table_ptr, task, channel, C, T, mask, TASKS: tl.constexpr):
    """table[t, c] as float32 for any shapes of task and channel that broadcast."""
    offset = channel.to(tl.int64)
    if TASKS:
        offset += tl.where(task < 0, T, task).to(tl.int64) * C
    else:
        offset += task * 0
    return tl.load(table_ptr + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def affine(x, scale_ptr, shift_ptr, task, channel, C, T, mask, SCALE: tl.constexpr, SHIFT: tl.constexpr):
    """u = scale·x + shift. SCALE and SHIFT: 0 no table, 1 [C], 2 [T + 1, C]."""
    u = x
    if SCALE:
        u = u * table_tile(scale_ptr, task, channel, C, T, mask, SCALE == 2)
    if SHIFT:
        u = u + table_tile(shift_ptr, task, channel, C, T, mask, SHIFT == 2)
    return u


@triton.jit
def activate(u, ACTIVATION: tl.constexpr):
    """act(u); NaN stays NaN."""
    if ACTIVATION == "relu":
        u = tl.where(u <= 0.0, 0.0, u)
    elif ACTIVATION == "relu6":
        u = tl.where(u <= 0.0, 0.0, tl.where(u >= 6.0, 6.0, u))
    elif ACTIVATION == "silu":
        u = u * tl.sigmoid(u)
    elif ACTIVATION == "gelu":
        u = 0.5 * u * (1.0 + tl.erf(u * 0.7071067811865476))
    return u


@triton.jit
def activation_gradient(dy, u, ACTIVATION: tl.constexpr):
    """dy·act'(u)."""
    if ACTIVATION == "relu":
        dy = tl.where(u <= 0.0, 0.0, dy)
    elif ACTIVATION == "relu6":
        dy = tl.where((u <= 0.0) | (u >= 6.0), 0.0, dy)
    elif ACTIVATION == "silu":
        s = tl.sigmoid(u)
        dy = dy * s * (1.0 + u * (1.0 - s))
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * u * u)
        dy = dy * (0.5 * (1.0 + tl.erf(u * 0.7071067811865476)) + u * density)
    return dy


# What no address' alignment depends on, and no loop divides by: batches of other sizes share one compiled kernel.
# Whether N is in whole sixteens stays known here, without which Triton 3.6 spills.
@direct
@triton.jit(do_not_specialize=["T", "B", "inner"])
def scale_shift_kernel(
    y_ptr,
    x_ptr,
    dy_ptr,
    scale_ptr,
    shift_ptr,
    slope_ptr,
    offset_ptr,
    ids_ptr,
    N,
    C,
    P,
    T,
    B,
    inner,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    LAST: tl.constexpr,
    MIXED: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    SLOPE: tl.constexpr,
    OFFSET: tl.constexpr,
    BACKWARD: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """y = act(scale·x + shift); BACKWARD: y = scale·dy·act'(scale·x + shift) + slope·x + offset.

    A program has BLOCK_R outer places, (row, pixel) where channels are last and (row, channel) where they are not, and
    BLOCK_E of the channels or pixels inside each.
    """
    blocks = tl.cdiv(C if LAST else P, BLOCK_E)
    outer = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    element = tl.program_id(0) % blocks * BLOCK_E + tl.arange(0, BLOCK_E)[None, :]
    if LAST:
        width, row, channel = C, outer // P, element
        real = (outer < tl.cast(N, tl.int64) * P) & (element < C)
    else:
        width, row, channel = P, outer // C, outer % C
        real = (outer < tl.cast(N, tl.int64) * C) & (element < P)
    task = 0
    if MIXED:
        task = tl.load(ids_ptr + (row // inner) % B, mask=row < N, other=0).to(tl.int32)
    place = outer * width + element
    x = tl.load(x_ptr + place, mask=real, other=0.0).to(tl.float32)
    u = affine(x, scale_ptr, shift_ptr, task, channel, C, T, real, SCALE, SHIFT)
    if BACKWARD:
        dy = tl.load(dy_ptr + place, mask=real, other=0.0).to(tl.float32)
        y = activation_gradient(dy, u, ACTIVATION)
        if SCALE:
            y *= table_tile(scale_ptr, task, channel, C, T, real, SCALE == 2)
        if SLOPE:
            y += x * table_tile(slope_ptr, task, channel, C, T, real, SLOPE == 2)
        if OFFSET:
            y += table_tile(offset_ptr, task, channel, C, T, real, OFFSET == 2)
    else:
        y = activate(u, ACTIVATION)
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=real)


@direct
@triton.jit(do_not_specialize=["N", "T", "B"])
def task_sums_kernel(
    first_ptr,
    second_ptr,
    x_ptr,
    dy_ptr,
    scale_ptr,
    shift_ptr,
    center_ptr,
    ids_ptr,
    order_ptr,
    offsets_ptr,
    N,
    C,
    P,
    T,
    B,
    inner,
    rows_per_sample,
    BLOCK_C: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    PARTS: tl.constexpr,
    LAST: tl.constexpr,
    MIXED: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    CENTER: tl.constexpr,
    WHAT: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Over part s of the rows and pixels of group g, for a block of channels, into [g, s, c]:

    WHAT "sum": Σ x. "variance": Σ (x - center)². "gradients": Σ du·(x - center) into first and Σ du into second.
    """
    blocks = tl.cdiv(C, BLOCK_C)
    channel = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.program_id(0) // blocks % PARTS
    group = tl.program_id(0) // blocks // PARTS
    if MIXED:
        start, stop = group_range(group, offsets_ptr, rows_per_sample)
        task = tl.where(group == 0, T, group - 1)
    else:
        start, stop = 0, N
        task = group * 0
    total = tl.cast(stop - start, tl.int64) * P
    chunk = tl.cdiv(tl.cdiv(total, BLOCK_Q), PARTS) * BLOCK_Q
    last = tl.minimum(part * chunk + chunk, total)
    real_c = channel < C
    c = channel[:, None]
    first = tl.zeros((BLOCK_C, BLOCK_Q), tl.float32)
    second = tl.zeros((BLOCK_C, BLOCK_Q), tl.float32)
    center = tl.zeros((BLOCK_C, 1), tl.float32)
    if CENTER:
        center = table_tile(center_ptr, task, c, C, T, c < C, CENTER == 2)
    for q in tl.range(part * chunk, last, BLOCK_Q):
        at = q + tl.arange(0, BLOCK_Q)
        valid = at < last
        position = start + tl.where(valid, at, part * chunk) // P
        row, _ = locate(position.to(tl.int32), ids_ptr, order_ptr, B, inner, rows_per_sample, MIXED)
        pixel = at % P
        real = real_c[:, None] & valid[None, :]
        if LAST:
            place = (row * P + pixel)[None, :] * C + c
        else:
            place = (row * C)[None, :] * P + c.to(tl.int64) * P + pixel[None, :]
        x = tl.load(x_ptr + place, mask=real, other=0.0).to(tl.float32)
        if WHAT == "sum":
            first += x
        elif WHAT == "variance":
            first += tl.where(real, (x - center) * (x - center), 0.0)
        else:
            u = affine(x, scale_ptr, shift_ptr, task, c, C, T, c < C, SCALE, SHIFT)
            dy = tl.load(dy_ptr + place, mask=real, other=0.0).to(tl.float32)
            du = activation_gradient(dy, u, ACTIVATION)
            first += du * (x - center)
            second += du
    into = (group.to(tl.int64) * PARTS + part) * C + channel
    tl.store(first_ptr + into, tl.sum(first, axis=1), mask=real_c)
    if WHAT == "gradients":
        tl.store(second_ptr + into, tl.sum(second, axis=1), mask=real_c)


@direct
@triton.jit(do_not_specialize=["N", "P", "T", "rows_per_sample"])
def sum_parts_kernel(
    out_ptr,
    partial_ptr,
    offsets_ptr,
    N,
    C,
    P,
    T,
    rows_per_sample,
    BLOCK_C: tl.constexpr,
    PARTS: tl.constexpr,
    MIXED: tl.constexpr,
    AVERAGE: tl.constexpr,
):
    """out[t, c] = Σ_s partial[g, s, c] in the order of s; AVERAGE: by the number of rows and pixels. Base is last."""
    blocks = tl.cdiv(C, BLOCK_C)
    channel = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    group = tl.program_id(0) // blocks
    total = tl.zeros((BLOCK_C,), tl.float32)
    for part in tl.static_range(PARTS):
        into = (group.to(tl.int64) * PARTS + part) * C + channel
        total += tl.load(partial_ptr + into, mask=channel < C, other=0.0)
    count = tl.cast(N, tl.int64)
    task = group
    if MIXED:
        start, stop = group_range(group, offsets_ptr, rows_per_sample)
        count = tl.cast(stop - start, tl.int64)
        task = tl.where(group == 0, T, group - 1)
    if AVERAGE:
        total = total / tl.maximum(count * P, 1).to(tl.float32)
    tl.store(out_ptr + task.to(tl.int64) * C + channel, total, mask=channel < C)
