"""The two operations all else is made of: `delta_linear` and `delta_conv2d`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _compressed, _problem, reference
from ._autocast import autocast
from ._autograd import Call, Delta, Groups, forward
from ._dispatch import as_rows, select, vendor_alone
from ._problem import IntPair, Problem
from .formats import Format
from .norms import Tasks, follow, scale_shift, table
from .stacked import Deltas, Stack
from .tasks import Index


def delta_linear(
    x: Tensor,
    base: Tensor,
    deltas: Sequence[Tensor | Format] | Tensor,
    coeffs: Tensor,
    bias: Tensor | None = None,
    *,
    tasks: Tasks | None = None,
    base_coeffs: Tensor | None = None,
    pairs: Sequence[tuple[int, int]] | None = None,
    batch_dim: int = 0,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
    backend: str | None = None,
    algorithm: str = "auto",
) -> Tensor:
    """A linear layer whose weight is a base plus a weighted sum of deltas, chosen row by row.

    ::

        y_r = (base + Σ_k coeffs[k]·deltas[k]) x_r + bias                          without tasks
        y_r = (base_coeffs[t]·base + Σ_k coeffs[t, k]·deltas[k]) x_r + bias[t]     t = the task of row r

    No summed weight is stored, except by "merge", in scratch memory. Every gradient is exact, that of a
    coefficient also where it is 0.

    Args:
        x: [..., I], any strides; float32, bfloat16, float16 or float64. Under autocast x, base, deltas and bias
            take its dtype, as in ``F.linear``; coeffs never do.
        base: [O, I], the weight all tasks share.
        deltas: K tensors [O, I] or formats of `taps_fast.formats`, or one tensor [K, O, I] or one
            `taps_fast.stacked.Stack`. K = 0 is the base alone.
        coeffs: [K], or [T, K] with tasks. Used in float32 (float64 when x is).
        bias: [O]; with tasks also [T, O] (rows of id -1 then have none) or [T + 1, O] (last row: id -1).
        tasks: integer ids [B], or a `TaskBatch`: sample b runs as task ``tasks[b]``, -1 as the base alone.
            When the batch axis holds r·B entries, each id covers r consecutive ones.
        base_coeffs: [T] ([1] without tasks), what multiplies base; 0 for a baked task, whose delta is its whole
            weight. Default 1. Data: it has no gradient.
        pairs: the (task, delta) pairs whose coefficient can be non-zero or needs a gradient; default all. With
            one delta a task, naming them keeps the backward from computing T·K dot products where T are wanted.
        batch_dim: the axis of x that carries the batch, any but the last; negative ones count from the last.
        scale, shift, activation: what follows the product, as in `scale_shift`: act(scale[t]·y + shift[t]), with
            tables of the shapes of bias. In inference it is applied to y where it lies.
        backend: "cpu", "cuda", "triton" or "reference"; default: the best that can run. An explicit one never falls
            back.
        algorithm: "blend" (weight summed, rounded at most once to x's dtype, one product), "split" (two products
            into one accumulator: exact in low precision), "stream" (the same for few rows on CUDA), "merge" (weight
            in scratch, vendor GEMM) or "auto". Of a format, "split" never makes a dense delta; "blend" and "merge"
            do, "blend" on a CPU without gradients a panel at a time.

    Returns:
        y [..., O] in x's dtype.

    Raises:
        ValueError: shapes, devices, ids or pairs that do not fit; TypeError: dtypes that do not.
        BackendError: the explicit backend or algorithm cannot run this problem; the text says why.

    Cost: 2·M·I·O flops (blend) or up to 2·M·I·O for each open delta more (split); base and each open delta are
    read once. Source: TAPS, arXiv 2203.16708; the general sum covers AdaMerging and its kin.

    >>> base, delta = torch.randn(8, 4), torch.randn(8, 4)
    >>> x = torch.randn(3, 4)
    >>> y = delta_linear(x, base, [delta], torch.tensor([[1.0], [0.0]]), tasks=[0, 1, -1])
    >>> weights = [base + delta, base, base]
    >>> bool(torch.allclose(y, torch.stack([w @ v for w, v in zip(weights, x)]), atol=1e-5))
    True
    """
    name = "delta_linear"
    weights = _problem.unbind_deltas(name, deltas)
    if not _problem.is_dense_linear(x, base, weights, bias) or torch.is_autocast_enabled(device := x.device.type):
        how: dict[str, Any] = dict(
            tasks=tasks, base_coeffs=base_coeffs, pairs=pairs, batch_dim=batch_dim, scale=scale, shift=shift,
            activation=activation, backend=backend, algorithm=algorithm,
        )  # fmt: skip
        _problem.check_tensors(name, x, base, weights, bias)
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x, base, bias, weights = autocast(device, x, base, bias, weights)
            with torch.autocast(device, enabled=False):
                return delta_linear(x, base, weights, coeffs, bias, **how)
        _problem.check_weight(name, x, base, weights, dims=2)
        _problem.check_features(name, x, base)
        if x.dim() == 1:
            return delta_linear(x[None], base, weights, coeffs, bias, **how)[0]
        return _compressed_linear(x, base, weights, coeffs, bias, **how)
    dense = cast("list[Tensor]", weights)
    axes = x.dim() - 1
    rows = x if axes == 1 else x.flatten(0, -2)
    y = _run(
        name, device, rows, x, base, dense, coeffs, bias, tasks=tasks, base_coeffs=base_coeffs, pairs=pairs,
        batch_dim=batch_dim, axes=axes, scale=scale, shift=shift, activation=activation, backend=backend,
        algorithm=algorithm,
    )  # fmt: skip
    return y if axes == 1 else y.view(*x.shape[:-1], base.shape[0])


def delta_conv2d(
    x: Tensor,
    base: Tensor,
    deltas: Sequence[Tensor | Format] | Tensor,
    coeffs: Tensor,
    bias: Tensor | None = None,
    stride: IntPair = 1,
    padding: IntPair | str = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    *,
    tasks: Tasks | None = None,
    base_coeffs: Tensor | None = None,
    pairs: Sequence[tuple[int, int]] | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
    backend: str | None = None,
    algorithm: str = "auto",
) -> Tensor:
    """A 2-d convolution whose kernel is a base plus a weighted sum of deltas, chosen image by image.

    ::

        y_n = conv2d(x_n, base_coeffs[t]·base + Σ_k coeffs[t, k]·deltas[k]) + bias[t]      t = the task of image n

    Args:
        x: [N, C, H, W] or [C, H, W]; dtypes and autocast as in `delta_linear`.
        base: [O, C / groups, kh, kw].
        deltas: as in `delta_linear`, shaped like base. Formats are made dense in scratch.
        coeffs, bias, tasks, base_coeffs, pairs, scale, shift, activation: as in `delta_linear`, with images for
            rows. Scale and shift are what an evaluated batch norm is: weight / √(var + eps) and what remains.
        stride, padding, dilation, groups: as in ``F.conv2d``, padding "same" and "valid" included.
        backend, algorithm: "cpu" (depthwise on channels last), "linear" ("rows": on channels last a convolution is
            `delta_linear` on its pixels if it is 1 × 1, else on a copy of patches), "aten" ("merge": kernel summed
            into scratch, vendor convolution; "split": base convolution for all images, then one for each open delta),
            "triton" ("split", in inference: each image with its own task's deltas in one kernel, fastest on channels
            last) or "reference" ("split", "blend"); default: the fastest ("auto").

    Returns:
        y [N, O, H', W'] ([O, H', W'] for an unbatched x) in x's dtype and memory format.

    Raises:
        ValueError, TypeError, BackendError: as `delta_linear`; RuntimeError where ``F.conv2d`` raises.

    Cost: one vendor convolution for each distinct weight in the batch; of a mixed batch on a GPU, where ids are not
    read back, one of all images for the base and for each delta, or with "triton" one product an image for the base
    and for each delta that its task uses. Patches are at most 64 MiB unless "linear" is asked for.
    Source: TAPS, arXiv 2203.16708.

    >>> base, delta = torch.randn(2, 8, 4, 3, 3)
    >>> x = torch.randn(2, 4, 5, 5)
    >>> y = delta_conv2d(x, base, [delta], torch.tensor([[1.0]]), padding=1, tasks=[0, -1])
    >>> bool(torch.allclose(y[:1], F.conv2d(x[:1], base + delta, padding=1), atol=1e-4))
    True
    """
    name = "delta_conv2d"
    weights = _problem.unbind_deltas(name, deltas)
    alike = _problem.are_alike(x, base, weights, bias, dims=4)
    if not alike:
        _problem.check_tensors(name, x, base, weights, bias)
    device = x.device.type
    how: dict[str, Any] = dict(
        tasks=tasks, base_coeffs=base_coeffs, pairs=pairs, scale=scale, shift=shift, activation=activation,
        backend=backend, algorithm=algorithm,
    )  # fmt: skip
    if torch.is_autocast_enabled(device):
        x, base, bias, weights = autocast(device, x, base, bias, weights)
        with torch.autocast(device, enabled=False):
            return delta_conv2d(x, base, weights, coeffs, bias, stride, padding, dilation, groups, **how)
    if not alike:
        _problem.check_weight(name, x, base, weights, dims=4)
    if x.dim() not in (3, 4):
        raise ValueError(f"{name}: x must be [N, C, H, W] or [C, H, W], got {tuple(x.shape)}")
    if x.dim() == 3:
        x = x[None]
        return delta_conv2d(x, base, weights, coeffs, bias, stride, padding, dilation, groups, **how)[0]
    x, *conv = _problem.check_conv(name, x, base, stride, padding, dilation, groups)
    dense = [delta.dense(x.dtype) if isinstance(delta, Format) else delta for delta in weights]
    return _run(name, device, x, x, base, dense, coeffs, bias, batch_dim=0, axes=1, conv=tuple(conv), **how)


def is_plain_conv2d(x: Tensor, base: Tensor, groups: int) -> bool:
    """Whether `delta_conv2d` without deltas is ``F.conv2d`` and no error of ours, whatever else it is given."""
    return x.dim() == 4 and x.shape[1] == base.shape[1] * groups and x.dtype == base.dtype and vendor_alone(base.shape)


def _compressed_linear(
    x: Tensor,
    base: Tensor,
    deltas: Deltas,
    coeffs: Tensor,
    bias: Tensor | None,
    *,
    tasks: Tasks | None,
    base_coeffs: Tensor | None,
    pairs: Sequence[tuple[int, int]] | None,
    batch_dim: int,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str | None,
    backend: str | None,
    algorithm: str,
) -> Tensor:
    """The base's and the dense deltas' product, and those of the deltas whose format has one of its own."""
    name = "delta_linear"
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
        left = [(k, deltas[k]) for k in rest]
        kept = [d.dense(x.dtype) if isinstance(d, Format) and k not in coded else d for k, d in left]
    coefficients = _compressed.columns(coeffs, rest)
    follows: dict[str, Any] = dict(scale=scale, shift=shift, activation=activation)
    if coded:
        if bias is not None:
            _problem.check_bias(name, bias, base.shape[0], num_tasks, x)
            if bias.dim() == 2 and bias.shape[0] == num_tasks:
                bias = F.pad(bias, (0, 0, 0, 1))
        y = _compressed.linear_coded(x, base, kept, coefficients, base_coeffs, bias, batch, inner, algorithm)
    else:
        how: dict[str, Any] = dict(backend=backend, algorithm=algorithm)
        if kept or base_coeffs is not None or (bias is not None and bias.dim() > 1):
            held = None if pairs is None else [(t, rest.index(k)) for t, k in pairs if k in rest]
            how |= dict(tasks=batch, base_coeffs=base_coeffs, pairs=held, batch_dim=batch_dim)
        else:
            coefficients = coeffs.new_empty(0)
        if not apart:
            return delta_linear(x, base, kept, coefficients, bias, **how, **follows)
        y = delta_linear(x, base, kept, coefficients, bias, **how)
    if stacked:
        y = _compressed.add_low_rank(y, x, cast(Stack, deltas), coeffs, batch, inner)
    elif apart:
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        used = _compressed.used_pairs(coeffs, pairs)
        y = _compressed.Products(
            x, deltas, apart, coeffs.to(exact), batch, batch_dim, inner, used, delta_linear, backend
        ).added_to(y)
    if scale is None and shift is None and activation is None:
        return y
    return scale_shift(y, scale, shift, tasks=batch, batch_dim=batch_dim, channel_dim=-1, activation=activation)


def _run(
    name: str,
    device: str,
    rows: Tensor,
    x: Tensor,
    base: Tensor,
    deltas: list[Tensor],
    coeffs: Tensor,
    bias: Tensor | None,
    *,
    tasks: Tasks | None,
    base_coeffs: Tensor | None,
    pairs: Sequence[tuple[int, int]] | None,
    batch_dim: int,
    axes: int,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str | None,
    backend: str | None,
    algorithm: str,
    conv: tuple[Any, ...] = (),
) -> Tensor:
    """Checks what both operations share, chooses, and runs. Every microsecond here is paid by every layer."""
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
    flat = [] if pairs is None else _problem.check_pairs(name, pairs, num_tasks, len(deltas))

    # Without a delta one weight serves all rows, whatever their task.
    one = not deltas and base_coeffs is None and (bias is None or bias.dim() == 1)
    grad = torch.is_grad_enabled() and _any_requires_grad(rows, base, coeffs, bias, deltas)
    area, last, weights_last, taps = 1, False, False, 0
    if conv:
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
        y = oracle(rows, base, deltas, coeffs, base_coeffs, bias, *conv, index, inner, choice.algorithm)
        return reference.scale_shift(y, *tables, activation, index, inner) if follows else y
    else:
        # The kernel for depthwise convolutions sums weights in float32 and rounds y alone: blend and split at once.
        own = {"cpu": "depthwise", "triton": "implicit"}.get(choice.backend) if conv else None
        kernel = own or choice.algorithm
        where = ((None, None, None), 1) if one else (index, inner)
        summed = coeffs.flatten() if one else coeffs
        if grad:
            call = Call(*where, flat, kernel, conv)
            y = cast(Tensor, Delta.apply(call, rows, base, summed, base_coeffs, bias, *deltas))  # type: ignore[no-untyped-call]
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


def _any_requires_grad(x: Tensor, base: Tensor, coeffs: Tensor, bias: Tensor | None, deltas: list[Tensor]) -> bool:
    if x.requires_grad or base.requires_grad or coeffs.requires_grad or (bias is not None and bias.requires_grad):
        return True
    for delta in deltas:  # a generator for any() would cost as much again
        if delta.requires_grad:
            return True
    return False
