"""Convolutions by the vendor library, images grouped by the weight they need.

* ``merge``: each distinct weight is summed (in float32, rounded once) and convolved with its images. Tasks
  without an open delta share the base, so their images run as one convolution.
* ``split``: the base for all images, then each delta for the images that use it, summed in float32.

Which images share a weight is read on the host. On a CPU that is free; on another device it would stall the
stream, so there one weight serves the whole batch as is, and a mixed batch takes coefficients as data: one
convolution of all images for the base and for each delta.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import grad

from .tasks import Index, sample_of_row

Scalar = float | Tensor
Conv = tuple[list[int], list[int], list[int], int]


class Group(NamedTuple):
    """Images that share one weight, ``scale·base + Σ coeffs[k]·deltas[k]``."""

    images: Tensor | None
    """int64 indices, or None for all."""
    task: int
    scale: Scalar
    coeffs: dict[int, Scalar]

    def take(self, x: Tensor) -> Tensor:
        return x if self.images is None else x[self.images]


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
    conv, index = (stride, padding, dilation, groups), (ids, order, offsets)
    shared = bias if bias is not None and bias.dim() == 1 else None
    if algorithm == "merge" and not _data_driven(x, index):
        parts = _groups(coeffs, base_coeffs, index, inner, x, join=True)
        outputs = [F.conv2d(g.take(x), _merged(base, deltas, g, coeffs.dtype), shared, *conv) for g in parts]
        y = _scatter(parts, outputs, x.shape[0])
    else:
        wide = x.to(coeffs.dtype)
        scale, columns = _per_image(coeffs, base_coeffs, index, inner, x)
        y = _times(F.conv2d(wide, base.to(wide.dtype), None, *conv), scale)
        layout = _layout(y)
        for k, (column, chosen) in columns.items():
            part = _times(F.conv2d(_pick(wide, chosen), deltas[k].to(wide.dtype), None, *conv), _pick(column, chosen))
            y = y + part if chosen is None else y.index_add(0, chosen, part)
        y = (y if shared is None else y + shared.to(y.dtype)[:, None, None]).to(x.dtype)
        y = y.contiguous(memory_format=layout)
    if bias is not None and bias.dim() == 2:
        y = y + bias[_task_of_image(coeffs, ids, inner, x)][:, :, None, None]
    return y


def conv2d_dx(
    dy: Tensor,
    base: Tensor,
    deltas: Sequence[Tensor],
    coeffs: Tensor,
    base_coeffs: Tensor | None,
    size: list[int],
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
    conv, index = (stride, padding, dilation, groups), (ids, order, offsets)
    channels = base.shape[1] * groups

    def back(d: Tensor, weight: Tensor) -> Tensor:
        dx: Tensor = grad.conv2d_input((d.shape[0], channels, *size), weight, d, *conv)  # type: ignore[no-untyped-call]
        return dx

    if algorithm == "merge" and not _data_driven(dy, index):
        parts = _groups(coeffs, base_coeffs, index, inner, dy, join=True)
        outputs = [back(g.take(dy), _merged(base, deltas, g, coeffs.dtype)) for g in parts]
        return _scatter(parts, outputs, dy.shape[0])
    wide = dy.to(coeffs.dtype)
    scale, columns = _per_image(coeffs, base_coeffs, index, inner, dy)
    dx = back(_times(wide, scale), base.to(wide.dtype))
    layout = _layout(dx)
    for k, (column, chosen) in columns.items():
        part = back(_times(_pick(wide, chosen), _pick(column, chosen)), deltas[k].to(wide.dtype))
        dx = dx + part if chosen is None else dx.index_add(0, chosen, part)
    return dx.to(dy.dtype).contiguous(memory_format=layout)


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
    ddeltas = {k: torch.zeros_like(base, dtype=wide, memory_format=torch.contiguous_format) for k in ddeltas_for}
    dbase = base.new_zeros(base.shape if need_dbase else (0,), dtype=wide)

    def weight_gradient(images: Tensor, d: Tensor) -> Tensor:
        p: Tensor = grad.conv2d_weight(images.to(wide), list(base.shape), d.to(wide), *conv)  # type: ignore[no-untyped-call]
        return p

    if _data_driven(x, index):
        scale, columns = _per_image(coeffs, base_coeffs, index, inner, x)
        for k, (column, _) in columns.items():
            if k in ddeltas:
                ddeltas[k] += weight_gradient(x, _times(dy.to(wide), column))
            if need_dcoeffs:
                along = (F.conv2d(x, deltas[k], None, *conv).to(wide) * dy.to(wide)).sum((1, 2, 3))  # [N]
                member = (
                    _task_of_image(coeffs, ids, inner, x)[None]
                    == torch.arange(coeffs.shape[0], device=x.device)[:, None]
                )
                dcoeffs[:, k] = member.to(wide) @ along
        if need_dbase:
            dbase += weight_gradient(x, _times(dy.to(wide), scale))
    else:
        count = len(deltas)
        wanted = set(pairs)
        for g in _groups(coeffs, base_coeffs, index, inner, x, join=False):
            of_task = [k for k in range(count) if not wanted or g.task * count + k in wanted]
            dots = of_task if need_dcoeffs and g.task >= 0 else []
            if not (dots or need_dbase or ddeltas.keys() & g.coeffs.keys()):
                continue
            p = weight_gradient(g.take(x), g.take(dy))
            for k in dots:
                dcoeffs.view(-1)[g.task * count + k] = torch.dot(p.flatten(), deltas[k].to(wide).flatten())
            for k in ddeltas.keys() & g.coeffs.keys():
                ddeltas[k] += g.coeffs[k] * p
            if need_dbase:
                dbase += g.scale * p
    return dcoeffs, [ddeltas[k].to(base.dtype) for k in ddeltas_for], dbase.to(base.dtype)


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
    edges = offsets.tolist()
    found: dict[tuple[object, ...], list[int]] = {}
    weights: dict[tuple[object, ...], tuple[int, float, dict[int, Scalar]]] = {}
    for task in range(-1, len(edges) - 2):
        start, stop = edges[task + 1], edges[task + 2]
        if start == stop:
            continue
        row = [] if task < 0 else coeffs[task].tolist()
        used = {k: c for k, c in enumerate(row) if c != 0.0}
        scale = 1.0 if task < 0 or base_coeffs is None else float(base_coeffs[task])
        key: tuple[object, ...] = (scale, *used.items()) if join else (task,)
        found.setdefault(key, []).extend(range(start, stop))
        weights[key] = (task, scale, used)
    if len(found) <= 1 and join:
        task, scale, used = next(iter(weights.values()), (-1, 1.0, {}))
        return [Group(None, task, scale, used)]
    within = torch.arange(inner)
    return [
        Group((order[torch.tensor(where)][:, None] * inner + within).flatten(), *weights[key])
        for key, where in found.items()
    ]


def _merged(base: Tensor, deltas: Sequence[Tensor], group: Group, wide: torch.dtype) -> Tensor:
    """The group's weight, summed in ``wide`` and rounded once to the base's dtype."""
    if not group.coeffs and isinstance(group.scale, float) and group.scale == 1.0:
        return base
    total = base.to(wide) * group.scale
    for k, c in group.coeffs.items():
        total += deltas[k].to(wide) * c
    return total.to(base.dtype)


def _scatter(groups: list[Group], outputs: list[Tensor], images: int) -> Tensor:
    first = outputs[0]
    if groups[0].images is None:
        return first
    shape, layout = (images, *first.shape[1:]), _layout(first)
    y = torch.empty(shape, dtype=first.dtype, device=first.device, memory_format=layout)
    for group, output in zip(groups, outputs, strict=True):
        y[group.images] = output
    return y


def _layout(x: Tensor) -> torch.memory_format:
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


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
