"""What tracing needs to know of each operator of `_ops`: the shape and layout of its outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._problem import layout, output_size

Gradients = tuple[Tensor, list[Tensor], Tensor]
"""dcoeffs, ddeltas, dbase."""
LinearGradients = tuple[Tensor, list[Tensor], Tensor, Tensor]
"""These and dbias."""
Conv2dGradients = tuple[Tensor, list[Tensor], Tensor]
"""dx, ddeltas and dbase, dcoeffs."""


def linear_fwd(x: Tensor, base: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], base.shape[0])


linear_stream = linear_coded = linear_fwd


def linear_dx(dy: Tensor, base: Tensor, *_: Any) -> Tensor:
    return dy.new_empty(dy.shape[0], base.shape[1])


def linear_dw(dy: Tensor, x: Tensor, base: Tensor, deltas: list[Tensor], coeffs: Tensor, *rest: Any) -> LinearGradients:
    _, ids, _, _, _, *wanted, need_dbias = rest
    groups = 1 if ids is None else coeffs.shape[0] + 1
    dbias = coeffs.new_empty((groups, base.shape[0]) if need_dbias else (0,))
    dcoeffs, ddeltas, dbase = _weight_gradients(base, coeffs, *wanted)
    if base.device.type == "cpu" and all(map(_is_turned, (base, *deltas))):
        ddeltas = [base.new_empty(base.shape[::-1]).t() for _ in ddeltas]
        dbase = base.new_empty(base.shape[::-1]).t() if dbase.dim() > 1 else dbase
    return dcoeffs, ddeltas, dbase, dbias


def _is_turned(weight: Tensor) -> bool:
    """Whether it lies in memory as its transpose does; what `are_turned` of csrc/linear_call.h asks of each weight."""
    rows, cols = weight.shape
    return weight.stride(0) == 1 and weight.stride(1) >= rows and rows > 1 and cols > 1


def linear_grad(
    dy: Tensor, x: Tensor, base: Tensor, deltas: list[Tensor], coeffs: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, list[Tensor], Tensor, Tensor]:
    *index, _, need_dx = rest[:7]
    dx = linear_dx(dy, base) if need_dx else x.new_empty(0)
    return dx, *linear_dw(dy, x, base, deltas, coeffs, *index, *rest[7:])


def conv2d_fwd(x: Tensor, base: Tensor, deltas: list[Tensor], coeffs: Tensor, *rest: Any) -> Tensor:
    _, _, stride, padding, dilation, groups, *_ = rest
    return torch.nn.functional.conv2d(x, base, None, stride, padding, dilation, groups)


conv2d_merge = conv2d_fwd


def conv2d_grad(
    dy: Tensor, x: Tensor, base: Tensor, deltas: list[Tensor], coeffs: Tensor, *rest: Any
) -> Conv2dGradients:
    stride, padding, dilation, groups = rest[1:5]
    need_dx, *wanted = rest[-5:]
    dx = x.new_empty(0)
    if need_dx:
        how = (None, stride, padding, dilation, False, [0, 0], groups, [True, False, False])
        dx = torch.ops.aten.convolution_backward(dy, x, base, *how)[0]
    dcoeffs, ddeltas, dbase = _weight_gradients(base, coeffs, *wanted)
    as_base = layout(base)
    found = [t.contiguous(memory_format=as_base) for t in (*ddeltas, dbase)[: len(ddeltas) + wanted[-1]]]
    return dx, found, dcoeffs


def conv2d_implicit(x: Tensor, base: Tensor, *rest: Any) -> Tensor:
    size = output_size(x.shape[2:], base.shape[2:], *rest[-5:-2])
    y = x.new_empty(x.shape[0], *size, base.shape[0]).movedim(-1, 1)
    return y if x.stride(1) == 1 else y.contiguous()


def depthwise(
    x: Tensor,
    weight: Tensor,
    table: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    return x.new_empty(x.shape[0], *output_size(x.shape[1:3], kernel, stride, padding, dilation), x.shape[3])


def scale_shift(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x) if is_dense(x) else x.new_empty(x.shape)


def scale_shift_(x: Tensor, *_: Any) -> None:
    pass


linear_low_rank_ = scale_shift_


def scale_shift_dx(dy: Tensor, x: Tensor, *_: Any) -> Tensor:
    return scale_shift(x)


def scale_shift_sums(dy: Tensor, x: Tensor, scale: Any, shift: Any, center: Any, *groups: Any) -> tuple[Tensor, Tensor]:
    return moments(x, *groups[:-1])


def moments(
    x: Tensor, ids: Tensor | None, order: Tensor | None, offsets: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor]:
    groups = 1 if offsets is None else offsets.shape[0] - 1
    mean = x.new_empty(groups, x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
    return mean, torch.empty_like(mean)


batch_norm_eval = group_norm = scale_shift


def batch_norm_train(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return scale_shift(x), *moments(x, *rest[-4:])


def batch_norm_grad(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, need_dx = rest
    return scale_shift(x) if need_dx else x.new_empty(0), *moments(x, *rest[-5:-1])


group_norm_grad = batch_norm_grad


def group_norm_train(
    x: Tensor, weight: list[Tensor], bias: list[Tensor], groups: int, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty(x.shape[0], groups, dtype=torch.promote_types(x.dtype, torch.float32))
    return scale_shift(x), mean, torch.empty_like(mean)


def track_statistics(*_: Any) -> None:
    pass


def is_dense(x: Tensor) -> bool:
    """Whether the pointwise operators keep x's layout: contiguous, or channels last. Else they return contiguous."""
    return x.is_contiguous() or x.movedim(1, -1).is_contiguous()


