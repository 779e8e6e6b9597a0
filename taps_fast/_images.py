"""Which images of a batch share one weight, read on the host, and how their rows of memory are taken and put.

Where reading would stall a device, `per_image` gives the coefficients of each image as data instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._problem import layout
from ._scratch import Scalar
from .tasks import Index, sample_of_row

Images = slice | Tensor | None
"""Which images: adjacent ones, int64 indices, or None for all."""


class Group(NamedTuple):
    """Images that share one weight, ``scale·base + Σ coeffs[k]·deltas[k]``."""

    images: Images
    task: int
    scale: Scalar
    coeffs: dict[int, Scalar]


def at_hand(x: Tensor) -> bool:
    """Whether values are read without waiting for a device."""
    return x.device.type == "cpu"


def groups(
    coeffs: Tensor, base_coeffs: Tensor | None, index: Index, inner: int, x: Tensor, *, join: bool
) -> list[Group]:
    """One group for each task present; with ``join``, one for each distinct weight, and never none at all."""
    ids, order, offsets = index
    if ids is None or order is None or offsets is None:
        scale = 1.0 if base_coeffs is None else base_coeffs[0]
        values: Sequence[Scalar] = coeffs.tolist() if at_hand(coeffs) else list(coeffs.unbind())
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
    every = order.tolist()
    return [
        Group(_of_samples(sorted(every[place] for place in where), inner), *weights[key])
        for key, where in found.items()
    ]


def _of_samples(samples: list[int], inner: int) -> Images:
    """The images of ascending samples; a slice where they are adjacent, which copies nothing."""
    if samples[-1] - samples[0] == len(samples) - 1:
        return slice(samples[0] * inner, (samples[-1] + 1) * inner)
    first = torch.tensor(samples)
    return first if inner == 1 else (first[:, None] * inner + torch.arange(inner)).flatten()


def numbers(images: Images, count: int) -> Sequence[int]:
    """Which of ``count`` images these are, on the host."""
    if images is None or isinstance(images, slice):
        return range(count) if images is None else range(*images.indices(count))
    found: list[int] = images.tolist()
    return found


def as_rows(x: Tensor) -> Tensor:
    """[N, elements] over x's memory, an image a row."""
    return (x if x.is_contiguous() else x.movedim(1, -1)).view(x.shape[0], -1)


def take(x: Tensor, images: Images) -> Tensor:
    if images is None:
        return x
    if isinstance(images, slice):
        return x[images]
    # Strides decide, dense or not, as they do for what a convolution of all images returns.
    last = x.stride(1) == 1 and x.shape[1] > 1
    x = x.contiguous(memory_format=torch.channels_last if last else layout(x))
    found = torch.index_select(as_rows(x), 0, images)
    if x.is_contiguous():
        return found.view(-1, *x.shape[1:])
    return found.view(-1, *x.shape[2:], x.shape[1]).movedim(-1, 1)


def put(y: Tensor, images: slice | Tensor, part: Tensor) -> None:
    if isinstance(images, slice):
        y[images] = part
    else:
        as_rows(y).index_copy_(0, images, as_rows(part.contiguous(memory_format=layout(y))))


def per_image(
    coeffs: Tensor, base_coeffs: Tensor | None, index: Index, inner: int, x: Tensor
) -> tuple[Scalar | Tensor, dict[int, tuple[Tensor, Tensor | None]]]:
    """What multiplies the base of each image, and for each delta its column [N] and the images that use it."""
    ids = index[0]
    if ids is None:
        scale = 1.0 if base_coeffs is None else base_coeffs[0].expand(x.shape[0])
        table = coeffs[None].expand(x.shape[0], -1)
    else:
        task = task_of_image(coeffs, ids, inner, x)
        ones = coeffs.new_ones(coeffs.shape[0]) if base_coeffs is None else base_coeffs
        scale = torch.cat([ones, coeffs.new_ones(1)])[task]
        table = torch.cat([coeffs, coeffs.new_zeros(1, coeffs.shape[1])])[task]
    columns: dict[int, tuple[Tensor, Tensor | None]] = {}
    for k, column in enumerate(table.unbind(1)):
        chosen = None
        if at_hand(x):
            chosen = column.nonzero().squeeze(1)
            if chosen.numel() == 0:
                continue
        columns[k] = (column, chosen)
    return scale, columns


def task_of_image(coeffs: Tensor, ids: Tensor | None, inner: int, x: Tensor) -> Tensor:
    """int64 [N]: each image's row of a [T + 1, …] table, the base's being the last."""
    if ids is None or ids.shape[0] == 0:
        return torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    sample = sample_of_row(x.shape[0], ids.shape[0], inner, x.device)
    return torch.remainder(ids[sample], coeffs.shape[0] + 1)
