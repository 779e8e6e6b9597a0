"""Which gradients are computed and what is saved for them. The arithmetic is in the operators.

Saved: x, base, the deltas, coeffs and the index; never a summed weight. One call serves dcoeffs, ddeltas and dbase (of
a convolution dx too); what nobody needs is not computed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .tasks import Index, sums_of_rows

ops = torch.ops.taps_fast


class Call(NamedTuple):
    """What is not differentiated: where rows belong, and how to compute."""

    batch: Index
    inner: int
    pairs: list[int] | None
    """Places in coeffs whose gradient is wanted; None: all."""
    algorithm: str
    conv: tuple[Any, ...] = ()
    """stride, padding, dilation, groups; empty for a linear layer."""
    places: tuple[int, ...] | None = None
    """Where coeffs and bias are no variables, but made of leaves that are: the task of each delta."""


def forward(
    x: Tensor,
    base: Tensor,
    deltas: list[Tensor],
    coeffs: Tensor,
    base_coeffs: Tensor | None,
    bias: Tensor | None,
    batch: Index,
    inner: int,
    algorithm: str,
    conv: tuple[Any, ...],
) -> Tensor:
    """The forward operator, without autograd. The last four are fields of `Call`, which only gradients need."""
    if algorithm == "stream":
        streamed: Tensor = ops.linear_stream(x, base, deltas, coeffs, base_coeffs, bias, batch[0], inner)
        return streamed
    if algorithm == "implicit":
        *how, _ = conv  # which has no groups
        y: Tensor = ops.conv2d_implicit(x, base, deltas, coeffs, base_coeffs, bias, *how, batch[0], inner)
        return y
    if algorithm == "merge" and conv:
        merged: Tensor = ops.conv2d_merge.default(x, base, deltas, coeffs, base_coeffs, bias, *conv, *batch, inner)
        return merged
    op = ops.conv2d_fwd if conv else ops.linear_fwd
    y = op(x, base, deltas, coeffs, base_coeffs, bias, *conv, *batch, inner, algorithm)
    return y


def without_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward that computes in its own dtypes, also where a loop has it inside autocast."""

    @functools.wraps(backward)
    def run(ctx: Any, dy: Tensor) -> Any:
        if not torch.is_autocast_enabled(device := dy.device.type):
            return backward(ctx, dy)
        with torch.autocast(device, enabled=False):
            return backward(ctx, dy)

    return run


