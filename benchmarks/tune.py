"""Searches tile sizes and crossovers on this machine's GPU, and writes them into `taps_fast/tuned.json` as it goes.

    python -m benchmarks.tune                          everything
    python -m benchmarks.tune --kernels split          tile sizes of one kernel
    python -m benchmarks.tune --kernels --dtypes bfloat16      no tile sizes, crossovers of one dtype

Run `make test-triton` on the result: it compiles every entry and reads its machine code.
Without a GPU it says so and exits with 1.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import math
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from taps_fast import _tuned
from taps_fast.functional import delta_linear
from taps_fast.tasks import TaskBatch
from taps_fast.testing import assert_no_worse_than_torch

from . import timing

BUCKETS = {"split": (16, 32, 64, None), "dx": (16, 32, 64, None), "dw": (None,), "conv": (16, None)}
"""Rows, or pixels of an image, up to which an entry holds; None: any number. `MANY` stands for it while timing."""
MANY = 1024
SIZES = (1024, 4096)
"""Out and in features that a config is judged on, by the geometric mean of its times."""
COLD_BYTES = 1 << 27
"""Of weights to go round in, more than a GPU caches."""
IMAGES = 8
"""Of a batch on which a convolution is judged."""
TASKS = 4
GAIN = 1.02
"""How many times faster than the entry there is a config must be to replace it."""
MOST_ROWS = 8192

MOST_COMPILERS = 14
"""Processes that compile candidates beside each other; each holds some of the GPU's memory."""
Entry = dict[str, Any]

Timer = Callable[[Any], float]
"""Seconds of a candidate; infinite for one that does not compile, does not fit or is wrong."""


class Cell(NamedTuple):
    """What a config is timed on."""

    calls: list[Callable[[], Tensor]]
    check: Callable[[], None]
    """Of the first call's result, against float64."""


def candidates(kernel: str, itemsize: int, rows: int | None, fits: Callable[[Any], bool]) -> Iterator[Any]:
    """The configs worth timing: rows in one block where they are few, tiles that the chip holds."""
    from taps_fast.kernels._configs import Config

    steps = (64, 128) if itemsize == 2 else (16, 32)
    if kernel == "dw":
        reduced = (32, 64) if itemsize == 2 else steps
        blocks: Iterable[tuple[int, int, int]] = itertools.product(reduced, (64, 128), (64, 128, 256))
    elif rows is not None and rows <= 32:  # more tiles, and longer steps, where few rows leave room for them
        blocks = itertools.product((rows,), (32, 64, 128), (*steps, 2 * steps[-1]))
    else:
        blocks = itertools.product((64, 128) if rows is None else (rows,), (64, 128), steps)
    for (m, o, i), warps, stages in itertools.product(blocks, (4, 8), (2, 3, 4, 5)):
        # Below 8 accumulators a thread, warps idle; beyond 128, they spill.
        kept = o * i if kernel == "dw" else m * o
        if not 8 <= kept // (32 * warps) <= 128:
            continue
        config = Config(m, o, i, warps, stages, 255 if itemsize == 4 else None)
        if fits(config):
            yield config


def best(options: Iterable[Any], present: Any, timer: Timer) -> Any:
    """The fastest of ``options``, or ``present`` where none beats it by `GAIN`."""
    times = {option: timer(option) for option in options}
    fastest = min(times, key=times.__getitem__, default=present)
    held = timer(present)
    return fastest if times.get(fastest, math.inf) * GAIN < held else present


