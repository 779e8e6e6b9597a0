"""Small cells of the benchmarks, held against fixed limits, for the tests of the benchmarks."""

from __future__ import annotations

import sys
from pathlib import Path

CHECKOUT = Path(__file__).parents[1]
if str(CHECKOUT) not in sys.path:
    sys.path.insert(0, str(CHECKOUT))

from benchmarks import cells, results  # noqa: E402
from benchmarks.limits import Limits  # noqa: E402
from benchmarks.providers import find  # noqa: E402
from benchmarks.workloads import Layer, Workload  # noqa: E402

SMALL = {
    "small.fc": Layer("linear", (32, 24), (3,)),
    "small.row": Layer("linear", (32, 24)),
    "small.conv": Layer("conv2d", (16, 8, 3, 3), (6, 6), (("stride", 1), ("padding", 1), ("groups", 1))),
    "small.nhwc": Layer("conv2d", (16, 8, 3, 3), (6, 6), (("stride", 2), ("padding", 1), ("groups", 1)), True),
    "small.depthwise": Layer("conv2d", (16, 1, 3, 3), (6, 6), (("stride", 1), ("padding", 1), ("groups", 16))),
}


class FixedLimits(Limits):
    """1 GB/s and 1 Gflop/s: nothing to measure."""

    def bandwidth(self, size, cold):
        return 1e9

    def flops(self, dtype):
        return 1e9


def measured(workload, providers=None, **options):
    providers = find() if providers is None else providers
    options = {"seconds": 0.0, "memory": False} | options
    return cells.run(workload, providers, "cpu", FixedLimits("cpu"), results.environment("cpu"), **options)


def one(layer="small.fc", samples=5, tasks=3, **options):
    return Workload(layer, samples, tasks, **{"cold": False, "deltas": 3} | options)
