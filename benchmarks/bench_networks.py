"""pytest-benchmark over whole networks: as bench_layers, ``pytest benchmarks/bench_networks.py -k 'tiny'``."""

from __future__ import annotations

import pytest

from .cells import every, problem, ready


@pytest.mark.parametrize(("workload", "provider"), [pytest.param(*c, id=n) for n, c in every("network")])
def test_network(benchmark, workload, provider):
    made = ready(provider, problem(workload, "cpu"))
    made.check()
    benchmark.group = workload.name
    benchmark(made.run)