def crossover(split: Callable[[int], float], merge: Callable[[int], float], most: int = MOST_ROWS) -> int:
    """The first number of rows, to an eighth, at which merge is faster than split; ``most`` if there is none.

    Doubles until merge wins, then halves what is left. Between, one of them may win by turns: what counts is that
    merge wins from there on by doubling.
    """
    low, high = 0, 16
    while high < most and split(high) <= merge(high):
        low, high = high, 2 * high
    if high >= most and split(most) <= merge(most):
        return most
    while high - low > max(high // 8, 1):
        middle = (low + high) // 2
        low, high = (middle, high) if split(middle) <= merge(middle) else (low, middle)
    return high


def entry_of(config: Any, kernel: str, arch: str, itemsize: int, rows: int | None) -> Entry:
    """A config as it stands in `tuned.json`."""
    entry: Entry = {"kernel": kernel, "arch": arch, "bytes": itemsize, "rows": rows}
    entry |= {"blocks": [config.block_m, config.block_o, config.block_i]}
    entry |= {"warps": config.warps, "stages": config.stages}
    return entry if config.registers is None else entry | {"registers": config.registers}


def replaced(data: dict[str, Any], configs: Sequence[Entry], measured: Sequence[Entry]) -> Any:
    """``data`` with new entries in place of those for the same thing; a chip new to it gets a copy of "other" first."""
    data = {name: list(entries) for name, entries in data.items()}
    keys = {"configs": ("kernel", "arch", "bytes", "rows"), "crossovers": ("op", "arch", "dtype")}
    for name, new in (("configs", configs), ("crossovers", measured)):
        for arch in dict.fromkeys(entry["arch"] for entry in new):
            if all(entry["arch"] != arch for entry in data[name]):
                data[name] += [e | {"arch": arch} for e in data[name] if e["arch"] == _tuned.OTHER]
        old = {tuple(entry[k] for k in keys[name]): entry for entry in data[name]}
        for entry in new:
            place = tuple(entry[k] for k in keys[name])
            # What a crossover was modelled from stays beside the measurement.
            old[place] = old.get(place, {}) | entry if name == "crossovers" else entry
        data[name] = list(old.values())
    return data


class Measured:
    """The timers of a GPU: whole operators as graph replays, each candidate checked against float64 first.

    ``compilers``: processes that compile what is to be timed, by running it once, before it is timed alone; they time
    nothing themselves (``seconds`` of 0).
    """

    def __init__(self, seconds: float, compilers: int = 0) -> None:
        from taps_fast.kernels import _configs, conv2d, linear

        self.linear, self.conv2d, self.configs, self.seconds = linear, conv2d, _configs, seconds
        self.capability = torch.cuda.get_device_capability()
        # Not forked: a child cannot use a device that its parent has.
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(compilers, context) if compilers else None

    def prepare(self, kernel: str, dtype: torch.dtype, rows: int | None, options: Iterable[Any]) -> None:
        """Fills the compiler's cache."""
        if self.pool:
            list(self.pool.map(functools.partial(_compile, kernel, dtype, rows), options))

    def fits(self, kernel: str, itemsize: int) -> Callable[[Any], bool]:
        return lambda config: self.configs.supports(config, kernel, itemsize, self.capability)

    def present(self, kernel: str, itemsize: int, rows: int | None) -> Any:
        return self.configs.choose(kernel, rows or 2 * MANY, itemsize, self.capability)

    def config_timer(self, kernel: str, dtype: torch.dtype, rows: int | None) -> Timer:
        cell = self._conv_cell if kernel == "conv" else functools.partial(self._cell, kernel)
        cells = [cell(dtype, rows or MANY, size) for size in SIZES]

        def timer(config: Any) -> float:
            chosen = self.configs.choose
            self.configs.choose = lambda *_: config
            try:
                if not self.seconds:
                    for cell in cells:
                        cell.calls[0]()
                    return 0.0
                cells[0].check()  # what a config computes does not depend on the size, and the larger takes long
                return statistics.geometric_mean(self._time(*cell.calls) for cell in cells)
            except Exception as error:  # of the compiler, the launch or the check: not a candidate
                if self.seconds:
                    print(f"  {config}: {type(error).__name__}: {str(error).strip().partition(chr(10))[0][:80]}")
                return math.inf
            finally:
                self.configs.choose = chosen

        return timer

    def _cell(self, kernel: str, dtype: torch.dtype, rows: int, size: int) -> Cell:
        """A layer of one delta, in as many sets of weights as leave nothing of the first in a cache. The rows of dw are
        a mixed batch's of one task: without tasks the product is the vendor's."""
        x, dy = (torch.randn(rows, size, device="cuda", dtype=dtype) for _ in range(2))
        sets = max(COLD_BYTES // (2 * size * size * dtype.itemsize), 2)
        weights = torch.randn(sets, 2, size, size, device="cuda", dtype=dtype) * size**-0.5
        none, coeffs = (None, None, None), torch.ones(1, device="cuda")
        index = TaskBatch.from_ids(torch.zeros(rows, dtype=torch.int64, device="cuda"), 1).tensors

        def call(n: int) -> Tensor:
            one = (weights[n, 0], [weights[n, 1]], coeffs.expand(1, 1) if kernel == "dw" else coeffs, None)
            if kernel == "split":
                return self.linear.linear_fwd(x, *one, None, *none, 1, "split")
            if kernel == "dx":
                return self.linear.linear_dx(dy, *one, *none, 1, "split")
            return self.linear.linear_dw(dy, x, *one, *index, 1, [], [0], True, False, False)[1][0]

        def product(wide: torch.dtype, weight: Tensor) -> Tensor:
            if kernel == "split":
                return x.to(wide) @ weight.T
            return dy.to(wide) @ weight if kernel == "dx" else dy.to(wide).T @ x.to(wide)

        def check() -> None:
            ref = product(torch.float64, weights[0].double().sum(0))
            assert_no_worse_than_torch(call(0), ref, product(dtype, weights[0].sum(0)))

        return Cell([functools.partial(call, n) for n in range(sets)], check)

    def _conv_cell(self, dtype: torch.dtype, pixels: int, size: int) -> Cell:
        """A 3 x 3 convolution of square images, with as many weights as a linear layer that is 3 / 4 as wide."""
        side, channels = math.isqrt(pixels), size // 4
        layout: Any = {"device": "cuda", "memory_format": torch.channels_last}
        x = torch.randn(IMAGES, channels, side, side).to(dtype=dtype, **layout)
        weights = torch.randn(2, channels, channels, 3, 3) * (9 * channels) ** -0.5
        base, delta = (w.to(dtype=dtype, **layout) for w in weights)
        one = (base, [delta], torch.ones(1, device="cuda"), None, None)
        call = functools.partial(self.conv2d.conv2d_implicit, x, *one, [1, 1], [1, 1], [1, 1], None, 1)

        def check() -> None:
            ref = F.conv2d(x.double(), base.double() + delta.double(), padding=1)
            assert_no_worse_than_torch(call(), ref, F.conv2d(x, base + delta, padding=1))

        return Cell([call], check)

    def _time(self, *calls: Callable[[], object]) -> float:
        """Seconds of one of the calls, which a replay runs one after another."""

        def together() -> None:
            for call in calls:
                call()

        return timing.measure({"it": [timing.graph(together)]}, self.seconds, "cuda")["it"].median / 1e3 / len(calls)

    def crossover_timers(self, dtype: torch.dtype, size: int) -> tuple[Callable[[int], float], Callable[[int], float]]:
        """Seconds of each algorithm by rows a task, `TASKS` tasks to a batch."""
        base, *deltas = (torch.randn(1 + TASKS, size, size, device="cuda", dtype=dtype) * size**-0.5).unbind()
        coeffs = torch.eye(TASKS, device="cuda")

        def of(algorithm: str) -> Callable[[int], float]:
            @functools.cache
            def timed(rows: int) -> float:
                x = torch.randn(rows * TASKS, size, device="cuda", dtype=dtype)
                ids = torch.arange(TASKS, device="cuda")
                how: Any = {"tasks": ids, "backend": "triton", "algorithm": algorithm}
                return self._time(lambda: delta_linear(x, base, deltas, coeffs, **how))

            return timed

        return of("split"), of("merge")


@functools.cache
def _timer(kernel: str, dtype: torch.dtype, rows: int | None) -> Timer:
    return Measured(0).config_timer(kernel, dtype, rows)


def _compile(kernel: str, dtype: torch.dtype, rows: int | None, config: Any) -> None:
    _timer(kernel, dtype, rows)(config)


def search_configs(gpu: Measured, arch: str, kernels: Sequence[str], dtypes: Sequence[str]) -> Iterator[Entry]:
    """The best config of each kernel and number of rows, once for each size of element."""
    from taps_fast.kernels import _configs

    searched = set()
    for kernel, name in itertools.product(kernels, dtypes):
        itemsize, dtype = _tuned.ITEMSIZE[name], getattr(torch, name)
        if (kernel, itemsize) in searched:
            continue
        searched.add((kernel, itemsize))
        for rows in BUCKETS[kernel]:
            options = list(candidates(kernel, itemsize, rows, gpu.fits(kernel, itemsize)))
            entry = kernel if kernel == "conv" else _configs.named(kernel, dtype)
            present = gpu.present(entry, itemsize, rows)
            gpu.prepare(kernel, dtype, rows, [*options, present])
            config = best(options, present, gpu.config_timer(kernel, dtype, rows))
            print(f"{entry}, {itemsize} bytes, rows {'more' if rows is None else f'<= {rows}'}: {config}", flush=True)
            yield entry_of(config, entry, arch, itemsize, rows)


def search_crossovers(gpu: Measured, arch: str, device: str, dtypes: Sequence[str]) -> Iterator[Entry]:
    """Up to how many rows a task each dtype is faster by "split", with the configs in use."""
    date = datetime.date.today().isoformat()
    for name in dtypes:
        found = [crossover(*gpu.crossover_timers(getattr(torch, name), size)) for size in SIZES]
        rows = round(statistics.geometric_mean(found))
        print(f"{name}: split up to {rows} rows a task (by size: {dict(zip(SIZES, found, strict=True))})", flush=True)
        yield {"op": "linear", "arch": arch, "dtype": name, "measured": rows, "device": device, "date": date}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernels", nargs="*", choices=BUCKETS, default=list(BUCKETS))
    parser.add_argument("--dtypes", nargs="*", choices=_tuned.ITEMSIZE, default=list(_tuned.ITEMSIZE))
    parser.add_argument("--seconds", type=float, default=0.02, help="how long to time one candidate on one size")
    chosen = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("tune: there is no CUDA device, so nothing was measured and tuned.json is as it was", file=sys.stderr)
        return 1
    arch, device = _tuned.arch(), torch.cuda.get_device_name()
    gpu = Measured(chosen.seconds, min((os.cpu_count() or 2) - 1, MOST_COMPILERS))
    for entry in search_configs(gpu, arch, chosen.kernels, chosen.dtypes):
        _keep([entry], [])
    for entry in search_crossovers(gpu, arch, device, chosen.dtypes):
        _keep([], [entry])
    print(f"written to {_tuned.PATH}")
    return 0


def _keep(configs: list[Entry], measured: list[Entry]) -> None:
    """In the file and in use from now on."""
    from taps_fast.kernels import _configs

    _tuned.DATA = replaced(_tuned.DATA, configs, measured)
    _tuned.save(_tuned.DATA)
    _configs.entries.cache_clear()
    _configs.choose.cache_clear()


if __name__ == "__main__":
    sys.exit(main())
