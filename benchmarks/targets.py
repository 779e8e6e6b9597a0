"""What was predicted of the GPU kernels, and what this GPU says: measures the table in benchmarks/README.md.

    python -m benchmarks.targets                       prints the table, with the last column
    python -m benchmarks.targets --out targets.json    and writes it

Times on the device are those of a replayed CUDA graph, so that nothing waits for the host; it goes round in as many
sets of weights as it takes for none to be in a cache. Every result is checked before it is timed.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from taps_fast import _ext
from taps_fast.functional import delta_linear
from taps_fast.tasks import TaskBatch
from taps_fast.testing import assert_no_worse_than_torch

from . import timing

Call = Callable[[], Any]

DEVICE = "cuda"
SIZE = 4096
"""Out and in features."""
DTYPE = torch.bfloat16
COLD_BYTES = 1 << 29
MOST_SETS = 16
SECONDS = 0.3
PLANS = 20
LAYERS = 8


class Target(NamedTuple):
    """``measure`` should give at least ``bound``, or at most, if ``below``."""

    what: str
    bound: float
    below: bool
    form: str
    measure: Callable[[], float]
    cuda: bool = False
    """Whether it is about the C++ kernels."""

    @property
    def predicted(self) -> str:
        return f"{'≤' if self.below else '≥'} {self.form.format(self.bound)}"

    def holds(self, value: float) -> bool:
        return value <= self.bound if self.below else value >= self.bound


class Layer:
    """One layer's tensors: a delta that all rows use, or one for each of ``tasks`` tasks, which take turns."""

    def __init__(self, rows: int, tasks: int | None = None) -> None:
        g = torch.Generator(DEVICE).manual_seed(0)
        self.x = torch.randn(rows, SIZE, generator=g, device=DEVICE).to(DTYPE)
        weights = torch.randn(1 + (tasks or 1), SIZE, SIZE, generator=g, device=DEVICE, dtype=DTYPE) * SIZE**-0.5
        self.base, *self.deltas = weights.unbind()
        self.coeffs = torch.ones(1, device=DEVICE) if tasks is None else torch.eye(tasks, device=DEVICE)
        ids = None if tasks is None else torch.arange(rows, device=DEVICE) % tasks
        self.tasks = None if tasks is None or ids is None else TaskBatch.from_ids(ids, tasks)

    @property
    def bytes(self) -> int:
        """What must move: each weight, x and y once."""
        rows = self.x.shape[0]
        return DTYPE.itemsize * SIZE * (SIZE * (1 + len(self.deltas)) + 2 * rows)

    def run(self, backend: str | None = None, algorithm: str = "auto") -> Tensor:
        how: dict[str, Any] = {"tasks": self.tasks, "backend": backend, "algorithm": algorithm}
        return delta_linear(self.x, self.base, self.deltas, self.coeffs, **how)

    def ready(self, *how: str) -> Call:
        """A call whose result has been compared with each task's own product."""
        y, each = self.run(*how), len(self.deltas)
        for task, delta in enumerate(self.deltas):
            x, weight = self.x[task::each], self.base + delta
            assert_no_worse_than_torch(y[task::each], x.double() @ (self.base.double() + delta).T, F.linear(x, weight))
        return functools.partial(self.run, *how)

    def grouped_mm(self) -> Call:
        """The baseline of a mixed batch: one kernel over weights merged and rows sorted beforehand."""
        merged = torch.stack([self.base + delta for delta in self.deltas]).transpose(1, 2)
        x, ends = self.x[self.tasks.order], self.tasks.offsets[2:].int()
        return lambda: F.grouped_mm(x, merged, offs=ends)


def layers(rows: int, tasks: int | None = None) -> list[Layer]:
    """As many as leave nothing of the first in a cache when it comes again."""
    first = Layer(rows, tasks)
    count = min(math.ceil(COLD_BYTES / first.bytes), MOST_SETS)
    return [first, *(Layer(rows, tasks) for _ in range(count - 1))]


