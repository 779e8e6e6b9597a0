"""Starts compiled Triton kernels again without Triton's own way to them, which the host would walk at each launch.

Triton describes each argument of each launch anew to find what it compiled. Here a launch like an earlier one goes to
the launcher that the earlier one found, with the arguments that Triton would give it: all in the order of the kernel's
signature, constexprs among them, addresses in place of tensors. What no earlier launch was like goes Triton's way, and
so does everything while a hook wants to see launches, where an address is not a multiple of 16, and with a Triton whose
launcher nobody has read. Triton's settings hold as they were when a kernel was first started.
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

READ = ((3, 6), (3, 9))
"""Versions of Triton in whose `JITFunction.run` and launchers was looked up what is handed on."""
KEPT = 4096
"""Launches that each kernel knows at most; sizes are told apart by value."""
DIRECT = version() in READ and torch.version.hip is None and os.environ.get("TAPS_FAST_TRITON_LAUNCH") == "direct"
"""Asked for: no GPU has run it yet."""

_dtype = operator.attrgetter("dtype")


def direct(kernel: Any) -> Any:
    """A decorator of kernels whose tensors are positional arguments; in the interpreter it changes nothing."""
    return Kernel(kernel) if DIRECT and isinstance(kernel, triton.JITFunction) else kernel


class Kernel:
    """What `triton.jit` makes of a function, and the launches of it that are known."""

    def __init__(self, jit: Any) -> None:
        self.jit = jit
        self.known: dict[Any, tuple[Any, ...]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.jit, name)

    def __getitem__(self, grid: tuple[int]) -> Any:
        return functools.partial(self.launch, grid)

    def launch(self, grid: tuple[int], *args: Any, **kwargs: Any) -> None:
        kinds, values, bits = described(args)
        if bits % 16 or self.jit.pre_run_hooks or is_watched():
            self.jit[grid](*args, **kwargs)
            return
        driver = triton.runtime.driver.active
        device = driver.get_current_device()
        key = (device, kinds, tuple(kwargs.items()))
        found = self.known.get(key)
        if found is None:
            self._first(key, grid, args, kwargs)
            return
        _, run, function, metadata, rest = found
        run(grid[0], 1, 1, driver.get_current_stream(device), function, metadata, None, None, None, *values, *rest)

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
    return any(getattr(hook, "calls", True) for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook))


def described(args: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[Any], int]:
    """What tells compiled kernels apart, where all addresses are multiples of 16; the arguments, addresses in place of
    tensors; and all bits that are set in one of the addresses. No Python is executed for each tensor of a tuple."""
    kinds: list[Any] = []
    values: list[Any] = []
    bits = 0
    for arg in args:
        if isinstance(arg, Tensor):
            address = arg.data_ptr()
            bits |= address
            values.append(address)
            kinds.append((arg.dtype, arg.get_device()))
        elif isinstance(arg, tuple):
            addresses = tuple(map(Tensor.data_ptr, arg))
            bits = functools.reduce(operator.or_, addresses, bits)
            values.append(addresses)
            kinds.append((tuple(map(_dtype, arg)), tuple(map(Tensor.get_device, arg))))
        else:
            values.append(arg)
            kinds.append(arg)
    return tuple(kinds), values, bits
