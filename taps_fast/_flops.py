"""What each operator costs, as `torch.utils.flop_counter.FlopCounterMode` counts: two for each multiply-add.

That is one product a row, whatever is in a batch, so that a model costs what its merged networks do: how a weight is
formed, and products that "split" adds to this one, are the kernels' choice. Where deltas in another format have
products of their own beside the base's (``linear_low_rank_``, ``coded_*``), one delta a row is counted.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from math import prod
from types import ModuleType
from typing import Any

import torch

COUNTER = "torch.utils.flop_counter"

Shape = Sequence[int]


def _linear(x: Shape, base: Shape, *_: Any, out_shape: Any) -> int:
    return 2 * prod(x) * base[0]


def _linear_dx(dy: Shape, base: Shape, *_: Any, out_shape: Any) -> int:
    return 2 * prod(dy) * base[1]


def _linear_dw(dy: Shape, x: Shape, *rest: Any, out_shape: Any) -> int:
    *_, ddeltas_for, need_dcoeffs, need_dbase, _need_dbias = rest
    return 2 * prod(dy) * x[1] if ddeltas_for or need_dcoeffs or need_dbase else 0


def _linear_grad(dy: Shape, x: Shape, base: Shape, *rest: Any, out_shape: Any) -> int:
    of_x = _linear_dx(dy, base, out_shape=None) if rest[8] else 0
    return of_x + _linear_dw(dy, x, *rest, out_shape=None)


def _conv(x: Shape, base: Shape, *_: Any, out_shape: Shape) -> int:
    return 2 * prod(out_shape) * prod(base[1:])


def _conv_grad(dy: Shape, x: Shape, base: Shape, *rest: Any, out_shape: Any) -> int:
    *_, need_dx, _pairs, ddeltas_for, need_dcoeffs, need_dbase = rest
    products = bool(need_dx) + bool(ddeltas_for or need_dcoeffs or need_dbase)
    return products * 2 * prod(dy) * prod(base[1:])


def _low_rank(y: Shape, x: Shape, a: Shape, *_: Any, out_shape: Any) -> int:
    return 2 * a[1] * (prod(x) + prod(y))


def _coded(y: Shape, x: Shape, *_: Any, out_shape: Any) -> int:
    return 2 * prod(x) * y[1]


def _coded_dx(dy: Shape, *rest: Any, out_shape: Any) -> int:
    return 2 * prod(dy) * int(rest[-1])


FORMULAS: dict[str, Callable[..., int]] = {
    **dict.fromkeys(("linear_fwd", "linear_stream", "linear_coded"), _linear),
    "linear_dx": _linear_dx,
    "linear_dw": _linear_dw,
    "linear_grad": _linear_grad,
    "linear_low_rank_": _low_rank,
    **dict.fromkeys(("conv2d_fwd", "conv2d_merge", "conv2d_implicit"), _conv),
    "conv2d_grad": _conv_grad,
    "coded_fwd": _coded,
    "coded_dx": _coded_dx,
}


def register() -> None:
    """Gives PyTorch's counter the formulas once it is imported: it imports Triton, which takes long."""
    if COUNTER in sys.modules:
        _add(sys.modules[COUNTER])
    else:
        sys.meta_path.insert(0, _WhenImported())


def _add(counter: ModuleType) -> None:
    for name, formula in FORMULAS.items():
        counter.register_flop_formula(getattr(torch.ops.taps_fast, name))(formula)


class _WhenImported(MetaPathFinder):
    """Finds the counter as everybody does, and adds the formulas once it is loaded."""

    found = False

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != COUNTER or self.found:
            return None
        self.found = True  # it stays in the list, which other threads may be walking
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Another loader, and the formulas."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self._loader  # as if this one had not been here
        self._loader.exec_module(module)
        _add(module)
