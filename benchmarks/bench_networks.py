"""As bench_layers, over whole networks: ``pytest benchmarks/bench_networks.py -k 'tiny'``."""

from __future__ import annotations

import pytest

from .cells import every, mode, problem


@pytest.mark.parametrize(("workload", "provider"), [pytest.param(*c, id=n) for n, c in every("network")])
def test_network(benchmark, workload, provider):
    p = problem(workload, "cpu")
    benchmark.group = workload.name
    with mode(p):
        made = provider.build(p)
        made.check()
        benchmark(made.run)
