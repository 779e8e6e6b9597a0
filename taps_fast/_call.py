"""One call of `delta_linear` or `delta_conv2d`: checked, cast, dispatched and run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _autograd, _compressed, _problem, reference
from ._autocast import autocast
from ._autograd import Call, Groups, forward
from ._dispatch import as_rows, select, vendor_alone
from ._problem import IntPair, Problem
from .formats import Delta, Format
from .norms import Tasks, follow, scale_shift, table
from .stacked import Deltas, Stack
from .tasks import Index

REFERENCE = "backend='reference', or "


class Sources(NamedTuple):
    """What an adapted layer made coeffs and bias of, without autograd; `Delta` gives their gradients with its own.

    ::

        coeffs[places[k], k] = I(scores[k]), dI := 1, else 0      bias[t] = base_bias + Σ_k coeffs[t, k]·bias_deltas[k]
    """

    places: tuple[int, ...]
    """The task of each of the K deltas."""
    scores: list[Tensor]
    """K tensors []."""
    bias_deltas: list[Tensor]
    """K tensors [O], or none where there is no bias."""
    base_bias: Tensor | None
    traced: Callable[[], tuple[Tensor, Tensor | None]]
    """Makes coeffs and bias again, with autograd."""

    def tables(self, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """coeffs and bias, for what is differentiated step by step; no bias where the call has none."""
        coeffs, made = self.traced()
        return coeffs, None if bias is None else made

    def leaves(self, bias: Tensor | None) -> list[Tensor]:
        """What gets a gradient; of a call without bias, scores alone."""
        if bias is None or self.base_bias is None:
            return self.scores
        return [*self.scores, *self.bias_deltas, self.base_bias]


class How(NamedTuple):
    """What both functions take by name, and from an adapted layer the sources of coeffs and bias."""

    tasks: Tasks | None = None
    base_coeffs: Tensor | None = None
    pairs: Sequence[tuple[int, int]] | None = None
    batch_dim: int = 0
    scale: Tensor | None = None
    shift: Tensor | None = None
    activation: str | None = None
    backend: str | None = None
    algorithm: str = "auto"
    sources: Sources | None = None


def linear(
    x: Tensor, base: Tensor, deltas: Sequence[Delta] | Tensor, coeffs: Tensor, bias: Tensor | None, how: How
) -> Tensor:
    """`delta_linear`."""
    name = "delta_linear"
    weights = _problem.unbind_deltas(name, deltas)
    if not _problem.is_dense_linear(x, base, weights, bias) or torch.is_autocast_enabled(device := x.device.type):
        _problem.check_tensors(name, x, base, weights, bias)
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x, base, bias, weights = autocast(device, x, base, bias, weights)
            with torch.autocast(device, enabled=False):
                return linear(x, base, weights, coeffs, bias, how)
        _problem.check_weight(name, x, base, weights, dims=2)
        _problem.check_features(name, x, base)
        if x.dim() == 1:
            return linear(x[None], base, weights, coeffs, bias, how)[0]
        return _compressed_linear(x, base, weights, coeffs, bias, how)
    dense = cast("list[Tensor]", weights)
    axes = x.dim() - 1
    rows = x if axes == 1 else x.flatten(0, -2)
    y = _run(name, device, rows, x, base, dense, coeffs, bias, axes, (), how)
    return y if axes == 1 else y.view(*x.shape[:-1], base.shape[0])


def conv2d(
    x: Tensor,
    base: Tensor,
    deltas: Sequence[Delta] | Tensor,
    coeffs: Tensor,
    bias: Tensor | None,
    stride: IntPair,
    padding: IntPair | str,
    dilation: IntPair,
    groups: int,
    how: How,
) -> Tensor:
    """`delta_conv2d`."""
    name = "delta_conv2d"
    weights = _problem.unbind_deltas(name, deltas)
    alike = _problem.are_alike(x, base, weights, bias, dims=4)
    if not alike:
        _problem.check_tensors(name, x, base, weights, bias)
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x, base, bias, weights = autocast(device, x, base, bias, weights)
        with torch.autocast(device, enabled=False):
            return conv2d(x, base, weights, coeffs, bias, stride, padding, dilation, groups, how)
    if not alike:
        _problem.check_weight(name, x, base, weights, dims=4)
    if x.dim() not in (3, 4):
        raise ValueError(f"{name}: x must be [N, C, H, W] or [C, H, W], got {tuple(x.shape)}")
    if x.dim() == 3:
        return conv2d(x[None], base, weights, coeffs, bias, stride, padding, dilation, groups, how)[0]
    x, *conv = _problem.check_conv(name, x, base, stride, padding, dilation, groups)
    dense = [delta.dense(x.dtype) if isinstance(delta, Format) else delta for delta in weights]
    return _run(name, device, x, x, base, dense, coeffs, bias, 1, tuple(conv), how)


def is_plain_conv2d(x: Tensor, base: Tensor, groups: int) -> bool:
    """Whether `delta_conv2d` without deltas is ``F.conv2d`` and no error of ours, whatever else it is given."""
    return x.dim() == 4 and x.shape[1] == base.shape[1] * groups and x.dtype == base.dtype and vendor_alone(base.shape)


def _compressed_linear(
    x: Tensor,
    base: Tensor,
    deltas: Deltas,
    coeffs: Tensor,
    bias: Tensor | None,
    how: How,
) -> Tensor:
    """The base's and the dense deltas' product, and those of the deltas whose format has one of its own."""
    name = "delta_linear"
    tasks, base_coeffs, pairs, batch_dim, scale, shift, activation, backend, algorithm, sources = how
    if sources is not None:
        coeffs, bias = sources.tables(bias)
    if backend != "reference" and _problem.is_transformed():
        _problem.refuse_transforms(name, REFERENCE)
    num_tasks = _problem.check_coeffs(name, coeffs, base_coeffs, len(deltas), x, tasks is not None)
    batch = None if tasks is None or num_tasks is None else _problem.group(name, tasks, num_tasks, x)
    inner = 1 if batch is None else _problem.rows_per_sample(name, x, batch.size, batch_dim, x.dim() - 1)
    if pairs is not None:
        _problem.check_pairs(name, pairs, num_tasks, len(deltas))
    rows = x.shape[:-1].numel() // max(num_tasks or 1, 1)
    asked = "blend" if backend == "reference" else algorithm
    coded = _compressed.decoded_by_kernel(x, base, deltas, coeffs, bias, backend, algorithm)
    apart: list[int] = []
    rest: Sequence[int] = range(len(deltas))
    kept: Deltas = deltas
    stacked = _compressed.is_low_rank_stack(x, base, deltas, coeffs, bias, rows, backend, asked)
    if stacked:
        apart, rest, kept = list(rest), [], []
    elif len(coded) < len(deltas):
        apart = [k for k, d in enumerate(deltas) if isinstance(d, Format) and k not in coded]
        apart = [k for k in apart if _compressed.stays_apart(cast(Format, deltas[k]), base, rows, asked)]
        rest = [k for k in rest if k not in apart]
        others = [(k, deltas[k]) for k in rest]
        kept = [d.dense(x.dtype) if isinstance(d, Format) and k not in coded else d for k, d in others]
    coefficients = _compressed.columns(coeffs, rest)
    if coded:
        if bias is not None:
            _problem.check_bias(name, bias, base.shape[0], num_tasks, x)
            if bias.dim() == 2 and bias.shape[0] == num_tasks:
                bias = F.pad(bias, (0, 0, 0, 1))
        y = _compressed.linear_coded(x, base, kept, coefficients, base_coeffs, bias, batch, inner, algorithm)
    else:
        left = How(backend=backend, algorithm=algorithm)
        if kept or base_coeffs is not None or (bias is not None and bias.dim() > 1):
            held = None if pairs is None else [(t, rest.index(k)) for t, k in pairs if k in rest]
            left = left._replace(tasks=batch, base_coeffs=base_coeffs, pairs=held, batch_dim=batch_dim)
        else:
            coefficients = coeffs.new_empty(0)
        if not apart:
            left = left._replace(scale=scale, shift=shift, activation=activation)
            return linear(x, base, kept, coefficients, bias, left)
        y = linear(x, base, kept, coefficients, bias, left)
    if stacked:
        y = _compressed.add_low_rank(y, x, cast(Stack, deltas), coeffs, batch, inner)
    elif apart:
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        used = _compressed.used_pairs(coeffs, pairs)
        y = _compressed.Products(
            x, deltas, apart, coeffs.to(exact), batch, batch_dim, inner, used, _product, backend
        ).added_to(y)
    if scale is None and shift is None and activation is None:
        return y
    return scale_shift(y, scale, shift, tasks=batch, batch_dim=batch_dim, channel_dim=-1, activation=activation)


def _product(x: Tensor, base: Tensor, deltas: list[Tensor], coeffs: Tensor, **how: Any) -> Tensor:
    return linear(x, base, deltas, coeffs, None, How(**how))


def _run(
    name: str,
    device: str,
    rows: Tensor,
    x: Tensor,
    base: Tensor,
    deltas: list[Tensor],
    coeffs: Tensor,
    bias: Tensor | None,
    axes: int,
    conv: tuple[Any, ...],
    how: How,
) -> Tensor:
    """Checks what both operations share, chooses, and runs. Every microsecond here is paid by every layer."""
    tasks, base_coeffs, pairs, batch_dim, scale, shift, activation, backend, algorithm, sources = how
    num_tasks = _problem.check_coeffs(name, coeffs, base_coeffs, len(deltas), x, tasks is not None)
    dtype, shape = x.dtype, base.shape
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    if coeffs.dtype != exact or not coeffs.is_contiguous():
        coeffs = coeffs.to(exact).contiguous()
    if base_coeffs is not None:
        base_coeffs = base_coeffs.to(device=x.device, dtype=exact).contiguous()
    if bias is not None:
        _problem.check_bias(name, bias, shape[0], num_tasks, x)
        if bias.dim() == 2 and bias.shape[0] == num_tasks:
            bias = F.pad(bias, (0, 0, 0, 1))
    follows = scale is not None or shift is not None or activation is not None
    tables: tuple[Tensor | None, Tensor | None] = (None, None)
    if follows:
        _problem.check_epilogue(name, scale, shift, activation, shape[0], num_tasks, x)
        tables = (table(scale, num_tasks, 1.0, exact), table(shift, num_tasks, 0.0, exact))
    index: Index = (None, None, None)
    inner = 1
    batch = None
    if tasks is not None and num_tasks is not None:
        batch = _problem.group(name, tasks, num_tasks, x)
        inner = _problem.rows_per_sample(name, x, batch.size, batch_dim, axes)
        index = batch.tensors
    flat = None if pairs is None else _problem.check_pairs(name, pairs, num_tasks, len(deltas))

    # Without a delta one weight serves all rows, whatever their task.
    one = not deltas and base_coeffs is None and (bias is None or bias.dim() == 1)
    grad = torch.is_grad_enabled() and _any_requires_grad(rows, base, coeffs, bias, deltas, sources)
    area, last, weights_last, taps = 1, False, False, 0
    transformed = _problem.is_transformed()
    if conv:
        if not transformed:  # vmap cannot say
            last = _is_channels_last(x)
            weights_last = base.is_contiguous(memory_format=torch.channels_last)
        taps = _problem.row_taps(shape, conv[1], conv[2], conv[3], last, weights_last)
        area = math.prod(_problem.output_size(x.shape[2:], shape[2:], *conv[:3]))
    problem = Problem(
        "conv2d" if conv else "linear",
        device,
        dtype,
        shape,
        rows.shape[0],
        len(deltas),
        None if one else num_tasks,
        grad,
        conv[3] if conv else 1,
        taps,
        last and shape[:2] == (conv[3], 1),
        area,
        last and weights_last,
        not conv and base.stride(1) != 1 and shape[1] > 1,
        x.device.index,
    )
    choice, pixels = select(problem, backend, algorithm), None
    if choice.backend == "linear":
        pixels = _patches(x, shape[2:], conv[0], conv[1])
        base, *deltas = (weight.movedim(1, -1).flatten(1) for weight in (base, *deltas))
        rows, conv, inner = pixels.flatten(0, -2), (), inner * area
        choice = select(as_rows(problem))
    if one and choice == ("aten", "merge"):
        y = F.conv2d(x, base, bias, *conv)  # one weight as it is: nothing of ours to do
    elif choice.backend == "reference":
        oracle: Any = reference.delta_conv2d if conv else reference.delta_linear
        if sources is not None:
            coeffs, bias = sources.tables(bias)
        elif flat is not None and coeffs.requires_grad:
            wanted = torch.zeros(coeffs.numel(), dtype=torch.bool)
            wanted[flat] = True
            coeffs = torch.where(wanted.view(coeffs.shape).to(coeffs.device), coeffs, coeffs.detach())
        y = oracle(rows, base, deltas, coeffs, base_coeffs, bias, *conv, index, inner, choice.algorithm)
        return reference.scale_shift(y, *tables, activation, index, inner) if follows else y
    elif transformed:
        _problem.refuse_transforms(name, REFERENCE)
    else:
        # The kernel for depthwise convolutions sums weights in float32 and rounds y alone: blend and split at once.
        own = {"cpu": "depthwise", "triton": "implicit"}.get(choice.backend) if conv else None
        kernel = own or choice.algorithm
        where = ((None, None, None), 1) if one else (index, inner)
        summed = coeffs.flatten() if one else coeffs
        if grad:
            call = Call(*where, flat, kernel, conv, None if sources is None else sources.places)
            leaves = () if sources is None else sources.leaves(bias)
            inputs = (rows, base, summed, base_coeffs, bias, *deltas, *leaves)
            y = cast(Tensor, _autograd.Delta.apply(call, *inputs))  # type: ignore[no-untyped-call]
        else:
            y = forward(rows, base, deltas, summed, base_coeffs, bias, *where, kernel, conv)
    if follows:
        y = follow(y, *tables, Groups(index, inner, activation or "none"), owned=True)
    return y if pixels is None else y.view(*pixels.shape[:-1], shape[0]).movedim(-1, 1)


def _patches(x: Tensor, kernel: torch.Size, stride: list[int], padding: list[int]) -> Tensor:
    """[N, H', W', kh·kw·C], what each output pixel is a product with; x's own memory where the kernel is 1 × 1."""
    if kernel == (1, 1):
        return x[:, :, :: stride[0], :: stride[1]].movedim(1, -1)
    if any(padding):
        x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    windows = x.movedim(1, -1).unfold(1, kernel[0], stride[0]).unfold(2, kernel[1], stride[1])  # [N, H', W', C, kh, kw]
    return windows.movedim(3, -1).flatten(3)


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and x.shape[0] > 0


def _any_requires_grad(
    x: Tensor, base: Tensor, coeffs: Tensor, bias: Tensor | None, deltas: list[Tensor], sources: Sources | None
) -> bool:
    if x.requires_grad or base.requires_grad or coeffs.requires_grad or (bias is not None and bias.requires_grad):
        return True
    for delta in deltas:  # a generator for any() would cost as much again
        if delta.requires_grad:
            return True
    return sources is not None and any(leaf.requires_grad for leaf in sources.leaves(bias))
