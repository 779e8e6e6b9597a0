"""The benchmarks' lines of results, the tables and pictures made of them, and the ways to run it all."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from bench_cells import CHECKOUT, SMALL, measured

from benchmarks import conversion, report, results, workloads
from benchmarks.providers import find
from benchmarks.workloads import UnknownName, Workload


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
    results.write(path, [newer], whole=True)
    mine = [r for r in results.read(path) if r["workload"] == newer["workload"]]
    assert mine == [newer] and {r["workload"] for r in results.read(path)} == {r["workload"] for r in records}


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
    assert {*report.TABLES, report.GPU} == {name for _, name, _, _ in report.MARKED.findall(page)}
    assert set(workloads.SUITES) - set(workloads.SELECTIONS) <= set(report.TABLES)


def test_the_page_of_networks_is_what_its_results_say():
    found = list(conversion.read().values())
    assert conversion.PAGE.read_text() == conversion.page(found)
    assert len(found) > 300
    assert not [o.name for o in found if o.verdict == "wrong"]


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


def test_the_table_of_accuracies_is_that_of_its_results(tmp_path, monkeypatch, capsys):
    accuracy = pytest.importorskip("benchmarks.accuracy")
    assert accuracy.main(["--check"]) == 0
    page = tmp_path / "README.md"
    page.write_text(accuracy.PAGE.read_text().replace("| full |", "| fuller |"))
    monkeypatch.setattr(accuracy, "PAGE", page)
    assert accuracy.main(["--check"]) == 1
    for study in (accuracy.TEST, accuracy.VALIDATION):
        found = accuracy.read(study)
        assert found and len({accuracy.key(record) for record in found}) == len(found)
        assert {record["method"] for record in found} <= study.methods.keys()


def test_the_network_of_lora_is_the_demos_and_its_size_is_what_peft_trains():
    pytest.importorskip("peft")
    pytest.importorskip("efficientnet_lite_pytorch")
    from benchmarks import lora
    from taps_fast.demo import train

    base = train.backbone(train.Plan(1, 0.0, 0, 64, torch.device("cpu")))
    x = torch.randn(2, 3, 64, 64)
    start = lora.plain(base)
    with torch.no_grad():
        want = base(x)
        assert torch.equal(start(x), want)
        budget = sum(p.numel() for p in base.parameters()) // 4
        model, counted, rank = lora.adapted(start, train.HEAD, budget, seed=0)
        assert torch.equal(model.eval()(x), want)  # B starts at 0
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad and train.HEAD not in name}
    assert 0.97 * budget < counted == sum(trained.values()) <= budget and rank > 1
    assert {scale for m in model.modules() for scale in getattr(m, "scaling", {}).values()} == {1.0}
