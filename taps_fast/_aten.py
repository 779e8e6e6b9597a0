"""Convolutions by the vendor library, images grouped by the weight they need.

* ``merge``: each distinct weight is summed (in float32, rounded once) and convolved with its images. Tasks
  without an open delta share the base, so their images run as one convolution. A baked task's delta is its weight
  and is summed with nothing. On a CPU sums go into one buffer a thread, as large as the largest layer.
* ``split``: the base for all images, then each delta for the images that use it, summed in float32.

Which images share a weight is read on the host. On a CPU that is free; on another device it would stall the
stream, so there one weight serves the whole batch as is, and a mixed batch takes coefficients as data: one
convolution of all images for the base and for each delta.

Both forward and dx are linear in the images and in the weight, so one function serves them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _scratch
from ._problem import layout
from ._scratch import Scalar
from .tasks import BASE, Index, sample_of_row

Conv = tuple[list[int], list[int], list[int], int]
Images = slice | Tensor | None
"""Which images: adjacent ones, int64 indices, or None for all."""


class Group(NamedTuple):
    """Images that share one weight, ``scale·base + Σ coeffs[k]·deltas[k]``."""

    images: Images
    task: int
    scale: Scalar
    coeffs: dict[int, Scalar]


def conv2d_fwd(
    x: Tensor,
    base: Tensor,
    deltas: Sequence[Tensor],
    coeffs: Tensor,
    base_coeffs: Tensor | None,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    ids: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    inner: int,
    algorithm: str,
) -> Tensor:
    shared = bias if bias is not None and bias.dim() == 1 else None

    def convolve(images: Tensor, weight: Tensor) -> Tensor:
        # The split sum is formed in float32, its bias added once.
        return F.conv2d(images, weight, shared if merged else None, stride, padding, dilation, groups)

    index = (ids, order, offsets)
    merged = algorithm != "split" and not _data_driven(x, index)
    y = None
    if algorithm == "depthwise":
        parts = _groups(coeffs, base_coeffs, index, inner, x, join=True)
        if parts[0].images is None:  # one weight serves all, which the vendor does as well
            y = convolve(x, _summed(base, deltas, parts[0], coeffs.dtype))
        else:
            y = _depthwise(x, base, deltas, coeffs.dtype, parts, (stride, padding, dilation))
            merged = False
    if y is None:
        y = _apply(convolve, x, base, deltas, coeffs, base_coeffs, index, inner, merged)
    if bias is None or (merged and bias.dim() == 1):
        return y.to(x.dtype)
    tables = index if bias.dim() == 2 else (None, None, None)
    torch.ops.taps_fast.scale_shift_(y, None, bias.to(coeffs.dtype), *tables, inner, "none")
    return y.to(x.dtype)


def conv2d_dx(
    dy: Tensor,
    x: Tensor,
    base: Tensor,
    deltas: Sequence[Tensor],
    coeffs: Tensor,
    base_coeffs: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    ids: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    inner: int,
    algorithm: str,
) -> Tensor:
    conv = (stride, padding, dilation, groups)

    def back(d: Tensor, weight: Tensor) -> Tensor:
        like = x[: d.shape[0]]  # only its shape and layout count
        return _gradient(d, like if like.dtype == d.dtype else torch.empty_like(like, dtype=d.dtype), weight, conv, 0)

    index = (ids, order, offsets)
    merged = algorithm != "split" and not _data_driven(dy, index)
    return _apply(back, dy, base, deltas, coeffs, base_coeffs, index, inner, merged).to(dy.dtype)


def _gradient(dy: Tensor, x: Tensor, weight: Tensor, conv: Conv, which: int) -> Tensor:
    """The gradient of a convolution's images (``which`` = 0) or weight (1)."""
    stride, padding, dilation, groups = conv
    mask = [which == 0, which == 1, False]
    found: Tensor = torch.ops.aten.convolution_backward(
        dy, x, weight, None, stride, padding, dilation, False, [0, 0], groups, mask
    )[which]
    return found


