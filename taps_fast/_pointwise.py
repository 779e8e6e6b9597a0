"""The pointwise operators, their sums and depthwise convolutions in plain PyTorch, where no kernel is registered.

Formulas in `taps_fast._ops`. Sums by task are products with the one-hot membership of rows, so that their order is
fixed on every device. Nothing is read on the host.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .tasks import sample_of_row, sums_by_group

Groups = tuple[Tensor | None, Tensor | None, Tensor | None, int]


def depthwise(
    x: Tensor,
    weight: Tensor,
    table: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    images, channels = x.shape[0], x.shape[3]
    # The batch as the groups of one convolution, [1, N·C, H, W].
    filters = weight[table].transpose(1, 2).reshape(images * channels, 1, *kernel)
    planes = x.to(weight.dtype).movedim(-1, 1).reshape(1, images * channels, *x.shape[1:3])
    y = F.conv2d(planes, filters, None, stride, padding, dilation, images * channels)
    return y.view(images, channels, *y.shape[2:]).movedim(1, -1).to(x.dtype).contiguous()


def scale_shift(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    ids: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    inner: int,
    activation: str,
) -> Tensor:
    y = _activate(_affine(x, scale, shift, ids, inner), activation).to(x.dtype)
    return _like(y, x)


def scale_shift_(x: Tensor, *args: object) -> None:
    x.copy_(scale_shift(x, *args))  # type: ignore[arg-type]


def scale_shift_dx(
    dy: Tensor,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    slope: Tensor | None,
    offset: Tensor | None,
    ids: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    inner: int,
    activation: str,
) -> Tensor:
    dx = _du(dy, x, scale, shift, ids, inner, activation)
    if scale is not None:
        dx = dx * _rows(scale, x, ids, inner)
    if slope is not None or offset is not None:
        dx = dx + (_affine(x, slope, offset, ids, inner) if slope is not None else _rows(offset, x, ids, inner))
    return _like(dx.to(x.dtype), x)


def scale_shift_sums(
    dy: Tensor,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    center: Tensor | None,
    ids: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    inner: int,
    activation: str,
) -> tuple[Tensor, Tensor]:
    du = _du(dy, x, scale, shift, ids, inner, activation)
    member = _member(x, ids, offsets, inner, du.dtype)
    centered = x if center is None else x - _rows(center, x, ids, inner)
    return sums_by_group(member, _over_pixels(du * centered)), sums_by_group(member, _over_pixels(du))


def moments(
    x: Tensor, ids: Tensor | None, order: Tensor | None, offsets: Tensor | None, inner: int
) -> tuple[Tensor, Tensor]:
    wide = x.to(_wide(x))
    member = _member(x, ids, offsets, inner, wide.dtype)
    count = (member.sum(1) * math.prod(x.shape[2:])).clamp(min=1)[:, None]
    mean = sums_by_group(member, _over_pixels(wide)) / count
    centered = wide - _rows(mean, x, ids, inner)
    return mean, sums_by_group(member, _over_pixels(centered.square())) / count


def _affine(x: Tensor, scale: Tensor | None, shift: Tensor | None, ids: Tensor | None, inner: int) -> Tensor:
    """scale·x + shift in the tables' dtype."""
    wide = x.to(_wide(x))
    if scale is None:
        return wide if shift is None else wide + _rows(shift, x, ids, inner)
    factor = _rows(scale, x, ids, inner)
    return wide * factor if shift is None else torch.addcmul(_rows(shift, x, ids, inner), wide, factor)


def _activate(u: Tensor, activation: str) -> Tensor:
    return u if activation == "none" else getattr(F, activation)(u)


def _du(
    dy: Tensor, x: Tensor, scale: Tensor | None, shift: Tensor | None, ids: Tensor | None, inner: int, activation: str
) -> Tensor:
    """dy times the activation's derivative at u."""
    dy = dy.to(_wide(x))
    if activation == "none":
        return dy
    u = _affine(x, scale, shift, ids, inner)
    if activation == "relu":
        return torch.where(u <= 0, 0, dy)
    if activation == "relu6":
        return torch.where((u <= 0) | (u >= 6), 0, dy)
    backward = torch.ops.aten.silu_backward if activation == "silu" else torch.ops.aten.gelu_backward
    found: Tensor = backward(dy, u)
    return found


def _rows(table: Tensor | None, x: Tensor, ids: Tensor | None, inner: int) -> Tensor:
    """A table's entry for each row and channel of x, ready to broadcast over its pixels."""
    assert table is not None
    if table.dim() == 2:
        table = table[_row(x, ids, inner, table.shape[0])]
    return table.view(*table.shape, *(1,) * (x.dim() - 2))


def _row(x: Tensor, ids: Tensor | None, inner: int, rows: int) -> Tensor:
    """int64 [N]: each row's place in a [T + 1, …] table, the base's being the last."""
    if ids is None or ids.shape[0] == 0:
        return torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    return torch.remainder(ids[sample_of_row(x.shape[0], ids.shape[0], inner, x.device)], rows)


def _member(x: Tensor, ids: Tensor | None, offsets: Tensor | None, inner: int, dtype: torch.dtype) -> Tensor:
    """[T + 1, N]: 1 where the row belongs to the task."""
    rows = 1 if offsets is None else offsets.shape[0] - 1
    return (torch.arange(rows, device=x.device)[:, None] == _row(x, ids, inner, rows)).to(dtype)


def _over_pixels(x: Tensor) -> Tensor:
    return x.flatten(2).sum(2) if x.dim() > 2 else x


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _like(y: Tensor, x: Tensor) -> Tensor:
    """y in x's layout; contiguous where x is neither contiguous nor channels last."""
    if not x.is_contiguous() and x.movedim(1, -1).is_contiguous():
        return y.movedim(1, -1).contiguous().movedim(-1, 1)
    return y.contiguous()
