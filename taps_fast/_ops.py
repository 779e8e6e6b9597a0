"""Every operator of the library: its schema, and where its kernels live.

A schema is the contract that each backend implements:

* ``taps_fast::linear_*`` on CPU comes from the C++ extension (``csrc/cpu``), which registers itself when
  `taps_fast._ext` loads it; on CUDA from Triton (``kernels/``), imported on first use.
* ``taps_fast::linear_grad`` is linear_dx and linear_dw in one call, where they are. On CPU it makes both products by
  PyTorch with "merge", and with "blend" where that is faster.
* ``taps_fast::linear_stream`` is linear_fwd for few rows, on CUDA from the C++ extension (``csrc/cuda``).
* ``taps_fast::linear_coded`` is linear_fwd with codes among the deltas, and ``linear_low_rank_`` adds deltas of low
  rank to a result, on CPU from the C++ extension.
* ``taps_fast::conv2d_*`` comes from `taps_fast._aten` on every device, but for ``conv2d_implicit``: conv2d_fwd without
  groups, on CUDA from Triton; ``conv2d_merge``: conv2d_fwd by that algorithm, and ``conv2d_grad``, on CPU from the C++
  extension, which hands layouts that it does not know to their overloads ``uncompiled``.
* ``taps_fast::scale_shift*`` and ``moments`` come from the C++ extensions; on CUDA without one from Triton where it is
  installed (but for float64); from plain PyTorch (`taps_fast._pointwise`) wherever no kernel is registered. Of each
  the overload ``uncompiled`` is what runs without an extension, to which that of CUDA hands chips it was not built for.
* ``taps_fast::fold`` and ``fold_grad`` come from the C++ extension on CPU, from Triton on CUDA where it is installed,
  and from plain PyTorch (`taps_fast._fold`) wherever no kernel is registered.
* ``taps_fast::coded_*`` come from the C++ extension on CPU, from Triton on CUDA where it is installed (but for
  float64), and from plain PyTorch (`taps_fast._coded`) wherever no kernel is registered.

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
``need_dcoeffs``, one gradient for each delta index in ``ddeltas_for``, ``dbase`` when ``need_dbase``, and when
``need_dbias`` the sums of dy over the rows of each task, [T + 1, O] (last row: the base's) or [1, O] without tasks, in
the dtype of coefficients. Its arity is fixed: what was not asked for comes back with 0 elements, and positions outside
``pairs`` are 0.

`conv2d_grad` computes the same of convolutions, without ``dbias`` and in another order: dx [N, C, H, W] when
``need_dx``; a gradient for each of ``ddeltas_for``, and that of the base after them when ``need_dbase``; dcoeffs. With
``split`` no summed weight is rounded on dx's way.

`depthwise` takes x [N, H, W, C] and sums its images' products with ``weight[table[n]]``, [taps, C] in the dtype of
coefficients. On a CPU `conv2d_fwd` runs by it with algorithm "depthwise".

The pointwise operators take x [N, C, …] with channels on axis 1 (rows [M, C] too), and tables [C], or [T + 1, C] with
ids, in the dtype of coefficients; a table that is None is all ones (scale) or zeros. With u = scale·x + shift:

    scale_shift             y = act(u)                          scale_shift_ writes it over a dense x
    scale_shift_dx          dx = scale·du + slope·x + offset    du = dy·act'(u)
    scale_shift_sums        Σ du·(x - center) and Σ du over the rows of each task: [T + 1, C], or [1, C] without ids
    moments                 mean and biased variance of x over the same rows; 0 for a task without any
    activation              "none", "relu", "relu6", "silu" or "gelu"

`batch_norm_*` and `group_norm*` are the norms of a CPU; `taps_fast.norms` has their formulas, and composes them of the
operators above elsewhere. Each list has T + 1 vectors of C elements, the base's last, or none. Those that train return
what their gradients want too, in the dtype of coefficients: a batch norm's mean and biased variance, [T + 1, C], by the
rows of each task but for the tables ``fixed``, whose statistics are given; a group norm's mean and 1 / √(variance +
eps), [N, groups]. Gradients are dx (0 elements unless ``need_dx``) and those of weights and biases, [T + 1, C].
`track_statistics` moves running statistics by those that a batch norm found: of the tables ``of`` whose tasks have
samples, each of ``values`` values a channel; a momentum below 0 means a cumulative average.

`fold` takes L weights at once, of any shapes and one dtype, all contiguous; what it returns is as `_fold` says:

    bases, dweights         L tensors             deltas: L·K tensors, those of weight l at l·K ... l·K + K - 1
    coeffs                  [L, P, K]             parts: none (P = 1), or L uint8 tensors of values below P
    masks                   none, or L tensors, bool or of the weights' dtype

`task_plan` makes a `TaskBatch` on the device in one launch: order, offsets, inverse (where in order a sample is) and
valid, one bool: whether every id was in range. `sort_tasks` makes one on the host: order, offsets, and how many ids
were out of range; if any were, order is not filled. `layer_plan` is what a layer's grouped product wants, in one
launch: tasks whose weight is the base's count as the base. slots [B] (a sample's group), order and offsets as in a
`TaskBatch` of those groups, place [rows] (the row at each position of the grouped order), ends int32 [T + 1] (positions
before each group's end).

A delta of `linear_coded` may be codes: uint8 for bits, int8 for bytes. It is then scales[k]∘D_k, with scales[k] [] or
[O] in the dtype of coefficients (of a dense delta: not read) and D as below; tile_of[k] is -1, or a mask's place in
``tiles``. Codes and scales with one more axis in front, of n, are n deltas. Algorithm "split" decodes codes in
registers beside one product of the base, "blend" into the panel that a weight is summed in, and "auto" chooses for each
task by its rows.

`linear_low_rank_` adds Σ_k coeffs[t, k]·scale[k]·b[k] a[k] x to y [M, O], for a [K, r, I] and b, each transposed,
[K, r, O].

`coded_fwd` gives y + factors[t]∘(D_{which[t]} x), and `coded_dx` (factors[t]∘dy) D_{which[t]}, for the rows of each
task t; ``which[t]`` is -1 for a task without. D [O, I] is what ``codes`` stand for by ``format``: "bits" ±1, "mask"
``tile`` or 0 (both as `taps_fast.formats.pack_bits` lays them out), "int8" themselves. x, dy, y, tile, factors [T, O]
are contiguous, factors in the dtype of coefficients; y may be, and its dtype is the result's.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _ext, _fakes, _flops

_CODES = "Tensor[] codes, Tensor? tile, Tensor factors, int[] which"
_GROUPS = "Tensor? ids, Tensor? order, Tensor? offsets, int inner"
_WEIGHT = "Tensor base, Tensor[] deltas, Tensor coeffs, Tensor? base_coeffs"
_CONV = "int[2] stride, int[2] padding, int[2] dilation, int groups"
_TABLES = "Tensor? scale, Tensor? shift"
_AFFINE = "Tensor[] weight, Tensor[] bias"
_FOLD = "Tensor[] deltas, Tensor coeffs, Tensor[] parts, Tensor[] masks"
_WANTED = "int[] pairs, int[] ddeltas_for, bool need_dcoeffs, bool need_dbase"

SCHEMAS = {
    "linear_fwd": f"(Tensor x, {_WEIGHT}, Tensor? bias, {_GROUPS}, str algorithm) -> Tensor",
    "linear_dx": f"(Tensor dy, {_WEIGHT}, {_GROUPS}, str algorithm) -> Tensor",
    "linear_dw": f"(Tensor dy, Tensor x, {_WEIGHT}, {_GROUPS}, {_WANTED}, bool need_dbias)"
    " -> (Tensor, Tensor[], Tensor, Tensor)",
    "linear_grad": f"(Tensor dy, Tensor x, {_WEIGHT}, {_GROUPS}, str algorithm, bool need_dx, {_WANTED}, "
    "bool need_dbias) -> (Tensor, Tensor, Tensor[], Tensor, Tensor)",
    "linear_stream": f"(Tensor x, {_WEIGHT}, Tensor? bias, Tensor? ids, int inner) -> Tensor",
    "linear_coded": f"(Tensor x, {_WEIGHT}, Tensor? bias, {_GROUPS}, str algorithm, Tensor[] scales, Tensor[] tiles, "
    "int[] tile_of) -> Tensor",
    "linear_low_rank_": f"(Tensor(a!) y, Tensor x, Tensor a, Tensor b, Tensor scale, Tensor coeffs, {_GROUPS}) -> ()",
    "sort_tasks": "(Tensor ids, int num_tasks) -> (Tensor, Tensor, int)",
    "task_plan": "(Tensor ids, int num_tasks) -> (Tensor, Tensor, Tensor, Tensor)",
    "layer_plan": "(Tensor ids, Tensor coeffs, Tensor? base_coeffs, int rows, int inner)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "conv2d_fwd": f"(Tensor x, {_WEIGHT}, Tensor? bias, {_CONV}, {_GROUPS}, str algorithm) -> Tensor",
    "conv2d_merge": f"(Tensor x, {_WEIGHT}, Tensor? bias, {_CONV}, {_GROUPS}) -> Tensor",
    "conv2d_grad": f"(Tensor dy, Tensor x, {_WEIGHT}, {_CONV}, {_GROUPS}, bool split, bool need_dx, {_WANTED})"
    " -> (Tensor, Tensor[], Tensor)",
    "conv2d_implicit": f"(Tensor x, {_WEIGHT}, Tensor? bias, int[2] stride, int[2] padding, int[2] dilation, "
    "Tensor? ids, int inner) -> Tensor",
    "depthwise": "(Tensor x, Tensor weight, Tensor table, int[2] kernel, int[2] stride, int[2] padding, "
    "int[2] dilation) -> Tensor",
    "scale_shift": f"(Tensor x, {_TABLES}, {_GROUPS}, str activation) -> Tensor",
    "scale_shift_": f"(Tensor(a!) x, {_TABLES}, {_GROUPS}, str activation) -> ()",
    "scale_shift_dx": f"(Tensor dy, Tensor x, {_TABLES}, Tensor? slope, Tensor? offset, {_GROUPS}, str activation)"
    " -> Tensor",
    "scale_shift_sums": f"(Tensor dy, Tensor x, {_TABLES}, Tensor? center, {_GROUPS}, str activation)"
    " -> (Tensor, Tensor)",
    "moments": f"(Tensor x, {_GROUPS}) -> (Tensor, Tensor)",
    "batch_norm_eval": f"(Tensor x, {_AFFINE}, Tensor[] mean, Tensor[] variance, float[] eps, {_GROUPS}) -> Tensor",
    "batch_norm_train": f"(Tensor x, {_AFFINE}, Tensor[] mean, Tensor[] variance, int[] fixed, float[] eps, {_GROUPS})"
    " -> (Tensor, Tensor, Tensor)",
    "batch_norm_grad": "(Tensor dy, Tensor x, Tensor[] weight, Tensor mean, Tensor variance, int[] fixed, float[] eps, "
    f"{_GROUPS}, bool need_dx) -> (Tensor, Tensor, Tensor)",
    "track_statistics": "(Tensor(a!)[] means, Tensor(b!)[] variances, Tensor(c!)[] batches, int[] of, "
    "float[] momentum, Tensor mean, Tensor variance, Tensor offsets, int values) -> ()",
    "group_norm": f"(Tensor x, {_AFFINE}, int groups, float eps, bool center, {_GROUPS}) -> Tensor",
    "group_norm_train": f"(Tensor x, {_AFFINE}, int groups, float eps, bool center, {_GROUPS})"
    " -> (Tensor, Tensor, Tensor)",
    "group_norm_grad": "(Tensor dy, Tensor x, Tensor[] weight, Tensor mean, Tensor rstd, bool center, "
    f"{_GROUPS}, bool need_dx) -> (Tensor, Tensor, Tensor)",
    "fold": f"(Tensor[] bases, {_FOLD}) -> Tensor[]",
    "coded_fwd": f"(Tensor y, Tensor x, {_CODES}, {_GROUPS}, str format) -> Tensor",
    "coded_dx": f"(Tensor dy, {_CODES}, {_GROUPS}, str format, int in_features) -> Tensor",
    "fold_grad": f"(Tensor[] dweights, {_FOLD}, bool need_dcoeffs, bool need_dmasks) -> (Tensor, Tensor[])",
}


def _from(module: str, name: str) -> Callable[..., Any]:
    """A kernel that is imported when it first runs."""

    @functools.cache
    def kernel() -> Callable[..., Any]:
        found: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return found

    return lambda *args: kernel()(*args)


_NORMS = {name for name in SCHEMAS if "_norm" in name or name == "track_statistics"}
_COMPILED = {
    "linear_stream",
    "linear_coded",
    "linear_low_rank_",
    "task_plan",
    "layer_plan",
    "sort_tasks",
    *_NORMS,
}
"""Operators that a compiled extension alone implements; its loading registers them."""
POINTWISE = {"scale_shift", "scale_shift_", "scale_shift_dx", "scale_shift_sums", "moments"}
_TRITON = importlib.util.find_spec("triton") is not None


def _unless_float64(kernel: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel, for the types that it computes."""

    def run(first: Tensor, *rest: Any) -> Any:
        return (plain if first.dtype == torch.float64 else kernel)(first, *rest)

    return run


