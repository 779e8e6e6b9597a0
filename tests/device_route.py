"""What a model does on a CUDA device, done on the CPU: the same choices, and Triton's kernels in the interpreter.

The kernels' own tests call them past the layers and the dispatcher, and layers' tests run the CPU's kernels. Between
both lies what only a device would show: which operator is chosen, and what is made of its results.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from taps_fast.kernels import conv2d, linear, pointwise

from taps_fast import _aten, _autograd, _call, _compressed, _dispatch, _ext, _images, _ops, _pointwise
from taps_fast.nn.gated import Gating

NO_EXTENSION = "no extension, as on a device"


class Operators:
    """`torch.ops.taps_fast` as a device has it, and how often each was called."""

    def __init__(self) -> None:
        self.calls: collections.Counter[str] = collections.Counter()

    def __getattr__(self, name: str) -> Any:
        run = next((getattr(m, name) for m in (linear, pointwise, conv2d) if hasattr(m, name)), None)
        if run is None and name.startswith("conv2d"):
            run = getattr(_aten, name)
        if run is None:
            raise AttributeError(f"{name} has no kernel on a device")
        assert name in _ops.SCHEMAS
        if name in _ops.POINTWISE:
            run = _ops._unless_float64(run, getattr(_pointwise, name))
        return Counted(name, run, self.calls)


class Counted:
    """An operator, or its overload `default`."""

    def __init__(self, name: str, run: Callable[..., Any], calls: collections.Counter[str]) -> None:
        self.name, self.run, self.calls, self.default = name, run, calls, self

    def __call__(self, *args: Any) -> Any:
        self.calls[self.name] += 1
        return self.run(*args)


@contextlib.contextmanager
def on_a_device(monkeypatch: Any) -> Iterator[Operators]:
    """Tensors stay on the CPU; what asks for their device is answered as on a GPU without the CUDA extension."""
    operators, select = Operators(), _call.select
    with monkeypatch.context() as patch:
        patch.setattr(_autograd, "ops", operators)
        patch.setattr(_ext, "CPU_ERROR", NO_EXTENSION)
        patch.setitem(_dispatch._REASONS, "cuda", lambda problem: iter([NO_EXTENSION]))
        patch.setitem(_dispatch._REASONS, "triton", _triton)
        patch.setattr(_call, "select", lambda p, *how: select(p._replace(device="cuda"), *how))
        patch.setattr(_images, "at_hand", lambda x: False)
        patch.setattr(_aten, "gradient_dtype", lambda x: x.dtype)
        patch.setattr(Gating, "_scores_at_hand", lambda self: False)
        patch.setattr(_compressed, "used_pairs", _every_pair)
        _dispatch._cached_select.cache_clear()
        try:
            yield operators
        finally:
            _dispatch._cached_select.cache_clear()


def _triton(problem: Any) -> Iterator[str]:
    return (linear if problem.op == "linear" else conv2d).not_supported_reasons(problem)


def _every_pair(coeffs: Any, pairs: Any) -> list[tuple[int, int]]:
    rows, columns = (1, *coeffs.shape)[-2:]
    return list(itertools.product(range(rows), range(columns)) if pairs is None else pairs)
