"""The CUDA kernels beside what was predicted of them: bandwidth, time on the host, time to plan a batch.

    python -m benchmarks.cuda_kernels

Prints the rows of the table in benchmarks/README.md. Weights go round in enough sets to leave the last cache.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from taps_fast import _ext
from taps_fast.functional import delta_linear
from taps_fast.tasks import TaskBatch

from .timing import measure

SIZE = 4096
SETS = 8  # of weights: half a gigabyte, beyond any L2
SECONDS = 0.5


def sets_of(make: Callable[[], Callable[[], object]]) -> list[Callable[[], object]]:
    return [make() for _ in range(SETS)]


def copy() -> Callable[[], object]:
    """As many bytes as a base and a delta, half of them read and half written."""
    source = torch.randn(SIZE, SIZE, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def one_task(rows: int) -> Callable[[], object]:
    x = torch.randn(rows, SIZE, device="cuda", dtype=torch.bfloat16)
    base, delta = (torch.randn(SIZE, SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    coeffs = torch.ones(1, device="cuda")
    return lambda: delta_linear(x, base, [delta], coeffs, backend="cuda")


def host_microseconds(call: Callable[[], object], calls: int = 500) -> float:
    """Of one call that nothing on the device delays."""
    found = []
    for _ in range(7):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        found.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(found)


@torch.no_grad()
def main() -> None:
    if not _ext.CUDA_LOADED or not torch.cuda.is_available():
        raise SystemExit(f"no CUDA kernels to time: {_ext.CUDA_ERROR or 'no CUDA device'}")
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}")
    rows = (1, 8, 16)
    found = measure({"copy": sets_of(copy)} | {str(m): sets_of(lambda m=m: one_task(m)) for m in rows}, SECONDS, "cuda")
    for m in rows:
        share = found["copy"].median / found[str(m)].median
        print(f"stream, {SIZE} x {SIZE}, one delta, bfloat16, {m} rows: {share:.0%} of the bandwidth of a copy")
    ids = torch.arange(16, device="cuda") % 4
    x, *weights = (torch.randn(n, 64, device="cuda", dtype=torch.bfloat16) for n in (16, 64, 64, 64, 64, 64))
    batch, coeffs = TaskBatch.from_ids(ids, 4), torch.eye(4, device="cuda")
    layer = host_microseconds(lambda: delta_linear(x, weights[0], weights[1:], coeffs, tasks=batch, backend="cuda"))
    print(f"host, one mixed layer of 4 deltas: {layer:.1f} µs")
    many = torch.randint(-1, 256, (4096,), device="cuda")
    plan = measure({"plan": [lambda: torch.ops.taps_fast.task_plan(many, 256)]}, SECONDS, "cuda")["plan"]
    print(f"task_plan, 4096 samples and 256 tasks: {1e3 * plan.median:.1f} µs")


if __name__ == "__main__":
    main()
