"""Convolutions by the vendor library, images grouped by the weight they need.

* ``merge``: each distinct weight is summed (in float32, rounded once) and convolved with its images. Tasks
  without an open delta share the base, so their images run as one convolution. A baked task's delta is its weight
  and is summed with nothing. On a CPU sums go into one buffer a thread, as large as the largest layer.
  Depthwise weights are small: each image takes its own, and the batch is the groups of one convolution.
  With the C++ extension `csrc/conv2d_ops.cpp` and `csrc/conv2d_grad_ops.cpp` do this, and hand other layouts and
  depthwise mixes to here.
* ``split``: the base for all images, then each delta for the images that use it, summed in float32.

Which images share a weight is read on the host. On a CPU that is free; on another device it would stall the
stream, so there one weight serves the whole batch as is, and a mixed batch takes coefficients as data: one
convolution of all images for the base and for each delta.

Both forward and dx are linear in the images and in the weight, so one function serves them.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _images, _scratch
from ._problem import layout
from ._scratch import Scalar
from .tasks import BASE, Index, sums_by_group

Conv = tuple[list[int], list[int], list[int], int]


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
    algorithm: str = "merge",
) -> Tensor:
    shared = bias if bias is not None and bias.dim() == 1 else None

    def convolve(images: Tensor, weight: Tensor, times: int = 1) -> Tensor:
        # The split sum is formed in float32, its bias added once.
        added = shared.repeat(times) if merged and shared is not None else None
        return F.conv2d(images, weight, added, stride, padding, dilation, groups * times)

    index = (ids, order, offsets)
    merged = algorithm != "split" and not _data_driven(x, index)
    y = None
    if algorithm == "depthwise":
        parts = _images.groups(coeffs, base_coeffs, index, inner, x, join=True)
        if parts[0].images is None:  # one weight serves all, which the vendor does as well
            y = convolve(x, _summed(base, deltas, parts[0], coeffs.dtype))
        else:
            y = _depthwise(x, base, deltas, coeffs.dtype, parts, (stride, padding, dilation))
            merged = False
    if y is None:
        joined = _as_groups(base, groups, x)
        y = _apply(convolve, x, base, deltas, coeffs, base_coeffs, index, inner, merged, joined)
    if bias is None or (merged and bias.dim() == 1):
        return y.to(x.dtype)
    tables = index if bias.dim() == 2 else (None, None, None)
    torch.ops.taps_fast.scale_shift_(y, None, bias.to(coeffs.dtype), *tables, inner, "none")
    return y.to(x.dtype)


conv2d_merge = conv2d_fwd


def conv2d_grad(
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
    split: bool,
    need_dx: bool,
    pairs: list[int],
    ddeltas_for: list[int],
    need_dcoeffs: bool,
    need_dbase: bool,
) -> tuple[Tensor, list[Tensor], Tensor]:
    weight, conv = (base, deltas, coeffs, base_coeffs), (stride, padding, dilation, groups)
    index = (ids, order, offsets)
    dx = p = None
    if ids is None and (need_dcoeffs or need_dbase or ddeltas_for):
        own = gradient_dtype(x)
        at_once = need_dx and not split and x.dtype == own
        (group,) = _images.groups(coeffs, base_coeffs, index, inner, x, join=True)
        summed = _summed(base, deltas, group, coeffs.dtype) if at_once else base.to(own)  # whose shape counts
        found, p = _gradients(dy.to(own), x.to(own), summed, conv, at_once, True)
        dx = found if at_once else None
    if need_dx and dx is None:
        dx = _dx(dy, x, *weight, conv, index, inner, split)
    sums = _dw(dy, x, *weight, conv, index, inner, p, pairs, ddeltas_for, need_dcoeffs, need_dbase)
    return x.new_empty(0) if dx is None else dx, *sums


def gradient_dtype(x: Tensor) -> torch.dtype:
    """What P of one weight is computed in: on a GPU as PyTorch does, whose fast units compute in 16 bits."""
    return x.dtype if x.device.type == "cuda" else torch.promote_types(x.dtype, torch.float32)


def _dx(
    dy: Tensor,
    x: Tensor,
    base: Tensor,
    deltas: Sequence[Tensor],
    coeffs: Tensor,
    base_coeffs: Tensor | None,
    conv: Conv,
    index: Index,
    inner: int,
    split: bool,
) -> Tensor:
    def back(d: Tensor, weight: Tensor, times: int = 1) -> Tensor:
        like = x[: d.shape[0] * times]  # only its shape and layout count
        like = like if like.dtype == d.dtype else torch.empty_like(like, dtype=d.dtype)
        if times > 1:
            like = _side_by_side(like)
        return _gradients(d, like, weight, (*conv[:3], conv[3] * times), True, False)[0]

    merged = not split and not _data_driven(dy, index)
    joined = _as_groups(base, conv[3], x, dy)
    return _apply(back, dy, base, deltas, coeffs, base_coeffs, index, inner, merged, joined).to(dy.dtype)


def _gradients(dy: Tensor, x: Tensor, weight: Tensor, conv: Conv, need_dx: bool, need_p: bool) -> tuple[Tensor, Tensor]:
    """The gradients of a convolution's images and weight; undefined where not needed."""
    stride, padding, dilation, groups = conv
    how = (None, stride, padding, dilation, False, [0, 0], groups, [need_dx, need_p, False])
    dx, p, _ = torch.ops.aten.convolution_backward(dy, x, weight, *how)
    return dx, p