def _depthwise(
    x: Tensor,
    base: Tensor,
    deltas: Sequence[Tensor],
    wide: torch.dtype,
    parts: list[Group],
    conv: tuple[list[int], ...],
) -> Tensor:
    """Every image with its own small weight in one pass: nothing is gathered."""
    table = torch.empty(x.shape[0], dtype=torch.int64)
    weights = base.new_empty(len(parts), base[0].numel(), base.shape[0], dtype=wide)
    # One delta each, as in TAPS, is summed for all tasks at once; it is small, so calls cost more than the sums.
    parts = sorted(parts, key=lambda group: len(group.coeffs) != 1)
    single = [group for group in parts if len(group.coeffs) == 1]
    if single:
        chosen, by = zip(*(next(iter(group.coeffs.items())) for group in single), strict=True)
        column = torch.tensor([by, [group.scale for group in single]], dtype=wide)[:, :, None, None]
        filters = torch.stack([deltas[k] for k in chosen]).flatten(2).to(wide).mul_(column[0])
        filters.addcmul_(base.flatten(1).to(wide)[None], column[1])
        weights[: len(single)] = filters.transpose(1, 2)
    for place, group in enumerate(parts):
        table[group.images] = place
        if place >= len(single):
            weights[place] = _summed(base.to(wide), deltas, group, wide).flatten(1).t()
    y: Tensor = torch.ops.taps_fast.depthwise(x.movedim(1, -1).contiguous(), weights, table, base.shape[2:], *conv)
    return y.movedim(-1, 1)


def _apply(
    product: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    base: Tensor,
    deltas: Sequence[Tensor],
    coeffs: Tensor,
    base_coeffs: Tensor | None,
    index: Index,
    inner: int,
    merged: bool,
) -> Tensor:
    """product(images, their weight) for all images; of split sums, in the coefficients' dtype."""
    if merged:
        parts = _groups(coeffs, base_coeffs, index, inner, x, join=True)
        y: Tensor | None = None
        for group in parts:
            part = product(_take(x, group.images), _summed(base, deltas, group, coeffs.dtype))
            if group.images is None:
                return part
            if y is None:
                size, as_part = (x.shape[0], *part.shape[1:]), layout(part)
                y = torch.empty(size, dtype=part.dtype, device=x.device, memory_format=as_part)
            _put(y, group.images, part)
        assert y is not None  # there is always a group
        return y
    wide = x.to(coeffs.dtype)
    scale, columns = _per_image(coeffs, base_coeffs, index, inner, x)
    y = _times(product(wide, base.to(wide.dtype)), scale)
    as_base = layout(y)
    for k, (column, chosen) in columns.items():
        part = _times(product(_pick(wide, chosen), deltas[k].to(wide.dtype)), _pick(column, chosen))
        y = y + part if chosen is None else y.index_add(0, chosen, part)
    return y.contiguous(memory_format=as_base)