def sort_tasks(ids: Tensor, num_tasks: int) -> tuple[Tensor, Tensor, int]:
    return torch.empty_like(ids), ids.new_empty(num_tasks + 2), 0


def task_plan(ids: Tensor, num_tasks: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    valid = ids.new_empty((), dtype=torch.bool)
    return torch.empty_like(ids), ids.new_empty(num_tasks + 2), torch.empty_like(ids), valid


def layer_plan(
    ids: Tensor, coeffs: Tensor, base_coeffs: Tensor | None, rows: int, inner: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tasks = coeffs.shape[0]
    ends = ids.new_empty(tasks + 1, dtype=torch.int32)
    return torch.empty_like(ids), torch.empty_like(ids), ids.new_empty(tasks + 2), ids.new_empty(rows), ends


def _weight_gradients(
    base: Tensor, coeffs: Tensor, pairs: list[int], ddeltas_for: list[int], need_dcoeffs: bool, need_dbase: bool
) -> Gradients:
    dcoeffs = coeffs.new_empty(coeffs.shape if need_dcoeffs else (0,))
    ddeltas = [base.new_empty(base.shape) for _ in ddeltas_for]
    return dcoeffs, ddeltas, base.new_empty(base.shape if need_dbase else (0,))


def coded_fwd(y: Tensor, *_: Any) -> Tensor:
    return y.new_empty(y.shape)


def coded_dx(dy: Tensor, *rest: Any) -> Tensor:
    return dy.new_empty(dy.shape[0], rest[-1])


def fold(bases: list[Tensor], *_: Any) -> list[Tensor]:
    return [base.new_empty(base.shape) for base in bases]


def fold_grad(
    dweights: list[Tensor],
    deltas: list[Tensor],
    coeffs: Tensor,
    parts: list[Tensor],
    masks: list[Tensor],
    need_dcoeffs: bool,
    need_dmasks: bool,
) -> tuple[Tensor, list[Tensor]]:
    dcoeffs = coeffs.new_empty(coeffs.shape if need_dcoeffs else (0,))
    return dcoeffs, fold(dweights) if need_dmasks else []
