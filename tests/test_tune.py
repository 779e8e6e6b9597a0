"""`benchmarks.tune` without a GPU: what it searches, how it decides, what it writes; times come from a fake clock."""

from __future__ import annotations

import math

import pytest
import torch
from taps_fast.kernels import _configs

from benchmarks import tune
from taps_fast import _tuned

HOPPER = (9, 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_changes_nothing(capsys):
    before = _tuned.PATH.read_text()
    assert tune.main([]) == 1
    assert "no CUDA device, so nothing was measured" in capsys.readouterr().err
    assert _tuned.PATH.read_text() == before


@pytest.mark.parametrize("itemsize", (2, 4))
@pytest.mark.parametrize("kernel", tune.BUCKETS)
def test_candidates_fit_and_are_few(kernel, itemsize):
    def fits(config):
        return _configs.supports(config, kernel, itemsize, HOPPER)

    for rows in tune.BUCKETS[kernel]:
        found = list(tune.candidates(kernel, itemsize, rows, fits))
        assert 4 <= len(found) == len(set(found)) <= 90
        assert all(fits(c) for c in found)
        assert kernel == "dw" or rows is None or {c.block_m for c in found} == {rows}


def test_a_config_must_beat_the_present_one_clearly():
    times = {"present": 1.0, "a": 0.9, "b": 0.5, "broken": math.inf}
    assert tune.best(["a", "b", "broken"], "present", times.__getitem__) == "b"
    assert tune.best(["broken"], "present", times.__getitem__) == "present"
    assert tune.best([], "present", times.__getitem__) == "present"
    assert tune.best(["a"], "present", (times | {"present": 0.91}).__getitem__) == "present"


@pytest.mark.parametrize("true", (1, 20, 130, 419, 3000))
def test_crossovers_are_found_to_an_eighth(true):
    """split costs rows, merge a fixed time more and half as much a row."""
    asked = []

    def split(rows):
        asked.append(rows)
        return 2.0 * rows

    found = tune.crossover(split, lambda rows: 1.0 * rows + true)
    assert true <= found <= true * 9 / 8 + 2
    assert len(asked) < 20


def test_a_crossover_beyond_reach_is_the_most_that_was_tried():
    assert tune.crossover(lambda rows: 1.0, lambda rows: 2.0, most=1000) == 1000


def test_new_entries_replace_old_ones_and_nothing_else():
    config = _configs.Config(16, 128, 64, 4, 3)
    new = tune.entry_of(config, "split", "sm_90", 2, 16)
    cross = {"op": "linear", "arch": "sm_90", "dtype": "bfloat16", "measured": 300, "device": "G", "date": "2030-01-01"}
    data = tune.replaced(_tuned.DATA, [new], [cross])
    assert len(data["configs"]) == len(_tuned.DATA["configs"])
    changed = [e for e, old in zip(data["configs"], _tuned.DATA["configs"], strict=True) if e != old]
    assert changed == [new]
    (entry,) = (
        e for e in data["crossovers"] if e.items() >= {"op": "linear", "arch": "sm_90", "dtype": "bfloat16"}.items()
    )
    assert (entry["measured"], entry["tflops"]) == (300, 600)  # the assumption stays beside the measurement
    assert _tuned.crossovers(data["crossovers"])["linear", "sm_90", torch.bfloat16].rows == 300


def test_a_chip_that_had_no_entries_gets_all_of_them():
    new = tune.entry_of(_configs.Config(16, 128, 64, 4, 3), "split", "sm_89", 2, 16)
    data = tune.replaced(_tuned.DATA, [new], [])
    own = [e for e in data["configs"] if e["arch"] == "sm_89"]
    assert len(own) == sum(e["arch"] == "other" for e in _tuned.DATA["configs"])
    assert new in own


def test_the_whole_search_runs_on_a_fake_gpu(monkeypatch):
    """A chip on which big tiles are fast and merging costs 100 rows."""

    class Fake:
        def fits(self, kernel, itemsize):
            return lambda config: _configs.supports(config, kernel, itemsize, HOPPER)

        def present(self, kernel, itemsize, rows):
            return _configs.choose(kernel, rows or 4096, itemsize, HOPPER)

        def prepare(self, kernel, dtype, rows, options):
            prepared.append(len(options))

        def config_timer(self, kernel, dtype, rows):
            return lambda config: 1.0 / (config.block_m * config.block_o * config.block_i * config.stages)

        def crossover_timers(self, dtype, size):
            return (lambda rows: 2.0 * rows), (lambda rows: rows + 100.0)

    prepared: list[int] = []
    configs = list(tune.search_configs(Fake(), "sm_90", list(tune.BUCKETS), list(_tuned.ITEMSIZE)))
    crossovers = list(tune.search_crossovers(Fake(), "sm_90", "fake", list(_tuned.ITEMSIZE)))
    assert len(prepared) == len(configs) and min(prepared) > 4
    assert len(configs) == 2 * sum(map(len, tune.BUCKETS.values()))
    (first,) = (e for e in configs if (e["kernel"], e["bytes"], e["rows"]) == ("split", 2, 16))
    assert first["blocks"] == [16, 128, 256]
    assert [e["dtype"] for e in crossovers] == list(_tuned.ITEMSIZE)
    assert all(100 <= e["measured"] <= 115 for e in crossovers)
    data = tune.replaced(_tuned.DATA, configs, crossovers)
    monkeypatch.setattr(_tuned, "DATA", data)
    _configs.entries.cache_clear()
    try:
        assert _configs.entries("split", 2, HOPPER)[0][1].block_o == 128
    finally:
        _configs.entries.cache_clear()