def conv2d_dw(
    dy: Tensor,
    x: Tensor,
    base: Tensor,
    deltas: Sequence[Tensor],
    coeffs: Tensor,
    base_coeffs: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    ids: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    inner: int,
    pairs: list[int],
    ddeltas_for: list[int],
    need_dcoeffs: bool,
    need_dbase: bool,
) -> tuple[Tensor, list[Tensor], Tensor]:
    conv, index = (stride, padding, dilation, groups), (ids, order, offsets)
    wide = coeffs.dtype
    dcoeffs = coeffs.new_zeros(coeffs.shape if need_dcoeffs else (0,))
    like = base if base.dtype == wide else torch.empty_like(base, dtype=wide)  # only its shape and layout count
    sums: dict[int, Tensor] = {}
    wanted = [*ddeltas_for, *([BASE] if need_dbase else [])]

    def weight_gradient(images: Tensor, d: Tensor) -> Tensor:
        return _gradient(d.to(wide), images.to(wide), like, conv, 1)

    def add(k: int, p: Tensor, by: Scalar, owned: bool = True) -> None:
        """sums[k] += by·p; p may become the sum if nobody else needs it."""
        if k in sums:
            sums[k].add_(p, alpha=by) if isinstance(by, float) else sums[k].addcmul_(p, by)
        elif isinstance(by, float) and by == 1.0:
            sums[k] = p if owned else p.clone()
        else:
            sums[k] = p.mul_(by) if owned else p * by

    if _data_driven(x, index):
        scale, columns = _per_image(coeffs, base_coeffs, index, inner, x)
        for k, (column, _) in columns.items():
            if k in wanted:
                add(k, weight_gradient(x, _times(dy.to(wide), column)), 1.0)
            if need_dcoeffs:
                along = (F.conv2d(x, deltas[k], None, *conv).to(wide) * dy.to(wide)).sum((1, 2, 3))  # [N]
                member = (
                    _task_of_image(coeffs, ids, inner, x)[None]
                    == torch.arange(coeffs.shape[0], device=x.device)[:, None]
                )
                dcoeffs[:, k] = member.to(wide) @ along
        if need_dbase:
            add(BASE, weight_gradient(x, _times(dy.to(wide), scale)), 1.0)
    else:
        count = len(deltas)
        asked = set(pairs)
        for g in _groups(coeffs, base_coeffs, index, inner, x, join=False):
            of_task = [k for k in range(count) if not asked or g.task * count + k in asked]
            dots = of_task if need_dcoeffs and g.task >= 0 else []
            users = {k: by for k, by in {**g.coeffs, BASE: g.scale}.items() if k in wanted}
            if not (dots or users):
                continue
            p = weight_gradient(_take(x, g.images), _take(dy, g.images))
            for k in dots:
                dcoeffs.view(-1)[g.task * count + k] = _dot(p, deltas[k])
            for k, by in users.items():
                add(k, p, by, owned=len(users) == 1)
    found = [sums[k].to(base.dtype) if k in sums else torch.zeros_like(base) for k in wanted]
    found = [gradient.contiguous(memory_format=layout(base)) for gradient in found]
    return dcoeffs, found[: len(ddeltas_for)], found[-1] if need_dbase else base.new_zeros(0)


def _dot(p: Tensor, delta: Tensor) -> Tensor:
    delta = delta.to(p.dtype).contiguous(memory_format=layout(p))
    return torch.dot(_as_rows(p).flatten(), _as_rows(delta).flatten())


def _data_driven(x: Tensor, index: Index) -> bool:
    """Whether grouping on the host would stall a device."""
    return index[0] is not None and x.device.type != "cpu"


def _groups(
    coeffs: Tensor, base_coeffs: Tensor | None, index: Index, inner: int, x: Tensor, *, join: bool
) -> list[Group]:
    """One group for each task present; with ``join``, one for each distinct weight, and never none at all."""
    ids, order, offsets = index
    if ids is None or order is None or offsets is None:
        scale = 1.0 if base_coeffs is None else base_coeffs[0]
        values: Sequence[Scalar] = coeffs.tolist() if coeffs.device.type == "cpu" else list(coeffs.unbind())
        used = {k: c for k, c in enumerate(values) if isinstance(c, Tensor) or c != 0.0}
        return [Group(None, 0, scale, used)]
    edges, table = offsets.tolist(), coeffs.tolist()
    scales = [1.0] * len(table) if base_coeffs is None else base_coeffs.tolist()
    found: dict[tuple[object, ...], list[int]] = {}
    weights: dict[tuple[object, ...], tuple[int, float, dict[int, Scalar]]] = {}
    for task in range(-1, len(edges) - 2):
        start, stop = edges[task + 1], edges[task + 2]
        if start == stop:
            continue
        used = {} if task < 0 else {k: c for k, c in enumerate(table[task]) if c != 0.0}
        scale = 1.0 if task < 0 else scales[task]
        key: tuple[object, ...] = (scale, *used.items()) if join else (task,)
        found.setdefault(key, []).extend(range(start, stop))
        weights[key] = (task, scale, used)
    if len(found) <= 1 and join:
        task, scale, used = next(iter(weights.values()), (-1, 1.0, {}))
        return [Group(None, task, scale, used)]
    return [Group(_images(order, where, inner), *weights[key]) for key, where in found.items()]


