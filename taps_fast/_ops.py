"""Every operator of the library: its schema, its output under tracing, and where its kernels live.

This file needs torch alone. A schema is the contract that each backend implements:

* ``taps_fast::linear_*`` on CPU comes from the C++ extension (``csrc/cpu``), which registers itself when
  `taps_fast._ext` loads it; on CUDA from Triton (``kernels/``) or the CUDA extension, imported on first use.
* ``taps_fast::conv2d_*`` comes from `taps_fast._aten` on every device.

Arguments, in the vocabulary of CONTRIBUTING.md (M rows, I and O features, K deltas, T tasks, B samples):

    x [M, I], dy [M, O]     any strides
    base [O, I]             deltas: K tensors shaped like base, same dtype as x, any strides
    coeffs                  [K], or [T, K] with tasks; float32, or float64 when x is float64; contiguous
    base_coeffs             what multiplies ``base``: one number for each task ([1], or [T] with tasks); None means 1
    bias                    [O], or [T + 1, O] with tasks, whose last row belongs to the rows of no task (id -1)
    ids, order, offsets     a `TaskBatch` (all three or none): ids [B]; samples of group g are
                            ``order[offsets[g]:offsets[g + 1]]``; group 0 holds id -1, group t + 1 task t
    inner                   rows r and ids: sample(r) = (r // inner) % B
    algorithm               chosen by `taps_fast._dispatch`; a kernel that does not know it raises

`linear_dw` computes ``dcoeffs`` at the flat positions ``pairs`` (t * K + k; empty: all of them) when
``need_dcoeffs``, one gradient for each delta index in ``ddeltas_for``, and ``dbase`` when ``need_dbase``.
Its arity is fixed: what was not asked for comes back with 0 elements, and positions outside ``pairs`` are 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_GROUPS = "Tensor? ids, Tensor? order, Tensor? offsets, int inner"
_WEIGHT = "Tensor base, Tensor[] deltas, Tensor coeffs, Tensor? base_coeffs"
_CONV = "int[2] stride, int[2] padding, int[2] dilation, int groups"
_WANTED = "int[] pairs, int[] ddeltas_for, bool need_dcoeffs, bool need_dbase"

SCHEMAS = {
    "linear_fwd": f"(Tensor x, {_WEIGHT}, Tensor? bias, {_GROUPS}, str algorithm) -> Tensor",
    "linear_dx": f"(Tensor dy, {_WEIGHT}, {_GROUPS}, str algorithm) -> Tensor",
    "linear_dw": f"(Tensor dy, Tensor x, {_WEIGHT}, {_GROUPS}, {_WANTED}) -> (Tensor, Tensor[], Tensor)",
    "conv2d_fwd": f"(Tensor x, {_WEIGHT}, Tensor? bias, {_CONV}, {_GROUPS}, str algorithm) -> Tensor",
    "conv2d_dx": f"(Tensor dy, {_WEIGHT}, int[2] size, {_CONV}, {_GROUPS}, str algorithm) -> Tensor",
    "conv2d_dw": f"(Tensor dy, Tensor x, {_WEIGHT}, {_CONV}, {_GROUPS}, {_WANTED}) -> (Tensor, Tensor[], Tensor)",
}

for _name, _schema in SCHEMAS.items():
    torch.library.define(f"taps_fast::{_name}", _schema, tags=(torch.Tag.needs_fixed_stride_order,))


@torch.library.register_fake("taps_fast::linear_fwd")
def _(x, base, deltas, coeffs, base_coeffs, bias, ids, order, offsets, inner, algorithm):
    return x.new_empty(x.shape[0], base.shape[0])


@torch.library.register_fake("taps_fast::linear_dx")
def _(dy, base, deltas, coeffs, base_coeffs, ids, order, offsets, inner, algorithm):
    return dy.new_empty(dy.shape[0], base.shape[1])


def _fake_dw(
    base: Tensor, coeffs: Tensor, wanted: Sequence, shape: Sequence[int]
) -> tuple[Tensor, list[Tensor], Tensor]:
    _, ddeltas_for, need_dcoeffs, need_dbase = wanted
    dcoeffs = coeffs.new_empty(coeffs.shape if need_dcoeffs else (0,))
    ddeltas = [base.new_empty(shape) for _ in ddeltas_for]
    return dcoeffs, ddeltas, base.new_empty(shape if need_dbase else (0,))


@torch.library.register_fake("taps_fast::linear_dw")
def _(dy, x, base, deltas, coeffs, base_coeffs, ids, order, offsets, inner, *wanted):
    return _fake_dw(base, coeffs, wanted, (dy.shape[1], x.shape[1]))


@torch.library.register_fake("taps_fast::conv2d_fwd")
def _(x, base, deltas, coeffs, base_coeffs, bias, stride, padding, dilation, groups, *rest):
    return torch.nn.functional.conv2d(x, base, None, stride, padding, dilation, groups)


@torch.library.register_fake("taps_fast::conv2d_dx")
def _(dy, base, deltas, coeffs, base_coeffs, size, stride, padding, dilation, groups, *rest):
    shape = (dy.shape[0], base.shape[1] * groups, *size)
    return torch.nn.grad.conv2d_input(shape, base, dy, stride, padding, dilation, groups)


@torch.library.register_fake("taps_fast::conv2d_dw")
def _(dy, x, base, deltas, coeffs, base_coeffs, stride, padding, dilation, groups, ids, order, offsets, inner, *wanted):
    return _fake_dw(base, coeffs, wanted, base.shape)


def _conv2d(name: str) -> None:
    def run(*args):
        from . import _aten

        return getattr(_aten, name)(*args)

    torch.library.impl(f"taps_fast::{name}", "CompositeExplicitAutograd")(run)


def _linear_on_cuda(name: str) -> None:
    def run(*args):
        from .kernels import linear

        return getattr(linear, name)(*args)

    torch.library.impl(f"taps_fast::{name}", "CUDA")(run)


for _name in SCHEMAS:
    (_conv2d if _name.startswith("conv2d") else _linear_on_cuda)(_name)
