"""pytest-benchmark over single layers, on the CPU.

    pytest benchmarks/bench_layers.py -k 'vit_s.proj' --benchmark-autosave      and later --benchmark-compare

Names are those of workloads and providers, so two runs find the same cells. Each provider runs alone over one set of
weights: for numbers to publish, whose rounds interleave and whose weights are cold, use ``python -m benchmarks.run``.
"""

from __future__ import annotations

import pytest

from .cells import every, mode, problem


@pytest.mark.parametrize(("workload", "provider"), [pytest.param(*c, id=n) for n, c in every("linear", "conv2d")])
def test_layer(benchmark, workload, provider):
    p = problem(workload, "cpu")
    benchmark.group = workload.name
    with mode(p):
        made = provider.build(p)
        made.check()
        benchmark(made.run)