for _name, _schema in SCHEMAS.items():
    _op = f"taps_fast::{_name}"
    torch.library.define(_op, _schema, tags=(torch.Tag.needs_fixed_stride_order,))
    torch.library.register_fake(_op, getattr(_fakes, _name))
    if _name in _COMPILED:
        continue
    if _name == "conv2d_implicit":
        torch.library.impl(_op, "CUDA", _from("taps_fast.kernels.conv2d", _name))
    elif _name.startswith("conv2d"):
        torch.library.impl(_op, "CompositeExplicitAutograd", _from("taps_fast._aten", _name))
        if _name in ("conv2d_merge", "conv2d_grad"):  # what of it the CPU's kernel leaves to PyTorch
            torch.library.define(f"{_op}.uncompiled", _schema, tags=(torch.Tag.needs_fixed_stride_order,))
            torch.library.impl(f"{_op}.uncompiled", "CompositeExplicitAutograd", _from("taps_fast._aten", _name))
    elif _name.startswith("linear"):
        torch.library.impl(_op, "CUDA", _from("taps_fast.kernels.linear", _name))
    else:
        _part = _name.partition("_")[0] if _name.startswith(("coded", "fold")) else "pointwise"
        _plain, _kernel = _from(f"taps_fast._{_part}", _name), _from(f"taps_fast.kernels.{_part}", _name)
        _chosen = _kernel if _part == "fold" else _unless_float64(_kernel, _plain)
        _compiled = _name in POINTWISE and _ext.CUDA_ERROR is None
        if _name in POINTWISE:
            torch.library.define(f"{_op}.uncompiled", _schema, tags=(torch.Tag.needs_fixed_stride_order,))
        for _each in (_op, f"{_op}.uncompiled")[: 1 + (_name in POINTWISE)]:
            torch.library.impl(_each, "CompositeExplicitAutograd", _plain)
            if _TRITON and _name != "depthwise" and not (_each == _op and _compiled):
                torch.library.impl(_each, "CUDA", _chosen)

_flops.register()