def _depthwise(
    x: Tensor,
    base: Tensor,
    deltas: Sequence[Tensor],
    wide: torch.dtype,
    parts: list[_images.Group],
    conv: tuple[list[int], ...],
) -> Tensor:
    """Every image with its own small weight in one pass: nothing is gathered."""
    weights, table = _small_weights(x, base, deltas, wide, parts)
    channels_last = weights.flatten(2).transpose(1, 2).contiguous()  # [parts, taps, C]
    pixels = x.movedim(1, -1).contiguous()
    y: Tensor = torch.ops.taps_fast.depthwise(pixels, channels_last, table, base.shape[2:], *conv)
    return y.movedim(-1, 1)


def _small_weights(
    x: Tensor, base: Tensor, deltas: Sequence[Tensor], wide: torch.dtype, parts: list[_images.Group]
) -> tuple[Tensor, Tensor]:
    """The weights of all parts, [parts, *base.shape] in ``wide``, and which of them each image has, int64 [N]."""
    places = [0] * x.shape[0]
    parts = sorted(parts, key=lambda group: len(group.coeffs) != 1)
    for place, group in enumerate(parts):
        for image in _images.numbers(group.images, x.shape[0]):
            places[image] = place
    table = torch.tensor(places)
    if all(_stored(group) for group in parts):
        return torch.stack([_summed(base, deltas, group, wide) for group in parts]).to(wide), table
    weights = torch.empty(len(parts), *base.shape, dtype=wide)
    # One delta each, as in TAPS, is summed for all tasks at once; it is small, so calls cost more than the sums.
    single = [group for group in parts if len(group.coeffs) == 1]
    if single:
        chosen, by = zip(*(next(iter(group.coeffs.items())) for group in single), strict=True)
        column = torch.tensor([by, [group.scale for group in single]], dtype=wide)[:, :, None, None, None, None]
        weights[: len(single)] = torch.stack([deltas[k].to(wide) for k in chosen])
        weights[: len(single)].mul_(column[0]).addcmul_(base.to(wide)[None], column[1])
    for place, group in enumerate(parts[len(single) :], len(single)):
        weights[place] = _summed(base.to(wide), deltas, group, wide)
    return weights, table


def _stored(group: _images.Group) -> bool:
    """Whether the group's weight is one tensor as it is: the base, or a baked weight."""
    return (group.scale, *group.coeffs.values()) in ((1.0,), (0.0, 1.0))


def _as_groups(base: Tensor, groups: int, *images: Tensor) -> bool:
    """Whether a mixed batch runs as the groups of one convolution: depthwise, on images laid out channel by channel.

    A weight that is channels last makes the result that, too.
    """
    last = base.stride(1) == 1 and base.shape[2:].numel() > 1
    return base.shape[1] == 1 and groups > 1 and not last and all(x.is_contiguous() for x in images)


def _side_by_side(x: Tensor) -> Tensor:
    """[1, N·C, H, W]: every image's channels as those of one image."""
    return x.reshape(1, -1, *x.shape[2:])


