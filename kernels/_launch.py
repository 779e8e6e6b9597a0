"""Starts compiled Triton kernels again without Triton's own way to them, which the host would walk at each launch.

Triton describes each argument of each launch anew to find what it compiled. Here a launch like an earlier one goes to
the launcher that the earlier one found, with the arguments that Triton would give it: all in the order of the kernel's
signature, constexprs among them, addresses in place of tensors. What no earlier launch was like goes Triton's way, and
so does everything while a hook wants to see launches, where an address is not a multiple of 16, and with a Triton whose
launcher nobody has read. Triton's settings hold as they were when a kernel was first started.

Kernels name what they take addresses for ``…_ptr``, or as in TUPLES, and have it before all numbers.
"""

from __future__ import annotations

import functools
import operator
import os
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

from ._configs import version

READ, RUN = ((3, 6), (3, 9)), ((3, 6),)
"""Versions of Triton in whose `JITFunction.run` and launchers was looked up what is handed on; those of them with which
a GPU has run it, for which it is the default."""
KEPT = 4096
"""Launches that each kernel knows at most; sizes are told apart by value."""
WANTED = os.environ.get("TAPS_FAST_TRITON_LAUNCH") or ("direct" if version() in RUN else "triton")
if WANTED not in ("direct", "triton"):
    raise ValueError(f"TAPS_FAST_TRITON_LAUNCH must be direct or triton, got {WANTED!r}")
DIRECT = version() in READ and torch.version.hip is None and WANTED == "direct"
TUPLES = ("sources", "outputs", "codes", "deltas")
"""Parameters that are tensors one by one, or a table of their addresses."""

_dtype = operator.attrgetter("dtype")


def direct(kernel: Any) -> Any:
    """A decorator of kernels whose tensors are positional arguments; in the interpreter it changes nothing."""
    return Kernel(kernel) if DIRECT and isinstance(kernel, triton.JITFunction) else kernel


class Kernel:
    """What `triton.jit` makes of a function, and the launches of it that are known."""

    def __init__(self, jit: Any) -> None:
        self.jit = jit
        self.known: dict[Any, tuple[Any, ...]] = {}
        addressed = [name.endswith("_ptr") or name in TUPLES for name in jit.arg_names]
        self.addresses = sum(addressed)
        if not all(addressed[: self.addresses]):
            raise TypeError(f"{jit.fn.__name__}: addresses must come before numbers")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.jit, name)

    def __getitem__(self, grid: tuple[int]) -> Any:
        return functools.partial(self.launch, grid)

    def launch(self, grid: tuple[int], *args: Any, **kwargs: Any) -> None:
        kinds, values, bits = described(args[: self.addresses])
        if bits % 16 or self.jit.pre_run_hooks or is_watched():
            self.jit[grid](*args, **kwargs)
            return
        driver = triton.runtime.driver.active
        device = driver.get_current_device()
        numbers = args[self.addresses :]
        key = (device, kinds, numbers, tuple(kwargs.items()))
        found = self.known.get(key)
        if found is None:
            self._first(key, grid, args, kwargs)
            return
        _, run, function, metadata, rest = found
        stream = driver.get_current_stream(device)
        run(grid[0], 1, 1, stream, function, metadata, None, None, None, *values, *numbers, *rest)

    def _first(self, key: Any, grid: tuple[int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        compiled = self.jit[grid](*args, **kwargs)
        if not isinstance(compiled, CompiledKernel):
            return
        if len(self.known) >= KEPT:
            self.known.clear()
        rest = tuple(kwargs[name] for name in self.jit.arg_names[len(args) :])
        self.known[key] = (compiled, compiled.run, compiled.function, compiled.packed_metadata, rest)


def is_watched() -> bool:
    """Whether somebody wants to see each launch of Triton."""
    runtime = triton.knobs.runtime
    return bool(getattr(runtime.launch_enter_hook, "calls", True) or getattr(runtime.launch_exit_hook, "calls", True))


def described(tensors: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[Any], int]:
    """What tells compiled kernels apart, where all addresses are multiples of 16; addresses in place of tensors; and
    all bits that are set in one of them. No Python is executed for each tensor of a tuple."""
    kinds: list[Any] = []
    values: list[Any] = []
    bits = 0
    for tensor in tensors:
        if tensor is None:
            values.append(None)
            kinds.append(None)
        elif type(tensor) is tuple:
            addresses = tuple(map(Tensor.data_ptr, tensor))
            bits = functools.reduce(operator.or_, addresses, bits)
            values.append(addresses)
            kinds.append((tuple(map(_dtype, tensor)), tuple(map(Tensor.get_device, tensor))))
        else:
            address = tensor.data_ptr()
            bits |= address
            values.append(address)
            kinds.append((tensor.dtype, tensor.get_device()))
    return tuple(kinds), values, bits
