"""The benchmarks: who is judged, what is modelled, what a line of results holds, and that tables follow results."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch
from bench_cells import SMALL, FixedLimits, measured, one

from benchmarks import report, run, timing, workloads
from benchmarks.layers import LayerProblem
from benchmarks.limits import bound
from benchmarks.networks import build
from benchmarks.providers import Provider, Ready, find
from benchmarks.workloads import Workload


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The problems are small, and the machine may be busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def small_layers(monkeypatch):
    for name, layer in SMALL.items():
        monkeypatch.setitem(workloads.LAYERS, name, layer)


COMMANDS = ("cpu_linear", "slices", "mixed_conv", "compressed", "merging", "prepared", "report", "run", "gpu", "tune")


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_are_called_as_they_run(name, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"benchmarks.{name}").main()
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and text.startswith(f"usage: python -m benchmarks.{name} ") and "[]" not in text


@pytest.mark.parametrize("name", ["cpu_linear", "compressed"])
def test_unknown_tables_are_refused(name, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", [f"{name}.py", "backwards"])
    with pytest.raises(SystemExit):
        importlib.import_module(f"benchmarks.{name}").main()
    assert "TABLE must be of " in capsys.readouterr().err


# Providers.

CASES = [
    *(one(mix=mix, tasks=5, gates=gates) for mix in workloads.MIXES for gates in (0, 25, 100)),
    *(one(layer, phase=phase) for layer in SMALL for phase in workloads.PHASES),
    one("small.row", gates=50, phase="train"),
    one(dtype="bfloat16"),
    one(dtype="bfloat16", phase="train"),
    one(tasks=1),
    one(tasks=None),
    one(tasks=None, phase="train"),
    Workload("batchnorm256", 4, 2, gates=0),
    Workload("layernorm384", 2, 2, gates=0),
    Workload("tiny", 4, 2, gates="taps"),
    Workload("tiny", 2, 1, gates="taps", phase="train"),
]


@pytest.mark.parametrize("workload", CASES, ids=lambda w: f"{w.layer}-{w.phase}-t{w.tasks}-{w.mix}-{w.gates}-{w.dtype}")
def test_every_provider_is_right(workload):
    records = measured(workload, [p for p in find() if p.quick])
    status = {r["provider"]: (r["status"], r["reason"]) for r in records}
    assert status["taps_fast"][0] == status["base" if workload.phase == "forward" else "materialise"][0] == "ok"
    assert {name: why for name, why in status.items() if why[0] in ("wrong", "failed")} == {}


def wrong(change):
    """A provider that is right but for ``change`` of its results."""

    def make(p: LayerProblem) -> Ready:
        def results_of() -> dict[str, torch.Tensor]:
            found = p.differentiate(lambda: p.by_group(p.with_sum))
            return found | change(p, found)

        return Ready(results_of, [], lambda: p.check(results_of()))

    return Provider("wrong", "baseline", make, lambda w: True, lambda w, d: None, True, True)


def one_element(p, found):
    y = found["y"].clone()
    y.view(-1)[7] += 1e-3
    return {"y": y}


BUGS = {
    "one element": one_element,
    "the base's weight": lambda p, found: {"y": p.product(p.x, p.base).detach()},
    "a gradient that is missing": lambda p, found: {"ddeltas[0]": torch.zeros_like(p.deltas[0])},
    "another task's gate": lambda p, found: {"dcoeffs": found["dcoeffs"].flip(0)},
    "scaled": lambda p, found: {"dx": 1.005 * found["dx"]},
    "not a number": lambda p, found: {"y": found["y"] * float("nan")},
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_wrong_provider_gets_no_number(bug):
    records = measured(one(phase="train", gates=100), [wrong(BUGS[bug]), *find(["taps_fast"])])
    bad, good = records
    assert bad["status"] == "wrong" and bad["median_ms"] is None and "max error" in bad["reason"]
    assert good["status"] == "ok" and good["median_ms"] > 0


def test_a_right_provider_passes_the_same_gate():
    assert measured(one(phase="train"), [wrong(lambda p, found: {})])[0]["status"] == "ok"


@pytest.mark.parametrize("tasks", (None, 1))
def test_products_that_a_gpu_rounds_are_judged_so(tasks):
    """The truth, computed on the CPU, of what would be on a GPU."""
    scales = []
    for device in ("cpu", "cuda"):
        p = LayerProblem(one(tasks=tasks, phase="train", dtype="bfloat16"), "cpu")
        p.device = device
        *_, scale = p._judged
        scales.append(scale["dcoeffs"])
    assert 0 < scales[0] < scales[1] < float("inf")


def test_what_cannot_run_is_listed_with_its_reason():
    broken = replace(wrong(lambda p, found: {}), name="broken", build=lambda p: 1 // 0)
    away = replace(broken, name="away", absent=lambda w, d: "not installed: pip install away")
    first, second = measured(one(), [broken, away])
    assert (first["status"], first["reason"]) == ("failed", "ZeroDivisionError: integer division or modulo by zero")
    assert (second["status"], second["reason"]) == ("absent", "not installed: pip install away")


def test_red_is_the_exit_code(monkeypatch, tmp_path, capsys):
    bad = replace(wrong(lambda p, found: {"y": found["y"] + 1}), kind="ours")
    monkeypatch.setattr(run, "find", lambda names: [bad])
    monkeypatch.setattr(run, "Limits", FixedLimits)
    chosen = ["minilm_l6.query/forward/b8/t1/*", "--seconds", "0", "--out", str(tmp_path / "out.jsonl")]
    assert run.main(chosen) == 1
    assert "WRONG: y: max error" in capsys.readouterr().out


# The limit.


def test_the_limit_is_the_slower_of_bytes_and_flops():
    assert bound(0.002, 0.001) == (2.0, "bytes")
    assert bound(0.001, 0.003) == (3.0, "flops")


def test_modelled_bytes_and_flops():
    weight, x, y = 32 * 24 * 4, 4 * 3 * 24 * 4, 4 * 3 * 32 * 4
    p = LayerProblem(one(samples=4, tasks=4, gates=50), "cpu")  # tasks 0 and 2 open, all four in the batch
    assert p.flops() == 2 * 12 * 32 * 24
    assert p.bytes(merged=False) == x + y + 3 * weight  # the base and two deltas
    assert p.bytes(merged=True) == x + y + 3 * weight  # the base for two tasks, a weight for each of the others
    p = LayerProblem(one(samples=4, tasks=4, gates=100), "cpu")
    assert p.bytes(merged=False) == x + y + 5 * weight
    assert p.bytes(merged=True) == x + y + 4 * weight
    p = LayerProblem(one(samples=4, tasks=4, gates=50, phase="train"), "cpu")
    assert p.flops() == 6 * 12 * 32 * 24
    # Base and two deltas in both passes; backward also reads two closed deltas and writes two gradients.
    assert p.bytes(merged=False) == 3 * x + 2 * y + (3 + 3 + 2 + 2) * weight


def test_the_limit_in_a_record(monkeypatch):
    slow = timing.Stats(1e6, 1e6, 1e6, 1)
    monkeypatch.setattr(timing, "measure", lambda calls, seconds, device: dict.fromkeys(calls, slow))
    (record,) = measured(one(samples=4, tasks=4, gates=50), find(["taps_fast"]))
    # At 1 Gflop/s and 1 GB/s: 2·12·32·24 flops against fewer bytes.
    assert record["limit_bound"] == "flops" and record["limit_ms"] == pytest.approx(2 * 12 * 32 * 24 / 1e6)
    assert report.to_limit(record) == record["limit_ms"] / 1e6


def test_a_plain_product_that_is_faster_sets_the_limit():
    ours, base = measured(one(samples=4), find(["taps_fast", "base"]))
    assert base["limit_ms"] <= base["median_ms"] or base["limit_bound"] == "bytes"
    assert ours["model_flops"] == base["model_flops"]


def test_slope():
    assert report.slope([(1, 5.0), (2, 7.0), (4, 11.0)]) == pytest.approx(2.0)
    assert report.slope([(1, 5.0), (64, 5.0)]) == 0.0


# Time and memory.


def test_percentiles():
    stats = timing.Stats.of([0.006, 0.001, 0.002, 0.003, 0.004, 0.005])
    assert stats == pytest.approx((3.5, 2.0, 5.0, 6))


def test_rounds_interleave_and_weight_sets_rotate():
    seen: list[str] = []
    calls = {name: [lambda what=f"{name}{i}": seen.append(what) for i in range(3)] for name in "ab"}
    times = timing.rounds_of(calls, 0.0, "cpu")
    assert [len(times[name]) for name in "ab"] == [timing.MIN_ROUNDS] * 2
    rounds = seen[-2 * timing.MIN_ROUNDS :]
    assert all({x[0], y[0]} == set("ab") for x, y in zip(rounds[::2], rounds[1::2], strict=True))
    assert all(x[1] != y[1] for x, y in zip(rounds[::2], rounds[1::2], strict=True)), "they share a warm set"
    assert [int(w[1]) for w in rounds if w[0] == "a"] == [i % 3 for i in range(timing.MIN_ROUNDS)]


def test_cold_weights_exceed_the_cache():
    cache = timing.last_cache_bytes("cpu")
    assert timing.weight_sets(8 << 20, True, "cpu") * (8 << 20) > cache
    assert timing.weight_sets(8 << 20, False, "cpu") == 1


def holding(kept: int, used: int, dropped: int):
    """Keeps some MiB, needs others at each call, and some only to be built."""
    _ = torch.ones(dropped << 18)
    weights = torch.ones(kept << 18)
    return lambda: weights[: used << 18] + 1


def test_peak_memory_is_of_the_call_alone():
    # Each more than 32 MiB: glibc may keep a smaller block in its heap, where a free one next to it counts too.
    small, large = (timing.peak_bytes(holding, 128, used, 256, device="cpu") for used in (40, 104))
    assert 160 <= small >> 20 < 200, "128 kept and 40 used"
    assert 60 <= (large - small) >> 20 <= 68


# Workloads.


def test_names_are_unique_and_found_again():
    full = workloads.workloads()
    names = [w.name for w in full]
    assert len(set(names)) == len(names)
    assert workloads.workloads([names[5]])[0].name == names[5]
    assert {w.layer for w in workloads.workloads(["vit_b.*/t8/*"])} == {
        f"vit_b.{n}" for n in ("qkv", "proj", "fc1", "fc2")
    }


def test_the_axes_are_covered():
    full = workloads.workloads()
    assert {1, 2, 8, 32} <= {w.tasks for w in full}
    assert {w.mix for w in full} == set(workloads.MIXES)
    assert {0, 25, 100, "taps"} <= {w.gates for w in full}
    assert {w.layer.split(".")[0] for w in full} >= {
        "vit_s",
        "vit_b",
        "minilm_l6",
        "llama_8b",
        "resnet50",
        "efficientnet_b0",
    }


def test_row_mixes():
    ids = {mix: one(samples=32, tasks=32, mix=mix).ids() for mix in workloads.MIXES}
    assert set(ids["identical"]) == {0}
    assert sorted(ids["distinct"]) == sorted(ids["uniform"]) == list(range(32))
    assert ids["zipf"].count(0) == max(map(ids["zipf"].count, range(32)))
    assert one(samples=32, tasks=32, mix="zipf").ids() == ids["zipf"]


@pytest.mark.parametrize(("task", "share"), [("cubs", 0.6095168), ("cars", 0.2992366)])
def test_the_published_gate_patterns(task, share):
    """The parameters that each pattern adds to ResNet-50: known answers; norms are those named bn."""
    with torch.device("meta"):
        network = build("resnet50")
    convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) == workloads.PATTERN_LAYERS
    opened = sum(convolutions[i].weight.numel() for i in workloads.GATE_PATTERNS[task])
    norms = sum(p.numel() for n, p in network.named_parameters() if "bn" in n)
    total = sum(p.numel() for p in network.parameters()) + sum("num_batches" in n for n, _ in network.named_buffers())
    assert (opened + norms) / total == pytest.approx(share, abs=5e-8)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["vit_s.fcl"], "unknown workload 'vit_s.fcl' (did you mean 'vit_s.fc"),
        (["quick", "--providers", "merged"], "unknown provider 'merged'"),
        (["quick", "--base", "no-such-ref"], "unknown commit 'no-such-ref'"),
    ],
)
def test_unknown_names_list_the_known(capsys, arguments, text):
    assert run.main(arguments) == 2
    error = capsys.readouterr().err
    assert text in error and "known: " in error