def _apply(
    product: Callable[..., Tensor],
    x: Tensor,
    base: Tensor,
    deltas: Sequence[Tensor],
    coeffs: Tensor,
    base_coeffs: Tensor | None,
    index: Index,
    inner: int,
    merged: bool,
    joined: bool,
) -> Tensor:
    """product(images, their weight) for all images; of split sums, in the coefficients' dtype.

    ``joined``: of several weights, as one product(images side by side, a weight for each, number of images).
    """
    if merged:
        parts = _images.groups(coeffs, base_coeffs, index, inner, x, join=True)
        if joined and len(parts) > 1:
            weights, table = _small_weights(x, base, deltas, coeffs.dtype, parts)
            y = product(_side_by_side(x), weights.to(base.dtype)[table].flatten(0, 1), x.shape[0])
            return y.view(x.shape[0], -1, *y.shape[2:])
        whole: Tensor | None = None
        for group in parts:
            part = product(_images.take(x, group.images), _summed(base, deltas, group, coeffs.dtype))
            if group.images is None:
                return part
            if whole is None:
                size, as_part = (x.shape[0], *part.shape[1:]), layout(part)
                whole = torch.empty(size, dtype=part.dtype, device=x.device, memory_format=as_part)
            _images.put(whole, group.images, part)
        assert whole is not None  # there is always a group
        return whole
    wide = x.to(coeffs.dtype)
    scale, columns = _images.per_image(coeffs, base_coeffs, index, inner, x)
    y = _times(product(wide, base.to(wide.dtype)), scale, owned=True)
    as_base = layout(y)
    for k, (column, chosen) in columns.items():
        part = product(_pick(wide, chosen), deltas[k].to(wide.dtype))
        part = _times(part, _pick(column, chosen), owned=True)
        if chosen is None:
            y.add_(part)
        elif as_base == torch.contiguous_format:
            y.index_add_(0, chosen, part)
        else:  # index_add_ walks channels last element by element
            _images.as_rows(y).index_add_(0, chosen, _images.as_rows(part.contiguous(memory_format=as_base)))
    return y.contiguous(memory_format=as_base)


