"""The benchmarks: who is judged, what is modelled, what a line of results holds, and that tables follow results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

CHECKOUT = Path(__file__).parents[1]
if str(CHECKOUT) not in sys.path:
    sys.path.insert(0, str(CHECKOUT))

from benchmarks import cells, report, results, run, timing, workloads  # noqa: E402
from benchmarks.layers import LayerProblem  # noqa: E402
from benchmarks.limits import Limits, bound  # noqa: E402
from benchmarks.networks import build  # noqa: E402
from benchmarks.providers import Provider, Ready, find  # noqa: E402
from benchmarks.workloads import Layer, UnknownName, Workload  # noqa: E402

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


def measured(workload, providers=None, **options):
    providers = find() if providers is None else providers
    options = {"seconds": 0.0, "memory": False} | options
    return cells.run(workload, providers, "cpu", FixedLimits("cpu"), results.environment("cpu"), **options)


def one(layer="small.fc", samples=5, tasks=3, **options):
    return Workload(layer, samples, tasks, **{"cold": False, "deltas": 3} | options)


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

    return Provider("wrong", "baseline", make, lambda w: True, lambda w, d: None, True)


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


# Results and tables.


@pytest.fixture(scope="module")
def records():
    """Of three suites: what a run writes."""
    return [
        record
        for workload in (*workloads.SUITES["norms"](), Workload("tiny", 2, 2, gates="taps"))
        for record in measured(workload, [p for p in find() if p.quick])
    ]


def test_a_record_survives_the_file(tmp_path, records):
    path = tmp_path / "device.jsonl"
    results.write(path, records)
    assert sorted(results.read(path), key=results.key) == sorted(records, key=results.key)
    newer = records[0] | {"threads": 99}
    results.write(path, [newer])
    again = results.read(path)
    assert len(again) == len(records) and newer in again


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"threads": "two"}, "threads must be int"),
        ({"samples": True}, "samples must be int"),
        ({"status": "fine"}, "status must be one of"),
        ({"status": "wrong"}, "median_ms must be there exactly where status is ok"),
        ({"colour": "red"}, "must have the fields of SCHEMA"),
    ],
)
def test_a_line_that_is_no_record(tmp_path, records, change, text):
    ok = next(r for r in records if r["status"] == "ok")
    path = tmp_path / "device.jsonl"
    path.write_text(json.dumps(ok) + "\n" + json.dumps(ok | change) + "\n")
    with pytest.raises(ValueError, match=f"device.jsonl, line 2: .*{text}"):
        results.read(path)


def test_tables_follow_the_results(tmp_path, records, capsys):
    page, path = tmp_path / "README.md", tmp_path / "device.jsonl"
    results.write(path, records)
    page.write_text("before\n<!-- benchmarks:norms -->\n<!-- /benchmarks:norms -->\nafter\n")
    arguments = [str(path), "--plots", str(tmp_path)]
    assert report.main([*arguments, "--check"], [page]) == 1, "an empty table is stale"
    assert report.main(arguments, [page]) == 0
    text = page.read_text()
    assert "`batchnorm256/forward/b8/t8/uniform/open0/float32/whole`" in text and text.startswith("before\n")
    assert report.main([*arguments, "--check"], [page]) == 0
    page.write_text(text.replace("open0", "open1"))
    assert report.main([*arguments, "--check"], [page]) == 1
    assert "README.md is stale" in capsys.readouterr().err
    page.write_text("<!-- benchmarks:norm -->\n<!-- /benchmarks:norm -->")
    assert report.main(arguments, [page]) == 2
    assert "unknown table 'norm' (did you mean 'norms'?)" in capsys.readouterr().err
    assert report.main([str(tmp_path / "none.jsonl")], [page]) == 2
    assert "unknown results file" in capsys.readouterr().err


def test_every_table_has_its_place():
    page = report.PAGES[-1].read_text()
    assert set(report.TABLES) == {name for _, name, _, _ in report.MARKED.findall(page)}
    assert set(workloads.SUITES) - {"quick"} <= set(report.TABLES)


def test_a_losing_cell_is_shown_as_losing(records):
    cell = [dict(r) for r in records if r["workload"].startswith("batchnorm256")]
    for record in cell:
        if record["status"] == "ok":
            record["median_ms"] = 1.0 if record["provider"] == "addcmul" else 2.0
    (row,) = report.TABLES["norms"](cell)[2:]
    assert "| **0.50** addcmul |" in row
    summary = report.TABLES["summary"](cell)[-1]
    assert "| **0.50** | 1 of 1 |" in summary


def test_every_picture_is_drawn(tmp_path, records):
    from benchmarks import plots

    template = next(r for r in records if r["status"] == "ok")
    invented = []
    for suite in ("rows", "scaling", "learn"):
        for i, workload in enumerate(workloads.SUITES[suite]()):
            names = ("taps_fast", "merged-loop") if suite != "learn" else ("taps_fast", "materialise")
            shared = {"workload": workload.name, "layer": workload.layer, "gates": workload.gates, "op": workload.op}
            shared |= {
                "model_flops": 1,
                "rows": workload.rows,
                "tasks": workload.tasks,
                "peak_bytes": 1 << 20,
                "median_ms": 1.0 + i,
            }
            invented += [
                template | shared | {"provider": n, "kind": "ours" if n == "taps_fast" else "merged"} for n in names
            ]
    assert len(list(plots.draw("a device", invented, tmp_path))) == len(plots.PICTURES)
    assert len(list(tmp_path.glob("a-device-*.png"))) == len(plots.PICTURES)


def test_committed_results_are_whole_and_the_tables_are_theirs():
    for path in results.FOLDER.glob("*.jsonl"):
        for record in results.read(path):
            assert not record["dirty"], f"{path.name} was measured on a changed tree"
    assert report.main(["--check"]) == 0


# Ways in.


def test_bench_reaches_the_checkout(tmp_path):
    command = [sys.executable, "-m", "taps_fast", "bench", "--list"]
    elsewhere = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(CHECKOUT)}}
    done = subprocess.run(command, capture_output=True, text=True, **elsewhere)
    assert done.returncode == 0 and "vit_s.fc1/forward/b8/t8" in done.stdout


def test_bench_without_a_checkout(tmp_path, monkeypatch, capsys):
    from taps_fast import __main__ as command_line

    monkeypatch.setattr(command_line, "__file__", str(tmp_path / "taps_fast" / "__main__.py"))
    monkeypatch.chdir(tmp_path)
    assert command_line.main(["bench", "--quick"]) == 2
    assert "the benchmarks are in the source checkout, not in the package" in capsys.readouterr().err


def test_pytest_benchmark_runs_the_same_cells():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-disable"]
    command += ["benchmarks/bench_networks.py", "-k", "tiny and train and materialise"]
    done = subprocess.run(
        command, cwd=CHECKOUT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert "1 passed" in done.stdout, done.stdout + done.stderr


def test_unknown_name_is_a_value_error():
    with pytest.raises(UnknownName, match="known: a, b"):
        raise workloads.unknown("thing", "x", ["b", "a"])
