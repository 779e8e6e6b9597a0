"""Mixed batches with compressed deltas on a CPU, against dense deltas and against one task.

    python -m benchmarks.compressed [formats] [masks] [--shapes 768x768] [--dtype float32] [--seconds 1]

`formats`: T tasks with R rows each. Ours with each format, and ratios: dense deltas / format (above 1: the format is
faster), format / base, which is one F.linear of all rows, and a loop over weights merged beforehand / format. `masks`:
8 tasks with bit masks on one shared delta against the same rows of one such task, and against F.linear on that task's
merged weight. A cell whose result differs from the dense oracle's stops the run. Calls go round in weight sets, so that
none is in the cache when it comes again. Compressed deltas come in a `taps_fast.stacked.Stack`, as in a prepared model.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import Stats, keep_memory, measure, weight_sets
from taps_fast import TaskBatch, delta_linear
from taps_fast.formats import Format, LowRank, MaskBits, compress
from taps_fast.stacked import Stack

RANK = 16


def case(tasks: int, rows: int, deltas: Sequence[Tensor | Format], x: Tensor, base: Tensor) -> Callable[[], Tensor]:
    """One mixed batch of ``rows`` samples a task, with an open gate each."""
    batch = TaskBatch.from_ids(torch.arange(tasks).repeat(rows), tasks)
    coeffs = torch.eye(tasks)
    pairs = [(t, t) for t in range(tasks)]
    return lambda: delta_linear(x, base, deltas, coeffs, tasks=batch, pairs=pairs)


def merged_loop(tasks: int, weights: Sequence[Tensor], x: Tensor) -> Callable[[], Tensor]:
    """The same with a whole weight for each task, merged beforehand."""

    def run() -> Tensor:
        y = x.new_empty(x.shape[0], weights[0].shape[0])
        for task, weight in enumerate(weights):
            y[task::tasks] = F.linear(x[task::tasks], weight)
        return y

    return run


def checked(call: Callable[[], Tensor], dense: Sequence[Tensor], x: Tensor, base: Tensor, tasks: int) -> None:
    ids = torch.arange(tasks).repeat(x.shape[0] // tasks)
    wide = [F.linear(x[ids == t].double(), base.double() + d.double()) for t, d in enumerate(dense)]
    y = call()
    error = max(float((y[ids == t] - w).abs().max() / w.abs().max()) for t, w in enumerate(wide))
    if not error < (2e-2 if x.dtype != torch.float32 else 1e-4):
        raise SystemExit(f"wrong result: relative error {error:.2g}")


def draw(shape: tuple[int, int], dtype: torch.dtype, scale: float) -> Tensor:
    return torch.randn(shape).mul_(scale).to(dtype)


def formats(shape: tuple[int, int], dtype: torch.dtype, seconds: float) -> None:
    print(f"\nformats {shape[1]}x{shape[0]} {dtype}: ms; dense / format; format / base; merged / format")
    for tasks, rows in ((32, 1), (32, 4), (8, 1), (8, 16), (8, 64)):
        x = draw((tasks * rows, shape[1]), dtype, 1.0)
        dense_bytes = tasks * shape[0] * shape[1] * x.element_size()
        calls: dict[str, list[Callable[[], object]]] = {}
        for n in range(weight_sets(dense_bytes, True, "cpu")):
            base = draw(shape, dtype, 0.03)
            deltas = [draw(shape, dtype, 0.003) for _ in range(tasks)]
            small: dict[str, Sequence[Format]] = {n: Stack([compress(d, n) for d in deltas]) for n in ("bits", "int8")}
            factors = [(draw((shape[0], RANK), dtype, 0.01), draw((RANK, shape[1]), dtype, 0.01)) for _ in deltas]
            small["lowrank"] = Stack([LowRank.of(b, a) for b, a in factors])
            contenders = {"dense": deltas, **small}
            for name, weights in contenders.items():
                call = case(tasks, rows, weights, x, base)
                if n == 0:
                    checked(call, [w.dense(dtype) if isinstance(w, Format) else w for w in weights], x, base, tasks)
                calls.setdefault(name, []).append(call)
            calls.setdefault("merged", []).append(merged_loop(tasks, [base + d for d in deltas], x))
            calls.setdefault("base", []).append(lambda x=x, base=base: F.linear(x, base))  # type: ignore[misc]
        times = measure(calls, seconds, "cpu")
        report(f"T={tasks} rows/task={rows}", times)


def report(name: str, times: dict[str, Stats]) -> None:
    dense, base, merged = (times[kind].median for kind in ("dense", "base", "merged"))
    cells = [f"dense {dense:8.3f}"]
    cells += [
        f"{kind} {ms:8.3f} ({dense / ms:5.2f}; {ms / base:5.2f}; {merged / ms:5.2f})"
        for kind, ms in ((kind, times[kind].median) for kind in ("bits", "int8", "lowrank"))
    ]
    print(f"{name:<22} base {base:8.3f}  " + "  ".join(cells), flush=True)


def masks(shape: tuple[int, int], dtype: torch.dtype, seconds: float) -> None:
    tasks = 8
    print(f"\nmasks {shape[1]}x{shape[0]} {dtype}: ms of 8 tasks; 8 tasks / 1 task; 8 tasks / F.linear, merged")
    for rows in (1, 4, 8, 16, 64, 197):
        x = draw((tasks * rows, shape[1]), dtype, 1.0)
        calls: dict[str, list[Callable[[], object]]] = {}
        for n in range(weight_sets(2 * shape[0] * shape[1] * x.element_size(), True, "cpu")):
            base, tile = draw(shape, dtype, 0.03), draw(shape, dtype, 0.003)
            deltas = Stack([MaskBits.from_mask(torch.rand(shape) < 0.5, tile) for _ in range(tasks)])
            eight, one = case(tasks, rows, deltas, x, base), case(1, tasks * rows, deltas[:1], x, base)
            merged = base + deltas[0].dense(dtype)
            if n == 0:
                checked(eight, [d.dense(dtype) for d in deltas], x, base, tasks)
                checked(one, [deltas[0].dense(dtype)], x, base, 1)
            calls.setdefault("eight", []).append(eight)
            calls.setdefault("one", []).append(one)
            calls.setdefault("merged", []).append(lambda x=x, w=merged: F.linear(x, w))  # type: ignore[misc]
        times = {name: s.median for name, s in measure(calls, seconds, "cpu").items()}
        eight_ms = times["eight"]
        ratios = f"{eight_ms / times['one']:5.2f}  {eight_ms / times['merged']:5.2f}"
        print(f"rows/task={rows:<4} {eight_ms:8.3f}  {ratios}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compressed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tables = {"formats": formats, "masks": masks}
    parser.add_argument(
        "tables", nargs="*", metavar="TABLE", default=list(tables), help="of formats, masks; default: both"
    )
    parser.add_argument("--shapes", nargs="+", default=["768x768", "768x3072"], help="I x O")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--seconds", type=float, default=1.0, help="of each contender in each cell")
    args = parser.parse_args()
    if wrong := [name for name in args.tables if name not in tables]:
        parser.error(f"TABLE must be of {', '.join(tables)}, got {wrong[0]!r}")
    torch.manual_seed(0)
    keep_memory()
    print(f"{torch.__version__=} {torch.get_num_threads()=} isa={torch.ops.taps_fast.cpu_isa()}")
    with torch.inference_mode():
        for name in args.tables:
            for dtype in args.dtype:
                for shape in args.shapes:
                    into, out = map(int, shape.split("x"))
                    tables[name]((out, into), getattr(torch, dtype), args.seconds)


if __name__ == "__main__":
    main()
