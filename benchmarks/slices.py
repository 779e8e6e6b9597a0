"""What it costs a network on a CPU that the C library gives freed memory back, and what slices make of it.

    python -m benchmarks.slices
    LD_PRELOAD=/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4 python -m benchmarks.slices --sizes 32 4

Milliseconds of one forward of the plain network, float32, channels last, in slices of each size one after the other:
medians, in a process whose C library is as it was found and in one where it is told to keep what is freed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time

import torch

from taps_fast._slices import gives_memory_back

from . import timing
from .networks import NETWORKS, build


def measure(network: str, samples: int, sizes: list[int], rounds: int, kept: bool) -> None:
    """Prints one line."""
    if kept:
        timing.keep_memory()
    model = build(network).eval().to(memory_format=torch.channels_last)
    images = torch.randn(samples, *NETWORKS[network][2]).contiguous(memory_format=torch.channels_last)
    medians = []
    with torch.no_grad():
        for size in sizes:
            times = []
            for _ in range(rounds + 1):
                start = time.perf_counter()
                torch.cat([model(part) for part in images.split(size)])
                times.append(1e3 * (time.perf_counter() - start))
            medians.append(statistics.median(times[1:]))
    what, back = "told to keep" if kept else "as found", "yes" if gives_memory_back() else "no"
    print(f"{what:<14}{back:>12}" + "".join(f"{ms:10.0f}" for ms in medians), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.slices", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("network", nargs="?", default="resnet50", choices=[n for n in NETWORKS if n.startswith("res")])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 16, 8, 4, 2])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(f"{'C library':<14}{'gives back':>12}" + "".join(f"{f'by {size}':>10}" for size in args.sizes))
    for kept in (False, True):
        context = multiprocessing.get_context("spawn")
        child = context.Process(target=measure, args=(args.network, args.samples, args.sizes, args.rounds, kept))
        child.start()
        child.join()


if __name__ == "__main__":
    main()
