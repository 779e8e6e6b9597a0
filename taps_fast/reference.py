"""THE ORACLE: what every backend must compute, in plain PyTorch.

    W_t = base_coeffs[t]·base + Σ_k coeffs[t, k]·deltas[k]        y_r = W_t(r) x_r + bias_t(r)

Sums are formed in the dtype of the coefficients (float32; float64 for float64 inputs). Where a result is
rounded to x's dtype is what tells the algorithms apart:

* ``blend``: W_t is rounded once, then one product;
* ``split``: nothing but y is rounded; the base's and each delta's product share one accumulator.

Gradients come from autograd through these same lines. Everything here traces, reads no value on the host and
costs one product over all rows for the base and one for each delta (split) or for each task (blend), so it is
also the backend of last resort.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .tasks import Index, sample_of_row

Product = Callable[[Tensor, Tensor], Tensor]


def delta_linear(
    x: Tensor,
    base: Tensor,
    deltas: Sequence[Tensor],
    coeffs: Tensor,
    base_coeffs: Tensor | None = None,
    bias: Tensor | None = None,
    index: Index = (None, None, None),
    inner: int = 1,
    algorithm: str = "split",
) -> Tensor:
    """y [M, O] of the formula above for rows x [M, I]; arguments as in `taps_fast._ops`."""
    return _apply(F.linear, 1, x, base, deltas, coeffs, base_coeffs, bias, index, inner, algorithm)


def delta_conv2d(
    x: Tensor,
    base: Tensor,
    deltas: Sequence[Tensor],
    coeffs: Tensor,
    base_coeffs: Tensor | None,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    index: Index = (None, None, None),
    inner: int = 1,
    algorithm: str = "split",
) -> Tensor:
    """y [N, O, H', W'] of the formula above for images x [N, C, H, W]: W_t is image n's kernel."""

    def convolve(images: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(images, weight, None, list(stride), list(padding), list(dilation), groups)

    return _apply(convolve, 3, x, base, deltas, coeffs, base_coeffs, bias, index, inner, algorithm)


def scale_shift(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str | None = None,
    index: Index = (None, None, None),
    inner: int = 1,
) -> Tensor:
    """act(scale·x + shift) for x [N, C, …], channels on axis 1; rounded once, to x's dtype.

    What follows a product in `delta_linear` and `delta_conv2d`, whose own result may be rounded to x's dtype first.
    """
    wide = torch.promote_types(x.dtype, torch.float32)

    def spread(table: Tensor) -> Tensor:
        if table.dim() == 2 and index[0] is not None:
            table = table[_task_of_row(x.shape[0], index[0], inner, table.shape[0] - 1)]
        return table.to(wide).reshape(*table.shape, *(1,) * (x.dim() - 2))

    u = x.to(wide)
    u = u if scale is None else u * spread(scale)
    u = u if shift is None else u + spread(shift)
    return (u if activation is None else getattr(F, activation)(u)).to(x.dtype)


def _apply(
    product: Product,
    trailing: int,
    x: Tensor,
    base: Tensor,
    deltas: Sequence[Tensor],
    coeffs: Tensor,
    base_coeffs: Tensor | None,
    bias: Tensor | None,
    index: Index,
    inner: int,
    algorithm: str,
) -> Tensor:
    """The formula for any product that is linear in its weight; ``trailing`` axes of y follow the row axis."""
    wide = coeffs.dtype
    narrow = x.dtype
    x = x.to(wide)
    if index[0] is None:
        scale = coeffs.new_ones(()) if base_coeffs is None else base_coeffs[0]
        y = _weighted(product, x, base, deltas, scale, list(coeffs.unbind()), narrow, algorithm)
    else:
        row = _task_of_row(x.shape[0], index[0], inner, coeffs.shape[0])
        spread = (-1,) + (1,) * trailing
        if base_coeffs is None:
            base_coeffs = coeffs.new_ones(coeffs.shape[0])
        per_task = torch.cat([base_coeffs[:, None], coeffs], 1)  # [T, 1 + K]
        base_row = torch.cat([per_task.new_ones(1, 1), per_task.new_zeros(1, coeffs.shape[1])], 1)
        per_task = torch.cat([per_task, base_row])
        if algorithm == "blend":
            y = torch.zeros((), dtype=wide, device=x.device)
            for task, c in enumerate(per_task.unbind()):
                mine = _weighted(product, x, base, deltas, c[0], list(c[1:].unbind()), narrow, algorithm)
                y = torch.where((row == task).view(spread), mine, y)
        else:
            columns = [c.view(spread) for c in per_task[row].unbind(1)]
            y = _weighted(product, x, base, deltas, columns[0], columns[1:], narrow, algorithm)
    if bias is not None:
        bias = bias.to(wide)
        if bias.dim() == 2 and index[0] is not None:
            bias = bias[_task_of_row(x.shape[0], index[0], inner, coeffs.shape[0])]
        y = y + bias.reshape(bias.shape + (1,) * (trailing - 1))
    return y.to(narrow)


def _weighted(
    product: Product,
    x: Tensor,
    base: Tensor,
    deltas: Sequence[Tensor],
    scale: Tensor,
    coeffs: Sequence[Tensor],
    narrow: torch.dtype,
    algorithm: str,
) -> Tensor:
    """product(x, scale·base + Σ c·delta), summed before the product (blend) or after it (split)."""
    wide = x.dtype
    if algorithm == "blend":
        weight = scale * base.to(wide)
        for c, delta in zip(coeffs, deltas, strict=True):
            weight = weight + c * delta.to(wide)
        rounded = weight.to(narrow).to(wide)  # its gradient is not rounded: the kernels never round dW
        return product(x, weight + (rounded - weight).detach())
    y = scale * product(x, base.to(wide))
    for c, delta in zip(coeffs, deltas, strict=True):
        y = y + c * product(x, delta.to(wide))
    return y


def _task_of_row(rows: int, ids: Tensor, inner: int, tasks: int) -> Tensor:
    """int64 [rows]: the row of a [T + 1, …] table that each row of x uses; the base's is the last."""
    if ids.shape[0] == 0:
        return ids.new_empty(rows)
    return torch.remainder(ids[sample_of_row(rows, ids.shape[0], inner, ids.device)], tasks + 1)
