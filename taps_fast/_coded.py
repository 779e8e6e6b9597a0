"""coded_fwd and coded_dx in plain PyTorch, where no kernel is registered: each delta's codes as a matrix in turn.

A task's rows are told by a mask on the device, so nothing is read on the host.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .formats import unpack_bits
from .tasks import sample_of_row


def coded_fwd(
    y: Tensor,
    x: Tensor,
    codes: list[Tensor],
    tile: Tensor | None,
    factors: Tensor,
    which: list[int],
    ids: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    inner: int,
    format: str,
) -> Tensor:
    wide = factors.dtype
    total = y.to(wide)
    for weight, per_row in _uses(codes, tile, factors, which, ids, inner, format, x.shape):
        total = total + per_row * F.linear(x.to(wide), weight)
    return total.to(y.dtype, copy=True)


def coded_dx(
    dy: Tensor,
    codes: list[Tensor],
    tile: Tensor | None,
    factors: Tensor,
    which: list[int],
    ids: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    inner: int,
    format: str,
    in_features: int,
) -> Tensor:
    wide = factors.dtype
    shape = torch.Size((dy.shape[0], in_features))
    dx = dy.new_zeros(shape, dtype=wide)
    for weight, per_row in _uses(codes, tile, factors, which, ids, inner, format, shape):
        dx = dx + (per_row * dy.to(wide)) @ weight
    return dx.to(dy.dtype)


def _uses(
    codes: list[Tensor],
    tile: Tensor | None,
    factors: Tensor,
    which: list[int],
    ids: Tensor | None,
    inner: int,
    format: str,
    shape: torch.Size,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Each decoded matrix [O, I], and what multiplies its product in each row, [M, O]: 0 in other tasks' rows."""
    nothing = factors.new_zeros(factors.shape[1])
    task = torch.zeros(shape[0], dtype=torch.int64, device=factors.device)
    if ids is not None and shape[0]:
        task = torch.remainder(ids[sample_of_row(shape[0], ids.shape[0], inner, ids.device)], len(which) + 1)
    for k in sorted({k for k in which if k >= 0}):
        weight = decoded(codes[k], tile, format, shape[1]).to(factors.dtype)
        rows = [own if w == k else nothing for own, w in zip(factors.unbind(), which, strict=True)]
        yield weight, torch.stack([*rows, nothing])[task]


def decoded(codes: Tensor, tile: Tensor | None, format: str, in_features: int) -> Tensor:
    """D [O, I] of `taps_fast._ops`."""
    if format == "int8":
        return codes
    bits = unpack_bits(codes, (codes.shape[0], in_features))
    return torch.where(bits, 1, -1) if tile is None else torch.where(bits, tile, 0)
