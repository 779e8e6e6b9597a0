"""Measures the CPU kernels of delta_linear against what PyTorch offers, in interleaved rounds of one process.

    python -m benchmarks.cpu_linear [forward] [mixed] [backward] [closed] [overhead] [--dtype float32] [--cold]
    python -m benchmarks.cpu_linear rates        # GFLOP/s of each product, and of multiply-adds on registers alone

Each cell prints ours in ms and, for every baseline, baseline / ours (above 1: ours is faster); each table ends with
geometric means. `best` is the fastest baseline that computes the same thing in the same memory; `linear` (one
F.linear on a weight merged beforehand, or its two gradients) and `merged` (one for each task) need that weight stored
and are limits.
`read` is how long PyTorch takes to read base and delta once (F.linear of one row over both), and `limit` the larger of
it and `linear`: less than that is out of reach of what multiplies at PyTorch's speed. A cell whose result is wrong
stops the run. Medians of rounds in which every contender runs once, in random order.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import math
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import taps_fast  # noqa: F401  (registers the operators)
from taps_fast.tasks import TaskBatch

from . import timing

OPS = torch.ops.taps_fast
SHAPES = {  # (I, O): ViT-S qkv/proj/fc1/fc2, MiniLM fc1, ViT-B proj/fc1/fc2, square 4096
    "384x384": (384, 384),
    "384x1152": (384, 1152),
    "384x1536": (384, 1536),
    "1536x384": (1536, 384),
    "768x768": (768, 768),
    "768x3072": (768, 3072),
    "3072x768": (3072, 768),
    "4096x4096": (4096, 4096),
}
ROWS = (1, 4, 8, 16, 32, 64, 197, 1024, 4096)
SECONDS = 0.25  # aim of one cell and contender
COLD_BYTES = 320 << 20  # weights cycled through when cold: more than the caches that a layer can count on

READ_COLUMNS = 768  # divides all sizes

Contender = Callable[[int], object]


def measure(contenders: dict[str, Contender], seconds: float) -> dict[str, float]:
    """Median ms of each contender; call i of a contender uses weight set i."""
    for run in contenders.values():
        run(0)
    start = time.perf_counter()
    for run in contenders.values():
        run(1)
    once = (time.perf_counter() - start) / len(contenders)
    rounds = min(max(int(seconds / max(once, 1e-6)), 5), 400)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    for i in range(rounds):
        random.shuffle(order)
        for name in order:
            start = time.perf_counter()
            contenders[name](i * len(order) + len(times))
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) * 1e3 for name, t in times.items()}


def weight_sets(out_features: int, in_features: int, deltas: int, dtype: torch.dtype, cold: bool) -> list[list[Tensor]]:
    """Lists of base and deltas: one list, or as many as a network that does not fit the caches would have."""
    one = (deltas + 1) * out_features * in_features * dtype.itemsize
    count = max(2, min(COLD_BYTES // one, 200)) if cold else 1
    first = torch.randn(deltas + 1, out_features, in_features).mul_(0.02).to(dtype)
    return [list(first)] + [list(first.clone()) for _ in range(count - 1)]


def reader(weights: list[list[Tensor]]) -> Contender:
    """Reads each list's weights once: they lie one after another, and are one weight of float32 for a single row."""
    wholes = []
    for one in weights:
        numbers = sum(w.numel() for w in one) * one[0].itemsize // 4
        wholes.append(one[0].view(torch.float32).as_strided((numbers // READ_COLUMNS, READ_COLUMNS), (READ_COLUMNS, 1)))
    row = torch.randn(1, READ_COLUMNS)
    return lambda r: F.linear(row, wholes[r % len(wholes)])


def check(name: str, got: Tensor, want: Tensor) -> None:
    error = ((got.double() - want.double()).abs().max() / want.double().abs().max().clamp_min(1e-30)).item()
    if not error < (0.03 if want.dtype in (torch.bfloat16, torch.float16) else 1e-4):
        raise SystemExit(f"{name}: wrong result, relative error {error:.2e}")


class Table:
    """Prints cells as they come, then geometric means of the columns."""

    def __init__(self, title: str, limits: tuple[str, ...]) -> None:
        self.limits = limits
        self.ratios: dict[str, list[float]] = {}
        self.worst = ("", math.inf)
        print(f"\n## {title}")

    def add(self, cell: str, ms: dict[str, float]) -> None:
        ratios = {name: t / ms["ours"] for name, t in ms.items() if name != "ours"}
        ratios["best"] = min(r for name, r in ratios.items() if name not in self.limits)
        if ratios["best"] < self.worst[1]:
            self.worst = (cell, ratios["best"])
        for name, r in ratios.items():
            self.ratios.setdefault(name, []).append(r)
        print(f"{cell:34s} {ms['ours']:9.3f} ms  " + "  ".join(f"{n} {r:5.2f}" for n, r in ratios.items()), flush=True)

    def close(self) -> None:
        means = {n: math.exp(statistics.fmean(map(math.log, r))) for n, r in self.ratios.items()}
        print("geometric mean  " + "  ".join(f"{n} {m:.2f}" for n, m in means.items()))
        print(f"worst best      {self.worst[1]:.2f} ({self.worst[0]})")


def cells(args: argparse.Namespace) -> Iterator[tuple[str, int, int, int]]:
    for (name, (i, o)), m in itertools.product(SHAPES.items(), ROWS):
        if name in args.shapes and m in args.rows:
            yield f"{name} M{m}", m, i, o


def forward(args: argparse.Namespace, dtype: torch.dtype) -> None:
    table = Table(f"forward, one open delta, {dtype}{', cold' if args.cold else ''}", ("linear", "read", "limit"))
    for cell, m, i, o in cells(args):
        x, c = torch.randn(m, i).to(dtype), torch.tensor([0.7])
        sets = weight_sets(o, i, 1, dtype, args.cold)
        buffer, n = torch.empty_like(sets[0][0]), len(sets)

        def ours(r: int) -> Tensor:
            w, d = sets[r % n]
            return OPS.linear_fwd(x, w, [d], c, None, None, None, None, None, 1, "blend")

        def materialise(r: int) -> Tensor:
            w, d = sets[r % n]
            return F.linear(x, torch.add(w, d, alpha=0.7, out=buffer))

        def two(r: int) -> Tensor:
            w, d = sets[r % n]
            return F.linear(x, w).add_(F.linear(x, d), alpha=0.7)

        def linear(r: int) -> Tensor:
            return F.linear(x, sets[r % n][0])

        check(cell, ours(0), materialise(0))
        contenders: dict[str, Contender] = dict(ours=ours, materialise=materialise, two=two, linear=linear)
        ms = measure(contenders | {"read": reader(sets)}, args.seconds)
        table.add(cell, ms | {"limit": max(ms["linear"], ms["read"])})
    table.close()


def closed(args: argparse.Namespace, dtype: torch.dtype) -> None:
    table = Table(f"forward, all gates closed, {dtype}", ())
    for cell, m, i, o in cells(args):
        x, c = torch.randn(m, i).to(dtype), torch.zeros(1)
        w, d = weight_sets(o, i, 1, dtype, False)[0]

        def ours(_: int) -> Tensor:
            return OPS.linear_fwd(x, w, [d], c, None, None, None, None, None, 1, "blend")

        def linear(_: int) -> Tensor:
            return F.linear(x, w)

        check(cell, ours(0), linear(0))
        table.add(cell, measure(dict(ours=ours, linear=linear), args.seconds))
    table.close()


def mixed(args: argparse.Namespace, dtype: torch.dtype) -> None:
    title = f"mixed batch, half of the gates open, {dtype}{', cold' if args.cold else ''}"
    table = Table(title, ("merged", "linear"))
    for (name, (i, o)), tasks, per_task in itertools.product(SHAPES.items(), (2, 8, 32), (1, 4, 16, 64)):
        if name not in args.shapes or tasks * i * o * dtype.itemsize > 1 << 30:
            continue
        ids = torch.arange(tasks).repeat(per_task)[torch.randperm(tasks * per_task)]
        x = torch.randn(len(ids), i).to(dtype)
        w, *deltas = weight_sets(o, i, tasks, dtype, False)[0]
        is_open = [t % 2 == 0 for t in range(tasks)]
        coeffs = torch.diag(torch.tensor([0.7 * on for on in is_open]))
        merged_weights = [torch.add(w, d, alpha=0.7) if on else w for d, on in zip(deltas, is_open, strict=True)]
        buffer = torch.empty_like(w)

        def ours(_: int) -> Tensor:
            batch = TaskBatch.from_ids(ids, tasks)
            return OPS.linear_fwd(x, w, deltas, coeffs, None, None, *batch.tensors, 1, "blend")

        def by_task() -> Iterator[tuple[int, Tensor]]:
            batch = TaskBatch.from_ids(ids, tasks)
            for t in range(tasks):
                yield t, batch.order[batch.offsets[t + 1] : batch.offsets[t + 2]]

        def loop(_: int) -> Tensor:
            y = x.new_empty(len(x), o)
            for t, rows in by_task():
                weight = torch.add(w, deltas[t], alpha=0.7, out=buffer) if is_open[t] else w
                y[rows] = F.linear(x[rows], weight)
            return y

        def sort(_: int) -> Tensor:
            batch = TaskBatch.from_ids(ids, tasks)
            ends = batch.offsets.tolist()
            xs = x[batch.order]
            ys = F.linear(xs, w)
            for t in range(tasks):
                if is_open[t]:
                    ys[ends[t + 1] : ends[t + 2]].addmm_(xs[ends[t + 1] : ends[t + 2]], deltas[t].t(), alpha=0.7)
            y = torch.empty_like(ys)
            y[batch.order] = ys
            return y

        def merged(_: int) -> Tensor:
            y = x.new_empty(len(x), o)
            for t, rows in by_task():
                y[rows] = F.linear(x[rows], merged_weights[t])
            return y

        def linear(_: int) -> Tensor:
            return F.linear(x, w)

        cell = f"{name} T{tasks} R{per_task}"
        check(cell, ours(0), loop(0))
        contenders: dict[str, Contender] = dict(ours=ours, loop=loop, sort=sort, merged=merged, linear=linear)
        table.add(cell, measure(contenders, args.seconds))
    table.close()


def backward(args: argparse.Namespace, dtype: torch.dtype) -> None:
    """dx, the coefficient's gradient and (open gate) the delta's: what autograd does for each way to write it."""
    table = Table(f"backward: dx, dcoeffs, ddelta, {dtype}", ("linear",))
    for cell, m, i, o in cells(args):
        x, dy, c = torch.randn(m, i).to(dtype), torch.randn(m, o).to(dtype), torch.tensor([0.7])
        w, d = weight_sets(o, i, 1, dtype, False)[0]
        buffer = torch.empty_like(w)

        def ours(_: int) -> tuple[Tensor, Tensor, Tensor]:
            wanted = (True, [], [0], True, False, False)
            dx, dc, dd, *_ = OPS.linear_grad(dy, x, w, [d], c, None, None, None, None, 1, "blend", *wanted)
            return dx, dc, dd[0]

        def materialise(_: int) -> tuple[Tensor, Tensor, Tensor]:  # autograd of F.linear(x, w + c * d)
            dx = dy @ torch.add(w, d, alpha=0.7, out=buffer)
            p = dy.t() @ x
            return dx, (p * d).sum(), p.mul_(0.7)

        def two(_: int) -> tuple[Tensor, Tensor, Tensor]:  # autograd of F.linear(x, w) + c * F.linear(x, d)
            dx = (dy @ w).addmm_(dy, d, alpha=0.7)
            xd = F.linear(x, d)
            return dx, (xd * dy).sum(), (dy.t() @ x).mul_(0.7)

        def linear(_: int) -> tuple[Tensor, Tensor]:
            return dy @ w, dy.t() @ x

        for got, want in zip(ours(0), materialise(0), strict=True):
            if want.dim():
                check(cell, got, want)
        table.add(cell, measure(dict(ours=ours, materialise=materialise, two=two, linear=linear), args.seconds))
    table.close()


MULTIPLY = {torch.float32: ("vfmadd231ps", 32), torch.bfloat16: ("vdpbf16ps", 64)}  # instruction, flops in 64 bytes


def peak(dtype: torch.dtype, threads: int, steps: int = 2_000_000) -> float:
    """GFLOP/s of all threads, each in a loop of 24 independent multiply-adds without memory; the best of several tries.

    Together, because processors that share a core, or its power, are not as fast as one alone.
    """
    name, flops = MULTIPLY[dtype]
    clear = "".join(f"vpxord %%zmm{i}, %%zmm{i}, %%zmm{i}; " for i in range(26))
    loop = "".join(f"{name} %%zmm24, %%zmm25, %%zmm{i}; " for i in range(24))
    used = ", ".join(f'"zmm{i}"' for i in range(26))
    code = f'void run(long n) {{ __asm__ volatile("{clear}1: {loop}dec %0; jnz 1b" : "+r"(n) : : "cc", {used}); }}'
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "peak.so")
        command = ["cc", "-O1", "-mavx512f", "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)]
        subprocess.run(command, input=code, text=True, check=True)
        run = ctypes.CDLL(str(library)).run
    run.argtypes = [ctypes.c_long]
    best = math.inf
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(20):
            start = time.perf_counter()
            list(pool.map(run, [steps] * threads))
            best = min(best, time.perf_counter() - start)
    return threads * 24 * flops * steps / best / 1e9


def rates(args: argparse.Namespace, dtype: torch.dtype) -> None:
    """Each product's rate as a share of the machine's; PyTorch's products have the merged weight."""
    if not str(OPS.cpu_isa()).startswith("avx512") or (dtype == torch.bfloat16 and OPS.cpu_isa() != "avx512bf16"):
        raise SystemExit(f"rates: the CPU must multiply {dtype} in AVX-512, got {OPS.cpu_isa()}")
    top = peak(dtype, args.threads)
    print(
        f"\n## rates, one open delta, {dtype}: registers alone {top:.0f} GFLOP/s, in % of that ours / PyTorch's plain"
    )
    shares: dict[str, list[float]] = {}
    for cell, m, i, o in cells(args):
        x, dy, c = torch.randn(m, i).to(dtype), torch.randn(m, o).to(dtype), torch.tensor([0.7])
        w, d = weight_sets(o, i, 1, dtype, False)[0]
        alone = (None, None, None, 1)
        contenders: dict[str, Contender] = {
            "forward": lambda _: OPS.linear_fwd(x, w, [d], c, None, None, *alone, "blend"),
            "linear": lambda _: F.linear(x, w),
            "dx": lambda _: OPS.linear_dx(dy, w, [d], c, None, *alone, "blend"),
            "dy @ w": lambda _: dy @ w,
            "dw": lambda _: OPS.linear_dw(dy, x, w, [d], c, None, *alone, [], [0], True, False, False),
            "dy.t() @ x": lambda _: dy.t() @ x,
        }
        share = {n: 200 * m * i * o / (ms * 1e6 * top) for n, ms in measure(contenders, args.seconds).items()}
        for name, value in share.items():
            shares.setdefault(name, []).append(value)
        print(f"{cell:34s} " + "  ".join(f"{name} {value:3.0f}" for name, value in share.items()), flush=True)
    print(
        "geometric mean  "
        + "  ".join(f"{n} {math.exp(statistics.fmean(map(math.log, v))):.0f}" for n, v in shares.items())
    )


def overhead(args: argparse.Namespace, dtype: torch.dtype) -> None:
    x, w, d, c = torch.randn(1, 8).to(dtype), torch.randn(8, 8).to(dtype), torch.randn(8, 8).to(dtype), torch.ones(1)

    def ours(_: int) -> Tensor:
        return OPS.linear_fwd(x, w, [d], c, None, None, None, None, None, 1, "blend")

    def linear(_: int) -> Tensor:
        return F.linear(x, w)

    def many(run: Contender) -> Contender:
        return lambda r: [run(r) for _ in range(1000)]

    ms = measure({"ours": many(ours), "linear": many(linear)}, args.seconds)
    print(f"\n## overhead of a call, {dtype}\nours {ms['ours']:.2f} us, F.linear {ms['linear']:.2f} us")


def main() -> None:
    tables = {f.__name__: f for f in (forward, mixed, backward, closed, overhead, rates)}
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu_linear",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    usual = [name for name in tables if name != "rates"]
    parser.add_argument(
        "tables", nargs="*", metavar="TABLE", default=usual, help=f"of {', '.join(tables)}; default: all but rates"
    )
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cold", action="store_true", help="cycle through more weights than the caches hold")
    args = parser.parse_args()
    if wrong := [name for name in args.tables if name not in tables]:
        parser.error(f"TABLE must be of {', '.join(tables)}, got {wrong[0]!r}")
    torch.manual_seed(0)
    timing.pin(args.threads)
    print(f"{torch.__version__=} {torch.get_num_threads()=} isa={OPS.cpu_isa()}")
    for dtype, table in itertools.product(args.dtype, args.tables):
        tables[table](args, getattr(torch, dtype))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