def milliseconds(**contenders: Sequence[Call]) -> dict[str, float]:
    """Of one call of each contender; a replay holds all of its calls, and the contenders' replays take turns."""

    def together(calls: Sequence[Call]) -> None:
        for call in calls:
            call()

    replays = {name: [timing.graph(functools.partial(together, calls))] for name, calls in contenders.items()}
    found = timing.measure(replays, SECONDS, DEVICE)
    return {name: found[name].median / len(calls) for name, calls in contenders.items()}


def share_of_copy(calls: Sequence[Call], moved: int) -> float:
    """Bytes a second of calls that must move ``moved``, over those of a copy."""
    source = torch.empty(COLD_BYTES // 2, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    took = milliseconds(ours=calls, copy=[lambda: target.copy_(source)])
    return moved / took["ours"] / (COLD_BYTES / took["copy"])


def bandwidth(rows: int, tasks: int | None, *how: str) -> float:
    sets = layers(rows, tasks)
    return share_of_copy([layer.ready(*how) for layer in sets], sets[0].bytes)


def over_grouped_mm(tasks: int) -> float:
    """At one row a task."""
    layer = Layer(tasks, tasks)
    took = milliseconds(ours=[layer.ready("triton", "split")], theirs=[layer.grouped_mm()])
    return took["theirs"] / took["ours"]


def merge() -> float:
    """Many layers' weights, one delta each, in one launch."""
    base, delta = (torch.randn(LAYERS, SIZE, SIZE, device=DEVICE, dtype=DTYPE) for _ in range(2))
    coeffs = torch.full((LAYERS, 1, 1), 0.5, device=DEVICE)
    call = functools.partial(torch.ops.taps_fast.fold, list(base), list(delta), coeffs, [], [])
    for found, b, d in zip(call(), base, delta, strict=True):
        assert_no_worse_than_torch(found, b.double() + 0.5 * d.double(), b + 0.5 * d)
    return share_of_copy([call], 3 * base.nbytes)


def weight_gradient(rows: int) -> float:
    """The gradients of a delta and of its coefficient, against the product that makes the weight's alone."""
    layer, g = Layer(rows), torch.Generator(DEVICE).manual_seed(1)
    dy = torch.randn(rows, SIZE, generator=g, device=DEVICE).to(DTYPE)
    one = (dy, layer.x, layer.base, layer.deltas, layer.coeffs, None, None, None, None, 1)
    call = functools.partial(torch.ops.taps_fast.linear_dw, *one, [], [0], True, False, False)
    assert_no_worse_than_torch(call()[1][0], dy.double().T @ layer.x.double(), dy.T @ layer.x)
    took = milliseconds(ours=[call], cublas=[lambda: dy.T @ layer.x])
    return took["cublas"] / took["ours"]


def over_merged(rows: int) -> float:
    """The whole layer, the sum of its weight included, over a plain product with a weight that was summed before."""
    layer = Layer(rows)
    weight = layer.base + layer.deltas[0]
    took = milliseconds(ours=[layer.ready("triton")], cublas=[lambda: F.linear(layer.x, weight)])
    return took["ours"] / took["cublas"]


def host() -> float:
    """Microseconds of one call that nothing on the device delays."""
    ids = torch.arange(16, device=DEVICE) % 4
    x, *weights = (torch.randn(n, 64, device=DEVICE, dtype=DTYPE) for n in (16, 64, 64, 64, 64, 64))
    batch, coeffs = TaskBatch.from_ids(ids, 4), torch.eye(4, device=DEVICE)
    call = functools.partial(
        delta_linear, x, weights[0], weights[1:], coeffs, tasks=batch, backend="cuda", algorithm="stream"
    )
    call()
    found, calls = [], max(1, int(1000 * SECONDS))
    for _ in range(7):
        _synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        found.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(found)


def _synchronize() -> None:
    torch.cuda.synchronize()


def plan() -> float:
    """Microseconds."""
    ids = torch.arange(4096, device=DEVICE) * 97 % 257 - 1
    call = functools.partial(torch.ops.taps_fast.task_plan, ids, 256)
    assert torch.equal(call()[0], torch.sort(ids, stable=True)[1])
    return 1e3 * milliseconds(ours=[call] * PLANS)["ours"]


PERCENT, TIMES, MICROSECONDS = "{:.0%}", "{:.2f} ×", "{:.1f} µs"


def _copy(what: str, least: float, run: Callable[..., float], *args: Any, cuda: bool = False) -> Target:
    return Target(f"{what}: share of a copy's bandwidth", least, False, PERCENT, functools.partial(run, *args), cuda)


def _over_grouped_mm(tasks: int) -> Target:
    what = f"`split`, a row of each of {tasks} tasks: times faster than `F.grouped_mm` with merged weights"
    return Target(what, 3.0, False, TIMES, functools.partial(over_grouped_mm, tasks))


def _over_merged(rows: int) -> Target:
    what = f"{rows} rows, one delta: time over that of cuBLAS with a merged weight"
    return Target(what, 1.15, True, TIMES, functools.partial(over_merged, rows))


TARGETS = (
    *(_copy(f"`split`, one delta, rows {m}", 0.85, bandwidth, m, None, "triton", "split") for m in (1, 16, 64)),
    *(_copy(f"`split`, 64 rows of {t} tasks", 0.85, bandwidth, 64, t, "triton", "split") for t in (2, 8, 32)),
    *(_over_grouped_mm(t) for t in (32, 64)),
    _copy(f"`merge`, {LAYERS} layers in one launch", 0.88, merge),
    Target("`linear_dw`, 4096 rows: share of cuBLAS's speed", 0.85, False, PERCENT, lambda: weight_gradient(4096)),
    *(_over_merged(m) for m in (4096, 16384)),
    *(
        _copy(f"`stream`, one delta, rows {m}", 0.9, bandwidth, m, None, "cuda", "stream", cuda=True)
        for m in (1, 8, 16)
    ),
    Target("`stream`, a mixed layer: time on the host", 8.0, True, MICROSECONDS, host, cuda=True),
    Target("`task_plan`, 4096 samples of 256 tasks", 10.0, True, MICROSECONDS, plan, cuda=True),
)


def table(measured: Sequence[str]) -> str:
    """As it stands in benchmarks/README.md."""
    lines = ["| bfloat16, 4096 × 4096 | predicted, H200 | measured |", "|---|---|---|"]
    lines += [f"| {t.what} | {t.predicted} | {text} |" for t, text in zip(TARGETS, measured, strict=True)]
    return "\n".join(lines)


@torch.no_grad()
def measure(target: Target) -> dict[str, Any]:
    """One target's record: a value, or why there is none."""
    record = {"what": target.what, "predicted": target.predicted, "value": None, "holds": None, "status": "ok"}
    if target.cuda and (reason := _ext.cuda_refusal()):
        return record | {"status": "absent", "reason": reason}
    try:
        value = target.measure()
    except Exception as error:  # a wrong result, or a kernel that does not run: the others are measured all the same
        first = str(error).strip().partition("\n")[0]
        return record | {"status": "failed", "reason": f"{type(error).__name__}: {first}"}
    return record | {"value": value, "holds": target.holds(value)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.targets", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="a file for the records")
    chosen = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("targets: there is no CUDA device, so nothing was measured", file=sys.stderr)
        return 1
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}\n")
    records = []
    for target in TARGETS:
        records.append(measure(target))
        torch.cuda.empty_cache()
        if chosen.out:
            chosen.out.write_text(json.dumps(records, indent=1))
    both = zip(TARGETS, records, strict=True)
    print(table([t.form.format(r["value"]) if r["status"] == "ok" else r["reason"] for t, r in both]))
    return 1 if any(r["status"] == "failed" for r in records) else 0


if __name__ == "__main__":
    sys.exit(main())