def _images(order: Tensor, where: list[int], inner: int) -> Images:
    """The images of samples at these places of the order; a slice where they are adjacent, which copies nothing."""
    every = order.tolist()
    samples = sorted(every[place] for place in where)
    if samples[-1] - samples[0] == len(samples) - 1:
        return slice(samples[0] * inner, (samples[-1] + 1) * inner)
    return (torch.tensor(samples)[:, None] * inner + torch.arange(inner)).flatten()


def _as_rows(x: Tensor) -> Tensor:
    """[N, elements] over x's memory, an image a row."""
    return (x if x.is_contiguous() else x.movedim(1, -1)).view(x.shape[0], -1)


def _take(x: Tensor, images: Images) -> Tensor:
    if images is None:
        return x
    if isinstance(images, slice):
        return x[images]
    x = x.contiguous(memory_format=layout(x))
    found = torch.index_select(_as_rows(x), 0, images)
    if x.is_contiguous():
        return found.view(-1, *x.shape[1:])
    return found.view(-1, *x.shape[2:], x.shape[1]).movedim(-1, 1)


def _put(y: Tensor, images: slice | Tensor, part: Tensor) -> None:
    if isinstance(images, slice):
        y[images] = part
    else:
        _as_rows(y).index_copy_(0, images, _as_rows(part.contiguous(memory_format=layout(y))))


def _summed(base: Tensor, deltas: Sequence[Tensor], group: Group, wide: torch.dtype) -> Tensor:
    """The group's weight."""
    return _scratch.merged(base, group.scale, [(deltas[k], c) for k, c in group.coeffs.items()], wide)


def _per_image(
    coeffs: Tensor, base_coeffs: Tensor | None, index: Index, inner: int, x: Tensor
) -> tuple[Scalar | Tensor, dict[int, tuple[Tensor, Tensor | None]]]:
    """What multiplies the base of each image, and for each delta its column [N] and the images that use it."""
    ids = index[0]
    if ids is None:
        scale = 1.0 if base_coeffs is None else base_coeffs[0].expand(x.shape[0])
        table = coeffs[None].expand(x.shape[0], -1)
    else:
        task = _task_of_image(coeffs, ids, inner, x)
        ones = coeffs.new_ones(coeffs.shape[0]) if base_coeffs is None else base_coeffs
        scale = torch.cat([ones, coeffs.new_ones(1)])[task]
        table = torch.cat([coeffs, coeffs.new_zeros(1, coeffs.shape[1])])[task]
    columns: dict[int, tuple[Tensor, Tensor | None]] = {}
    for k, column in enumerate(table.unbind(1)):
        chosen = None
        if x.device.type == "cpu":
            chosen = column.nonzero().squeeze(1)
            if chosen.numel() == 0:
                continue
        columns[k] = (column, chosen)
    return scale, columns


def _task_of_image(coeffs: Tensor, ids: Tensor | None, inner: int, x: Tensor) -> Tensor:
    """int64 [N]: each image's row of a [T + 1, …] table, the base's being the last."""
    if ids is None or ids.shape[0] == 0:
        return torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    sample = sample_of_row(x.shape[0], ids.shape[0], inner, x.device)
    return torch.remainder(ids[sample], coeffs.shape[0] + 1)


def _pick(x: Tensor, chosen: Tensor | None) -> Tensor:
    return x if chosen is None else x[chosen]


def _times(x: Tensor, scale: Scalar) -> Tensor:
    """x [N, …] times a number or one number an image."""
    if isinstance(scale, Tensor):
        return x * scale.view(-1, *(1,) * (x.dim() - 1))
    return x if scale == 1.0 else x * scale
