"""Tile sizes of every kernel: one short table a chip, a rule for what fits, and a formula for the rest. No search.

`TABLE` holds predictions from compiled code (registers, shared memory, instructions), to be replaced by what
`python -m benchmarks.tune` measures. The tests compile each entry for each chip.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import triton

Capability = tuple[int, int]

SHARED_BYTES = {(8, 0): 166912, (8, 7): 166912, (9, 0): 232448, (10, 0): 232448, (10, 3): 232448}
"""Shared memory one program may use; SHARED_BYTES_ELSEWHERE on any other chip."""
SHARED_BYTES_ELSEWHERE = 101376

KERNELS = ("split", "dx", "dw")


@dataclass(frozen=True, slots=True)
class Config:
    """Blocks are named by the kernel's own sides: what it reduces over is O for dx, M for dw and I for split."""

    block_m: int
    block_o: int
    block_i: int
    warps: int
    stages: int

    def shared_bytes(self, kernel: str, itemsize: int) -> int:
        """Both operands of one step, once a stage."""
        reduced = self.block_m if kernel == "dw" else self.block_i
        kept = self.block_o + self.block_i if kernel == "dw" else self.block_o + self.block_m
        return self.stages * reduced * kept * itemsize


def supports(config: Config, kernel: str, itemsize: int, capability: Capability) -> bool:
    """Whether the chip holds the operands; 1 KB is left for reductions."""
    limit = SHARED_BYTES.get(capability, SHARED_BYTES_ELSEWHERE) - 1024
    return config.shared_bytes(kernel, itemsize) <= limit


# (kernel, bytes an element) -> [(rows up to, config)], the last for any number of rows.
Table = dict[tuple[str, int], tuple[tuple[float, Config], ...]]
ANY = float("inf")

HOPPER: Table = {
    ("split", 2): (
        (16, Config(16, 64, 128, 4, 4)),
        (32, Config(32, 64, 128, 4, 4)),
        (64, Config(64, 64, 128, 8, 4)),
        (ANY, Config(64, 128, 64, 8, 4)),
    ),
    ("dx", 2): (
        (16, Config(16, 64, 128, 4, 4)),
        (32, Config(32, 64, 128, 4, 4)),
        (64, Config(64, 64, 128, 8, 4)),
        (ANY, Config(64, 128, 64, 8, 4)),
    ),
    ("dw", 2): ((ANY, Config(64, 128, 128, 8, 4)),),
    ("split", 4): ((16, Config(16, 64, 32, 4, 4)), (ANY, Config(64, 64, 32, 8, 4))),
    ("dx", 4): ((16, Config(16, 64, 32, 4, 4)), (ANY, Config(64, 64, 32, 8, 4))),
    ("dw", 4): ((ANY, Config(32, 64, 64, 8, 3)),),
}
AMPERE: Table = HOPPER | {
    ("dw", 2): ((ANY, Config(32, 128, 128, 8, 4)),),
    ("dw", 4): ((ANY, Config(16, 64, 64, 8, 3)),),
}
BLACKWELL: Table = HOPPER | {
    ("split", 2): (*HOPPER["split", 2][:2], (ANY, Config(64, 64, 128, 8, 4))),
    ("dx", 2): ((16, Config(16, 64, 128, 8, 4)), *HOPPER["dx", 2][1:]),
}
ELSEWHERE: Table = AMPERE
TABLE: dict[Capability, Table] = {(8, 0): AMPERE, (9, 0): HOPPER, (10, 0): BLACKWELL}


@functools.lru_cache(maxsize=1024)
def choose(kernel: str, rows: int, itemsize: int, capability: Capability) -> Config:
    """The table's entry for this many rows, made to fit the chip."""
    entries = TABLE.get(capability, ELSEWHERE)[kernel, itemsize]
    return fitted(next(config for most, config in entries if rows <= most), kernel, itemsize, capability)


def fitted(config: Config, kernel: str, itemsize: int, capability: Capability) -> Config:
    """The formula: fewer stages, then a shorter step, until the operands fit."""
    while not supports(config, kernel, itemsize, capability):
        if config.stages > 2:
            config = replace(config, stages=config.stages - 1)
        elif kernel == "dw":
            config = replace(config, block_m=config.block_m // 2)
        else:
            config = replace(config, block_i=config.block_i // 2)
    return config


def shipped(capability: Capability) -> Iterator[tuple[str, int, Config]]:
    """(kernel, bytes an element, config) of everything `choose` can return on a chip."""
    for (kernel, itemsize), entries in TABLE.get(capability, ELSEWHERE).items():
        for _, config in entries:
            yield kernel, itemsize, fitted(config, kernel, itemsize, capability)


def splits(programs: int, steps: int, processors: int) -> int:
    """Into how many parts to cut a reduction of ``steps`` when ``programs`` tiles are too few for the chip.

    Two programs a processor hide each other's latency; a part keeps at least four steps to fill its pipeline.
    """
    return max(1, min(2 * processors // max(programs, 1), steps // 4, 16))


def capability(device: torch.device) -> Capability:
    """Of a CUDA device; the interpreter, on the CPU, behaves like the smallest chip."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 6)


@functools.cache
def processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count


def precision(dtype: torch.dtype) -> str:
    """float32 products use tf32 only where torch's own GEMM would."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def version() -> tuple[int, int]:
    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)