def _dw(
    dy: Tensor,
    x: Tensor,
    base: Tensor,
    deltas: Sequence[Tensor],
    coeffs: Tensor,
    base_coeffs: Tensor | None,
    conv: Conv,
    index: Index,
    inner: int,
    of_one: Tensor | None,
    pairs: list[int],
    ddeltas_for: list[int],
    need_dcoeffs: bool,
    need_dbase: bool,
) -> tuple[list[Tensor], Tensor]:
    """``of_one``: P of all images, of one weight, where it is known."""
    groups = conv[3]
    wide = coeffs.dtype
    dcoeffs = coeffs.new_zeros(coeffs.shape if need_dcoeffs else (0,))
    sums: dict[int, Tensor] = {}
    wanted = [*ddeltas_for, *([BASE] if need_dbase else [])]

    def weight_gradient(images: Tensor, d: Tensor, dtype: torch.dtype = wide) -> Tensor:
        # Its shape and format count, the latter to the letter, where a base may have a side of 1 lie anyhow.
        like = base
        if base.dtype != dtype or not base.is_contiguous():
            like = torch.empty(base.shape, dtype=dtype, device=base.device, memory_format=layout(base))
        return _gradients(d.to(dtype), images.to(dtype), like, conv, False, True)[1].to(wide)

    def of_images_with(scale: Scalar) -> Tensor:
        """Images whose scale is 0 count for nothing, finite or not."""
        used = scale if not isinstance(scale, Tensor) else (scale != 0).to(x.dtype)
        return weight_gradient(_times(x, used), _times(dy.to(wide), scale))

    def of_task(t: int) -> Tensor:
        """P of one task's images, which a device knows and the host does not."""
        used = (task_of_image == t).to(x.dtype)
        return weight_gradient(_times(x, used), _times(dy, used), gradient_dtype(x))

    def add(k: int, p: Tensor, by: Scalar, owned: bool = True) -> None:
        """sums[k] += by·p; p may become the sum if nobody else needs it."""
        if k in sums:
            sums[k].add_(p, alpha=by) if isinstance(by, float) else sums[k].add_(_scratch.scaled(p, by))
        elif isinstance(by, float) and by == 1.0:
            sums[k] = p if owned else p.clone()
        else:
            sums[k] = _scratch.scaled(p, by, out=p if owned else None)

    count, asked = len(deltas), set(pairs)
    if _data_driven(x, index):
        scale, columns = _images.per_image(coeffs, base_coeffs, index, inner, x)
        task_of_image = _images.task_of_image(coeffs, index[0], inner, x)
        member = task_of_image == torch.arange(coeffs.shape[0], device=x.device)[:, None]
        owners: dict[int, list[int]] = collections.defaultdict(list)
        for pair in asked:
            owners[pair % count].append(pair // count)
        for k, (column, _) in columns.items():
            if len(owners[k]) == 1:  # as each of TAPS's is one task's own: one product serves both gradients
                if not (need_dcoeffs or k in wanted):
                    continue
                (t,) = owners[k]
                p = of_task(t)
                if need_dcoeffs:
                    dcoeffs[t, k] = _dot(p, deltas[k])
                if k in wanted:
                    add(k, p, coeffs[t, k])
                continue
            if k in wanted:
                add(k, of_images_with(column), 1.0)
            if need_dcoeffs and (owners[k] or not asked):
                along = (F.conv2d(x.to(wide), deltas[k].to(wide), None, *conv) * dy.to(wide)).sum((1, 2, 3))  # [N]
                of_tasks = sums_by_group(member.to(wide), along[:, None])[:, 0]
                if not asked:
                    dcoeffs[:, k] = of_tasks
                for t in owners[k]:
                    dcoeffs[t, k] = of_tasks[t]
        if need_dbase:
            add(BASE, of_images_with(scale), 1.0)
    else:
        parts = _images.groups(coeffs, base_coeffs, index, inner, x, join=False)
        of_images: Tensor | None = None
        if len(parts) > 1 and _as_groups(base, groups, x, dy):
            every = base.new_empty((x.shape[0] * base.shape[0], *base.shape[1:]), dtype=wide)  # its shape counts
            ways = (*conv[:3], groups * x.shape[0])
            of_images = _gradients(_side_by_side(dy.to(wide)), _side_by_side(x.to(wide)), every, ways, False, True)[1]
            of_images = of_images.view(x.shape[0], *base.shape)
        for g in parts:
            own = [k for k in range(count) if not asked or g.task * count + k in asked]
            dots = own if need_dcoeffs and g.task >= 0 else []
            users = {k: by for k, by in {**g.coeffs, BASE: g.scale}.items() if k in wanted}
            if not (dots or users):
                continue
            if of_one is not None:
                p = of_one.to(wide)
            elif of_images is None:
                p = weight_gradient(_images.take(x, g.images), _images.take(dy, g.images))
            else:
                p = of_images[g.images].sum(0)
            for k in dots:
                dcoeffs.view(-1)[g.task * count + k] = _dot(p, deltas[k])
            for k, by in users.items():
                add(k, p, by, owned=len(users) == 1)
    found = [sums[k].to(base.dtype) if k in sums else torch.zeros_like(base) for k in wanted]
    found = [gradient.contiguous(memory_format=layout(base)) for gradient in found]
    return found, dcoeffs


def _dot(p: Tensor, delta: Tensor) -> Tensor:
    p, delta = (t.contiguous(memory_format=layout(p)) for t in (p, delta.to(p.dtype)))
    return torch.dot(_images.as_rows(p).flatten(), _images.as_rows(delta).flatten())


def _data_driven(x: Tensor, index: Index) -> bool:
    """Whether grouping on the host would stall a device."""
    return index[0] is not None and not _images.at_hand(x)


def _summed(base: Tensor, deltas: Sequence[Tensor], group: _images.Group, wide: torch.dtype) -> Tensor:
    """The group's weight."""
    return _scratch.merged(base, group.scale, [(deltas[k], c) for k, c in group.coeffs.items()], wide)


def _pick(x: Tensor, chosen: Tensor | None) -> Tensor:
    return x if chosen is None else x[chosen]


def _times(x: Tensor, scale: Scalar, owned: bool = False) -> Tensor:
    """x [N, …] times a number or one number an image, 0 by whatever x is there; ``owned``: x itself may become that."""
    if not isinstance(scale, Tensor):
        return x if scale == 1.0 else x.mul_(scale) if owned else x * scale
    scale = scale.view(-1, *(1,) * (x.dim() - 1))
    product = x.mul_(scale) if owned else x * scale
    return product.masked_fill_(scale == 0, 0.0)
