"""Tile sizes of every kernel: entries of `tuned.json`, a rule for what fits, and a formula for the rest. No search.

The entries that nobody has measured are predictions from compiled code (registers, shared memory, instructions). The
tests compile each one for its chip.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton

from taps_fast import _tuned

Capability = tuple[int, int]

SHARED_BYTES = {(8, 0): 166912, (8, 7): 166912, (9, 0): 232448, (10, 0): 232448, (10, 3): 232448}
SHARED_BYTES_ELSEWHERE = 101376

IEEE = ".ieee"
"""Ends the name of a kernel's entries for products on ordinary units, whose best tiles are others."""
KERNELS = ("split", "dx", "dw", "conv", "split.ieee", "dx.ieee", "dw.ieee")


@dataclass(frozen=True, slots=True)
class Config:
    """Blocks are named by the kernel's own sides: what it reduces over is O for dx, M for dw, I for split and conv.

    The rows of conv are the output pixels of one image, its I the channels of one tap.
    """

    block_m: int
    block_o: int
    block_i: int
    warps: int
    stages: int
    registers: int | None = None
    """What the assembler may use for a thread. Left to its own guess it spills in some kernels that need not."""

    def shared_bytes(self, kernel: str, itemsize: int) -> int:
        """Both operands of one step, once a stage."""
        rows_are_reduced = kernel.removesuffix(IEEE) == "dw"
        reduced = self.block_m if rows_are_reduced else self.block_i
        kept = self.block_o + (self.block_i if rows_are_reduced else self.block_m)
        return self.stages * reduced * kept * itemsize


def shared_limit(capability: Capability) -> int:
    """Bytes of shared memory that one program may use."""
    return SHARED_BYTES.get(capability, SHARED_BYTES_ELSEWHERE)


def supports(config: Config, kernel: str, itemsize: int, capability: Capability) -> bool:
    """Whether the chip holds the operands; 1 KB is left for reductions."""
    return config.shared_bytes(kernel, itemsize) <= shared_limit(capability) - 1024


@functools.cache
def entries(kernel: str, itemsize: int, capability: Capability) -> list[tuple[float, Config]]:
    """(rows up to, config) in ascending order, the last for any number of rows."""
    found: dict[str, list[tuple[float, Config]]] = {}
    for e in _tuned.DATA["configs"]:
        if (e["kernel"], e["bytes"]) == (kernel, itemsize):
            rows = float("inf") if e["rows"] is None else e["rows"]
            config = Config(*e["blocks"], e["warps"], e["stages"], e.get("registers"))
            found.setdefault(e["arch"], []).append((rows, config))
    arch = _tuned.arch_of(capability)
    own = found.get(arch) or found.get(_tuned.LIKE.get(arch, _tuned.OTHER)) or found[_tuned.OTHER]
    return sorted(own, key=lambda entry: entry[0])


@functools.lru_cache(maxsize=1024)
def choose(kernel: str, rows: int, itemsize: int, capability: Capability) -> Config:
    """The entry for this many rows, made to fit the chip."""
    config = next(config for most, config in entries(kernel, itemsize, capability) if rows <= most)
    return fitted(config, kernel, itemsize, capability)


def fitted(config: Config, kernel: str, itemsize: int, capability: Capability) -> Config:
    """The formula: fewer stages, then a shorter step, until the operands fit."""
    while not supports(config, kernel, itemsize, capability):
        if config.stages > 2:
            config = replace(config, stages=config.stages - 1)
        elif kernel.removesuffix(IEEE) == "dw":
            config = replace(config, block_m=config.block_m // 2)
        else:
            config = replace(config, block_i=config.block_i // 2)
    return config


def splits(programs: int, steps: int, processors: int, resident: int = 2) -> int:
    """Into how many parts to cut a reduction of ``steps`` when ``programs`` tiles are too few for the chip.

    Two programs a processor hide each other's latency, where it holds them; a part keeps at least four steps to fill
    its pipeline. A power of two, since each value compiles once.
    """
    most = max(1, min(resident * processors // max(programs, 1), steps // 4, 16))
    return 1 << most.bit_length() - 1


@functools.cache
def resident(config: Config, kernel: str, itemsize: int, capability: Capability) -> int:
    """Programs that a processor is given at most, of two, by the shared memory that they take."""
    return 2 if 2 * config.shared_bytes(kernel, itemsize) <= shared_limit(capability) - 2048 else 1


@functools.cache
def capability(device: torch.device) -> Capability:
    """Of a CUDA device; the interpreter, on the CPU, behaves like the smallest chip."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 6)


@functools.cache
def processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count


def precision(dtype: torch.dtype, vendor: Any = torch.backends.cuda.matmul) -> str:
    """float32 products use tf32 only where torch's own GEMM, or what else ``vendor`` stands for, would."""
    return "tf32" if dtype == torch.float32 and vendor.fp32_precision == "tf32" else "ieee"


def named(kernel: str, dtype: torch.dtype) -> str:
    """What the entries of a kernel of matrices are called for products as torch's setting wants them."""
    return kernel + IEEE if dtype == torch.float32 and precision(dtype) == "ieee" else kernel


def version() -> tuple[int, int]:
    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)