class Delta(torch.autograd.Function):
    """y = (base_coeffs·base + Σ c·delta) x + bias, linear or convolution, for one task or a mixed batch.

    After the K deltas may follow the leaves of ``coeffs`` and ``bias``, as `taps_fast._call.Sources` says: K scores,
    and with a bias K bias deltas and the base's bias. A graph of the small operations between costs the host more.
    """

    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        x: Tensor,
        base: Tensor,
        coeffs: Tensor,
        base_coeffs: Tensor | None,
        bias: Tensor | None,
        *deltas: Tensor,
    ) -> Tensor:
        ctx.call = call
        ctx.bias_shape = None if bias is None else bias.shape
        bias_deltas: tuple[Tensor, ...] = ()
        if call.places is not None:
            count = len(call.places)
            ctx.leaf_dtypes = [leaf.dtype for leaf in deltas[count:]]
            deltas, bias_deltas = deltas[:count], deltas[2 * count : 3 * count]
        ctx.save_for_backward(x, base, coeffs, base_coeffs, *call.batch, *deltas, *bias_deltas)
        return forward(
            x, base, list(deltas), coeffs, base_coeffs, bias, call.batch, call.inner, call.algorithm, call.conv
        )

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        name = "delta_conv2d" if call.conv else "delta_linear"
        _no_second_derivatives(name, "backend='reference'")
        x, base, coeffs, base_coeffs, *rest = ctx.saved_tensors
        index, deltas, bias_deltas = rest[:3], rest[3:], []
        _, need_x, need_base, need_coeffs, _, need_bias, *need_deltas = ctx.needs_input_grad
        need_leaves: list[bool] = []
        if call.places is not None:
            count = len(call.places)
            deltas, bias_deltas = deltas[:count], deltas[count:]
            need_deltas, need_leaves = need_deltas[:count], need_deltas[count:]
            need_coeffs, need_bias = any(need_leaves[:count]), bool(bias_deltas) and any(need_leaves)
        dx = dcoeffs = dbase = dbias = sums = None
        ddeltas: list[Tensor | None] = [None] * len(deltas)

        wanted = [k for k, need in enumerate(need_deltas) if need]
        dots = need_coeffs and call.pairs != []
        asked = (call.pairs or [], wanted, dots, need_base)
        found: Sequence[Tensor] = ()
        if need_x or dots or need_base or wanted:
            arguments = (dy, x, base, deltas, coeffs, base_coeffs, *call.conv, *index, call.inner)
            if call.conv:
                dx, dweights, dcoeffs = ops.conv2d_grad.default(*arguments, call.algorithm == "split", need_x, *asked)
                found, dbase = (dweights[:-1], dweights[-1]) if need_base else (dweights, None)
            else:
                dx, dcoeffs, found, dbase, sums = ops.linear_grad(*arguments, call.algorithm, need_x, *asked, need_bias)
        for k, ddelta in zip(wanted, found, strict=True):
            ddeltas[k] = ddelta
        if need_coeffs and not dots:
            dcoeffs = torch.zeros_like(coeffs)
        if need_bias:
            sums = _sums_by_task(dy, ctx.bias_shape, call) if sums is None else sums
        dleaves: Sequence[Tensor | None] = ()
        if call.places is not None:
            made = _leaf_gradients(call.places, dcoeffs, sums if need_bias else None, coeffs, bias_deltas, need_leaves)
            dleaves = [None if d is None else d.to(dtype) for d, dtype in zip(made, ctx.leaf_dtypes, strict=True)]
        elif need_bias:
            dbias = _rows_as(cast(Tensor, sums), ctx.bias_shape).to(dy.dtype)
        return (
            None,
            dx if need_x else None,
            dbase if need_base else None,
            dcoeffs if need_coeffs and call.places is None else None,
            None,
            dbias,
            *ddeltas,
            *dleaves,
        )


