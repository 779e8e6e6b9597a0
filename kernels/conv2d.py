"""The convolution of a mixed batch on CUDA; arguments and results are those of `taps_fast._ops`.

Gates, coefficients and ids are data, as in `linear`: a captured CUDA graph replays with others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from taps_fast._problem import output_size

from . import _configs, linear
from ._arguments import cdiv, grid, on_its_device
from ._conv import conv2d_kernel
from ._problem import Weight

if TYPE_CHECKING:
    from taps_fast._problem import Problem


def not_supported_reasons(problem: Problem) -> Iterator[str]:
    """Why this kernel cannot take a problem; nothing if it can."""
    # A block's rows are pixels of one image.
    pixels = cdiv(problem.pixels, 16) * 16
    yield from linear.not_supported_reasons(problem._replace(rows=problem.rows * pixels))
    if problem.groups != 1:
        yield f"has no convolution kernel with groups, got {problem.groups}"
    if problem.grad:
        yield "computes no gradients of convolutions: a call that needs them belongs to one backend"


@on_its_device
def conv2d_implicit(
    x: Tensor,
    base: Tensor,
    deltas: Sequence[Tensor],
    coeffs: Tensor,
    base_coeffs: Tensor | None,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ids: Tensor | None,
    inner: int,
) -> Tensor:
    weight = Weight.of(base, deltas, coeffs, base_coeffs)
    out_features = base.shape[0]
    height, width = output_size(x.shape[2:], base.shape[2:], stride, padding, dilation)
    rows = x.new_empty(x.shape[0], height, width, out_features)
    if rows.numel():
        _launch(rows, x, weight, bias, stride, padding, dilation, ids, max(inner, 1))
    y = rows.movedim(-1, 1)
    return y if x.stride(1) == 1 else y.contiguous()


def _launch(
    y: Tensor,
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ids: Tensor | None,
    inner: int,
) -> None:
    """Into y [N, H', W', O], contiguous."""
    _, height, width, O = y.shape
    N, C, H, W = x.shape
    pixels, M = height * width, N * height * width
    taps_h, taps_w = weight.sources[0].shape[2:]
    samples = 1 if ids is None else ids.shape[0]
    config = _configs.choose("conv", pixels, x.element_size(), _configs.capability(x.device))
    tiles = N * cdiv(pixels, config.block_m) * cdiv(O, config.block_o)
    splits = _configs.splits(tiles, taps_h * taps_w * cdiv(C, config.block_i), _configs.processors(x.device))
    target = y if splits == 1 else torch.empty(splits, M, O, dtype=torch.float32, device=x.device)
    has_bias = 0 if bias is None else bias.dim()
    if bias is not None:
        bias = bias.contiguous()
    conv2d_kernel[grid(tiles * splits, N, pixels, O)](
        target,
        x,
        weight.pointers.argument,
        weight.coeffs,
        weight.base_coeffs,
        bias,
        ids,
        N,
        C,
        H,
        W,
        O,
        pixels,
        width,
        taps_h * taps_w,
        taps_w,
        weight.count - 1,
        weight.tasks,
        samples,
        inner,
        *stride,
        *padding,
        *dilation,
        target.stride(0) if splits > 1 else 0,
        *x.stride(),
        *weight.strides,
        BLOCK_M=config.block_m,
        BLOCK_O=config.block_o,
        BLOCK_I=config.block_i,
        BLOCK_S=weight.source_block,
        SPLITS=splits,
        MIXED=ids is not None,
        BAKED=weight.base_coeffs is not None,
        BIAS=has_bias if splits == 1 else 0,
        TABLE=weight.pointers.table,
        PRECISION=_configs.precision(x.dtype, torch.backends.cudnn.conv),
        num_warps=config.warps,
        num_stages=config.stages,
        maxnreg=config.registers,
    )
    if splits > 1:
        linear.sum_splits(y, target, bias, ids, weight.tasks, samples, inner * pixels)
