"""The limit: what this machine's memory and multipliers allow, measured in the run that is judged by it.

    limit = max(modelled bytes / read bandwidth, modelled flops / rate of a plain GEMM on a ready weight)

The models count what no algorithm can avoid: each tensor once, one product a row. Bandwidth is that of the
memory the workload lives in: a stream of the workload's size when hot, one larger than the last cache when cold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from . import timing

TRIES = 7


class Limit(NamedTuple):
    ms: float
    bound: str
    """"bytes" or "flops"."""


class Limits:
    """Bandwidths and rates of one device; each is measured when first asked for."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._bandwidth: dict[int, float] = {}
        self._flops: dict[torch.dtype, float] = {}

    def bandwidth(self, size: int, cold: bool) -> float:
        """Bytes a second: the best of streams that read, and that read and write, over at least ``size`` bytes."""
        beyond = 2 * timing.last_cache_bytes(self.device)
        size = beyond if cold else 1 << max(20, (max(size, 1) - 1).bit_length())
        size = min(size, beyond)
        if size not in self._bandwidth:
            source = torch.ones(size // 4, device=self.device)
            half, other = source.chunk(2)
            streams: list[timing.Call] = [source.sum, lambda: torch.dot(source, source), lambda: half.copy_(other)]
            self._bandwidth[size] = size / min(self._fastest(stream) for stream in streams)
        return self._bandwidth[size]

    def flops(self, dtype: torch.dtype) -> float:
        """Flops a second of a large ``F.linear`` on a ready weight: in this dtype, or in float32 where that is faster.

        Some processors multiply float32 faster than what they would have to widen first.
        """
        n = 2048 if self.device == "cpu" else 8192
        kinds = {dtype, torch.float32} if dtype.itemsize < 4 else {dtype}
        for kind in kinds:
            if kind not in self._flops:
                x, weight = torch.randn(2, n, n, device=self.device).to(kind)
                self._flops[kind] = 2 * n**3 / self._fastest(lambda: torch.nn.functional.linear(x, weight))
        return max(self._flops[kind] for kind in kinds)

    def of(self, size: int, flops: int, dtype: torch.dtype, cold: bool) -> Limit:
        """The limit of work that moves ``size`` bytes and multiplies and adds ``flops`` times."""
        return bound(size / self.bandwidth(size, cold), flops / self.flops(dtype))

    def _fastest(self, call: Callable[[], object]) -> float:
        call()
        call_time = timing.clock(self.device)
        return min(call_time(call) for _ in range(TRIES))


def bound(by_bytes: float, by_flops: float) -> Limit:
    """The larger of two times in seconds."""
    return Limit(1e3 * by_bytes, "bytes") if by_bytes >= by_flops else Limit(1e3 * by_flops, "flops")