def _leaf_gradients(
    places: tuple[int, ...],
    dcoeffs: Tensor | None,
    sums: Tensor | None,
    coeffs: Tensor,
    bias_deltas: Sequence[Tensor],
    need: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of scores, bias deltas and the base's bias.

    Each delta is one task's own: of its column in ``coeffs`` and in ``dcoeffs`` all else is 0.
    """
    count = len(places)
    dscores: Tensor | None = None
    if dcoeffs is not None and any(need[:count]):
        dscores = dcoeffs if dcoeffs.dim() == 1 else dcoeffs.sum(0)
    found: list[Tensor | None] = [None] * len(need)
    if sums is not None:
        alone = len(sums) == count  # one task
        rows = sums if alone else sums[:-1] if count == len(sums) - 1 else torch.stack([sums[t] for t in places])
        if any(need[count:-1]):
            gates = coeffs if alone else coeffs.sum(0)[:, None]
            found[count:-1] = (gates * rows).unbind()
        if need[-1]:
            found[-1] = sums.sum(0)
        if dscores is not None and count == 1:
            dscores = torch.addmv(dscores, rows, bias_deltas[0].to(rows.dtype))  # one operation
        elif dscores is not None:
            dscores = dscores + (rows * torch.stack(list(bias_deltas))).sum(1)
    if dscores is not None:
        found[:count] = dscores.unbind()
    return [gradient if wanted else None for gradient, wanted in zip(found, need, strict=True)]


class Groups(NamedTuple):
    """Where the rows of a pointwise operator belong, and its activation."""

    batch: Index
    inner: int
    activation: str


class ScaleShift(torch.autograd.Function):
    """y = act(scale·x + shift), tables [C] or [T + 1, C]."""

    @staticmethod
    def forward(ctx: Any, groups: Groups, x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
        ctx.inner, ctx.activation = groups.inner, groups.activation
        ctx.save_for_backward(x, scale, shift, *groups.batch)
        y: Tensor = ops.scale_shift(x, scale, shift, *groups.batch, groups.inner, groups.activation)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        _no_second_derivatives("scale_shift", "taps_fast.reference.scale_shift")
        x, scale, shift, *index = ctx.saved_tensors
        _, need_x, need_scale, need_shift = ctx.needs_input_grad
        rest = (*index, ctx.inner, ctx.activation)
        dx = ops.scale_shift_dx(dy, x, scale, shift, None, None, *rest) if need_x else None
        dscale = dshift = None
        if need_scale or need_shift:
            dscale, dshift = ops.scale_shift_sums(dy, x, scale, shift, None, *rest)
        return None, dx, _like_table(dscale, scale), _like_table(dshift, shift)


class BatchNorm(torch.autograd.Function):
    """y = (x - mean)·rstd·weight + bias with statistics by task; also mean and biased variance of each task's rows.

    ``own`` says which groups are normalised by their rows, the others are by the pairs in ``fixed``. With
    z = (x - mean)·rstd and n the rows of a group, dx = weight·rstd·(dy - Σdy/n - z·Σ(dy·z)/n), which is linear in dy
    and in x.
    """

    @staticmethod
    def forward(
        ctx: Any,
        groups: Groups,
        own: tuple[bool, ...],
        eps: Tensor | float,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        *fixed: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        found_mean, found_var = ops.moments(x, *groups.batch, groups.inner)
        mean, var = _where_own(own, found_mean, fixed[::2]), _where_own(own, found_var, fixed[1::2])
        rstd = torch.rsqrt(var + eps)
        scale = rstd if weight is None else rstd * weight
        shift = -mean * scale if bias is None else bias - mean * scale
        ctx.groups, ctx.own = groups, own
        ctx.save_for_backward(x, mean, rstd, scale, *groups.batch)
        ctx.mark_non_differentiable(found_mean, found_var)
        y = ops.scale_shift(x, scale, shift, *groups.batch, groups.inner, "none")
        return y, found_mean, found_var

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        _no_second_derivatives("batch_norm", "batches of one task")
        x, mean, rstd, scale, *index = ctx.saved_tensors
        rest = (*index, ctx.groups.inner, "none")
        along, plain = ops.scale_shift_sums(dy, x, None, None, mean, *rest)  # Σ dy·(x - mean) and Σ dy
        dx = None
        if ctx.needs_input_grad[3]:
            slope = offset = None
            if any(ctx.own):
                share = _share(ctx.own, index[2], x, ctx.groups.inner, mean)
                slope = -scale * rstd.square() * along * share
                offset = -scale * plain * share - slope * mean
            dx = ops.scale_shift_dx(dy, x, scale, None, slope, offset, *rest)
        dweight = along * rstd if ctx.needs_input_grad[4] else None
        dbias = plain if ctx.needs_input_grad[5] else None
        return (None, None, None, dx, dweight, dbias, *(None for _ in ctx.needs_input_grad[6:]))


class Given(NamedTuple):
    """What of a norm is not differentiated."""

    batch: Index
    inner: int
    num_weights: int
    """How many of the vectors are weights; the others are biases."""
    groups: int = 1
    eps: Sequence[float] = ()
    center: bool = True
    fixed: Sequence[int] = ()
    """The tables of a batch norm whose statistics are these:"""
    mean: Sequence[Tensor] = ()
    variance: Sequence[Tensor] = ()


class BatchNormOfTasks(torch.autograd.Function):
    """`BatchNorm` as one operator each way, from the vectors of all tasks."""

    @staticmethod
    def forward(ctx: Any, given: Given, x: Tensor, *vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight, bias = _split(given, vectors)
        statistics = (list(given.mean), list(given.variance), given.fixed, given.eps)
        y, mean, variance = ops.batch_norm_train.default(x, weight, bias, *statistics, *given.batch, given.inner)
        ctx.given = given
        ctx.save_for_backward(x, mean, variance, *given.batch, *vectors)
        ctx.mark_non_differentiable(mean, variance)
        return y, mean, variance

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        _no_second_derivatives("batch_norm", "batches of one task")
        given: Given = ctx.given
        x, mean, variance, ids, order, offsets, *vectors = ctx.saved_tensors
        rest = (mean, variance, given.fixed, given.eps, ids, order, offsets, given.inner, ctx.needs_input_grad[1])
        found = ops.batch_norm_grad.default(dy, x, _split(given, vectors)[0], *rest)
        return None, *_norm_gradients(ctx, given, vectors, *found)


class GroupNormOfTasks(torch.autograd.Function):
    """y = z·weight + bias, z = (x - mean)·rstd over groups of a row's channels, from the vectors of all tasks."""

    @staticmethod
    def forward(ctx: Any, given: Given, x: Tensor, *vectors: Tensor) -> Tensor:
        weight, bias = _split(given, vectors)
        how = (given.groups, given.eps[0], given.center)
        y, mean, rstd = ops.group_norm_train.default(x, weight, bias, *how, *given.batch, given.inner)
        ctx.given = given
        ctx.save_for_backward(x, mean, rstd, *given.batch, *vectors)
        found: Tensor = y
        return found

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        _no_second_derivatives("group_norm", "batches of one task")
        given: Given = ctx.given
        x, mean, rstd, ids, order, offsets, *vectors = ctx.saved_tensors
        rest = (ids, order, offsets, given.inner, ctx.needs_input_grad[1])
        found = ops.group_norm_grad.default(dy, x, _split(given, vectors)[0], mean, rstd, given.center, *rest)
        return None, *_norm_gradients(ctx, given, vectors, *found)


def _split(given: Given, vectors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and biases."""
    return list(vectors[: given.num_weights]), list(vectors[given.num_weights :])


def _norm_gradients(
    ctx: Any, given: Given, vectors: Sequence[Tensor], dx: Tensor, dweight: Tensor, dbias: Tensor
) -> list[Tensor | None]:
    """The gradients of x and of each vector that needs one, from tables of all."""
    found: list[Tensor | None] = [dx if ctx.needs_input_grad[1] else None]
    for table, held in zip((dweight, dbias), _split(given, vectors), strict=True):
        needed = ctx.needs_input_grad[1 + len(found) :]
        rows = table.unbind() if any(needed[: len(held)]) else ()
        found += [rows[t].to(v.dtype).view(v.shape) if needed[t] else None for t, v in enumerate(held)]
    return found


def _share(own: tuple[bool, ...], offsets: Tensor, x: Tensor, inner: int, like: Tensor) -> Tensor:
    """[T + 1, 1]: 1 / n of the groups that are normalised by their n values a channel, 0 of the others."""
    samples = offsets[1:] - offsets[:-1]
    count = torch.cat([samples[1:], samples[:1]]) * (inner * math.prod(x.shape[2:]))
    share = 1.0 / count.clamp(min=1).to(like.dtype)
    none = share.new_zeros(())
    return _where_own(own, share, [none] * own.count(False))[:, None]


def _where_own(own: tuple[bool, ...], found: Tensor, given: Sequence[Tensor]) -> Tensor:
    """A row of ``found`` for each group that has its own, and the next of ``given`` for each other."""
    if all(own):
        return found
    mine = own.index(False)
    if not any(own[mine:]):  # the base's alone, as a rule
        return torch.cat([found[:mine], torch.stack(list(given))])
    others = iter(given)
    return torch.stack([found[g] if mine else next(others) for g, mine in enumerate(own)])


def _like_table(sums: Tensor | None, table: Tensor | None) -> Tensor | None:
    """Sums by task as the gradient of a table, which may be one row for all tasks."""
    if sums is None or table is None:
        return None
    return _rows_as(sums, table.shape)


def _rows_as(sums: Tensor, shape: torch.Size) -> Tensor:
    """Sums by task as they are, or of all tasks where ``shape`` is one row; a single row needs no further sum."""
    return (sums if sums.numel() == shape.numel() else sums.sum(0)).reshape(shape)


def _no_second_derivatives(function: str, advice: str) -> None:
    """Gradients are computed with grad mode on only when the caller asked for create_graph."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{function}: second derivatives need {advice}, or of a TapsModel the network that merge(task) gives; the "
            "kernels have none"
        )


def _sums_by_task(dy: Tensor, shape: torch.Size, call: Call) -> Tensor:
    """Σ of dy over pixels and rows, [1, O]; for bias [T + 1, O], over the rows of each task."""
    wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
    pixels = list(range(2, dy.dim()))
    if len(shape) == 1:
        return dy.sum([0, *pixels], dtype=wide)[None]
    return sums_of_rows(dy.sum(pixels, dtype=wide) if pixels else dy, call.batch, call.inner)
