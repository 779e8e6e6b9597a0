"""`make gpu` where there is no GPU: it fails with its reason, and nothing short of a whole run counts as success."""

from __future__ import annotations

import ast
import copy
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import launches
import pytest
import torch

from benchmarks import gpu, results
from benchmarks.report import load_gpus

ROOT = Path(gpu.__file__).parents[1]
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
RECORD = {
    "provider": "taps_fast", "graph": False, "status": "ok", "op": "linear", "backend": "triton", "workload": "w",
    "reason": None,
}  # fmt: skip
GOOD = {
    "build": {"exit": 0, "failed": {}, "left_out": {}},
    "tests": [
        {
            "exit": 0, "gpu": {"t.py::a": "passed"}, "launches": {"split_kernel": 3}, "outcomes": {"passed": 2},
            "collected": ["t.py::a", "t.py::b", "u.py::c"], "finished": {"t.py::a": 0.31, "t.py::b": 0.5},
        },
        {
            "exit": 0, "gpu": {}, "launches": {"merge_kernel": 1}, "left_out": {"test_x.py": "pybind11"},
            "collected": ["t.py::a", "t.py::b", "u.py::c"], "finished": {"u.py::c": 2.0}, "outcomes": {"passed": 1},
        },
    ],
    "bench": {
        "exits": {"targets": 0, "rows": 0, "train": 124},
        "launches": {"split_kernel": 7},
        "records": [RECORD],
        "targets": [{"what": "a", "holds": False}],
    },
    "seconds": {"build": 1.0, "tests": 2.0, "bench": 3.0},
}  # fmt: skip
KERNELS = {"split_kernel", "merge_kernel"}


@without_gpu
def test_without_a_device_it_says_so_and_fails(capsys):
    assert gpu.main([]) == 2
    assert "nothing was run: PyTorch sees no CUDA device" in capsys.readouterr().err


def test_what_is_missing_is_named(monkeypatch):
    versions = {"torch": "2.9.1+cu130", "triton": "3.6.0", "numpy": "2.4", "pytest": None}
    assert gpu.missing(versions.get, lambda: True) == [
        "torch must be 2.10 or newer, found 2.9.1+cu130",
        "pytest is not installed",
    ]
    fine = versions | {"torch": "2.11.0+cu130", "pytest": "8"}
    assert gpu.missing(fine.get, lambda: True) == []
    assert gpu.missing(fine.get, lambda: False) == ["PyTorch sees no CUDA device"]


def test_compilers_are_asked_for_where_something_needs_them(monkeypatch):
    """Triton may need one for C; without one for C++ our extensions are left out by name, and tests that need them."""
    versions = {"torch": "2.11", "triton": "3.6.0", "numpy": "2.4", "pytest": "8"}
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    monkeypatch.setattr(gpu, "_triton_compiles", lambda: True)
    assert gpu.missing(versions.get, lambda: True) == [
        "there is no C compiler, with which Triton 3.6.0 builds its launcher: gcc"
    ]
    monkeypatch.setattr(gpu, "_triton_compiles", lambda: False)
    assert gpu.missing(versions.get, lambda: True) == []
    built = gpu.build(1.0)
    assert built["left_out"] == dict.fromkeys(("_C", "_C_cuda"), "there is no C++ compiler: c++")
    assert (built["exit"], built["failed"]) == (0, {})
    assert gpu.tests(()) == ["tests"]
    on_device = gpu.tests(built["left_out"])
    assert {"tests/test_triton_linear.py", "tests/test_cuda_gpu.py", "tests/test_model_gpu.py"} <= set(on_device)
    assert not {"tests/test_cuda_stream.py", "tests/test_ops.py", "tests/test_docs.py"} & set(on_device)


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only where a step takes it."""
    now = [0.0]
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    return now


def test_the_benchmark_stops_at_its_deadline(clock, monkeypatch, tmp_path):
    """A suite gets what is left; the one that exceeds it is cut short, and the others are not started."""

    def run(command, seconds, **env):
        took = 100.0
        clock[0] += min(took, seconds)
        return subprocess.CompletedProcess(command, 0 if took <= seconds else gpu.CUT_SHORT, "")

    monkeypatch.setattr(gpu, "WORK", tmp_path)
    monkeypatch.setattr(gpu, "SUITES", ("rows", "mixes", "train"))
    monkeypatch.setattr(gpu, "run", run)
    exits = gpu.bench(250.0, tmp_path / "bench.jsonl")["exits"]
    assert clock[0] == 250.0
    assert list(exits) == [gpu.TARGETS, *gpu.SUITES]
    assert list(exits.values()) == [0, 0, gpu.CUT_SHORT, gpu.NOT_STARTED]


@pytest.fixture
def steps(clock, monkeypatch, tmp_path):
    """The seconds that each step of `main` was given and, unless told how many, takes; and the report."""
    found = SimpleNamespace(given={}, takes={}, exits=GOOD["bench"]["exits"], tests=GOOD["tests"], report=None)

    def step(name, seconds, result, grace=0.0):
        found.given[name] = seconds
        clock[0] += found.takes.get(name, seconds + grace)
        return result

    def write(report, reasons):
        found.report = report | {"reasons": reasons}
        return tmp_path / "results.json"

    monkeypatch.setattr(gpu, "build", lambda seconds: step("build", seconds, GOOD["build"]))
    monkeypatch.setattr(gpu, "test", lambda seconds, *_: step("tests", seconds, found.tests, gpu.GRACE))
    monkeypatch.setattr(gpu, "bench", lambda seconds, _: step("bench", seconds, GOOD["bench"] | {"exits": found.exits}))
    monkeypatch.setattr(gpu, "write", write)
    monkeypatch.setattr(gpu, "missing", lambda *_: [])
    monkeypatch.setattr(gpu, "kernels", lambda: KERNELS)
    monkeypatch.setattr(gpu, "WORK", tmp_path)
    return found


def test_a_run_out_of_time_is_written_with_what_did_not_run(steps, capsys):
    steps.tests = [GOOD["tests"][0] | {"exit": 2, "finished": {"t.py::a": 0.3}}]
    steps.exits = {"targets": gpu.CUT_SHORT, "rows": gpu.NOT_STARTED}
    assert gpu.main([]) == 1
    assert gpu.not_run(steps.report) == [
        "2 tests, of which the first is t.py::b",
        "benchmark targets was cut short",
        "benchmark rows was not started",
    ]
    process, reached, *_ = steps.report["reasons"]
    assert process == "tests, process 0: pytest ended with 2, see build/gpu/tests-0.log"
    assert reached == "2 of 3 tests were not reached"
    out = capsys.readouterr().out
    assert "not run: benchmark rows was not started" in out
    assert "build took 162.0 s, tests took 228.0 s, bench took 140.0 s" in out


@pytest.mark.parametrize("minutes", (9.0, 4.5, 12.0))
def test_each_step_has_its_share_of_the_time(steps, clock, minutes):
    """The benchmark has its own kept for it, and what the others do not use."""
    kept = 150 * min(1, minutes / 9)
    assert gpu.main(["--minutes", str(minutes)]) == 0
    assert clock[0] <= 60 * minutes
    assert steps.given["build"] == pytest.approx(0.3 * 60 * minutes)
    assert steps.given["bench"] == pytest.approx(kept - 10)
    assert sum(steps.given.values()) == pytest.approx(60 * minutes - gpu.GRACE - 10)
    clock[0], steps.takes = 0.0, {"build": 5.0, "tests": 15.0}
    assert gpu.main(["--minutes", str(minutes)]) == 0
    assert steps.given["tests"] == pytest.approx(60 * minutes - 5 - kept - gpu.GRACE)
    assert steps.given["bench"] == pytest.approx(60 * minutes - 20 - 10)
    assert steps.report["seconds"] == {"build": 5.0, "tests": 15.0, "bench": steps.given["bench"]}


def test_the_results_say_what_was_slow_and_what_was_not_reached(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H0")
    monkeypatch.setattr(results, "environment", lambda device: {"device": device})
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    lost = [f"v.py::d[{n}]" for n in range(30)]
    report = copy.deepcopy(GOOD)
    report["tests"][1]["collected"] += lost
    path = gpu.write(report, ["a reason"])
    found = json.loads(path.read_text())
    assert path.name == "gpu-nvidia-h0.json"
    assert found["seconds"] == GOOD["seconds"]
    assert found["test_seconds_by_file"] == {"u.py": 2.0, "t.py": 0.8}
    assert list(found["slowest_tests"].items()) == [("u.py::c", 2.0), ("t.py::b", 0.5), ("t.py::a", 0.3)]
    assert found["unreached"] == {"count": 30, "first": lost[:20]}
    assert found["outcomes"] == {"passed": 3} and found["reasons"] == ["a reason"]
    assert load_gpus([path]) == {"cuda": [RECORD]}


def test_a_whole_run_is_a_success():
    assert gpu.verdict(GOOD, KERNELS) == []


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    (
        (("build", "exit"), 1, "the build ended with 1"),
        (("build", "failed"), {"_C_cuda": "nvcc failed"}, "_C_cuda was not built: nvcc failed"),
        (("tests", 0, "exit"), 1, "tests, process 0: pytest ended with 1"),
        (("tests", 0, "exit"), 124, "pytest ended with 124"),
        (("tests", 1, "finished"), {}, "1 of 3 tests were not reached"),
        (("tests", 1, "collected"), ["t.py::a"], "tests, process 1: collected 1 tests, another 3"),
        (("tests", 1, "collected"), ["u.py::c", "t.py::b", "t.py::a"], "or in another order"),
        (("tests", 0, "gpu"), {}, "no test marked gpu ran"),
        (("tests", 0, "gpu"), {"t.py::a": "skipped"}, "t.py::a: skipped"),
        (("tests", 1, "launches"), {}, "merge_kernel was never launched on the device"),
        (("tests", 1, "left_out"), {"test_cuda_gpu.py::a": "nvcc"}, "were left out, though they were built"),
        (("bench", "exits"), {"rows": 1}, "benchmark rows ended with 1"),
        (("bench", "records"), [], "measured nothing of ours"),
        (("bench", "records"), [RECORD, RECORD | {"backend": "reference"}], "w: ran on reference, not on a kernel"),
        (("bench", "records"), [RECORD, RECORD | {"status": "wrong", "reason": "x"}], "w: wrong: x"),
        (("bench", "launches"), {}, "no kernel was launched while the benchmark ran"),
    ),
    ids=str,
)
def test_anything_less_is_none(path, value, reason):
    report = copy.deepcopy(GOOD)
    place = report
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (found,) = gpu.verdict(report, KERNELS)
    assert reason in found


def test_every_kernel_is_expected():
    assert gpu.kernels() >= {"split_kernel", "sum_splits_kernel", "merge_kernel", "dw_product_kernel", "write_kernel"}
    assert len(gpu.kernels()) >= 16  # however they are decorated


def test_a_step_that_takes_too_long_is_ended(monkeypatch, tmp_path):
    """With what it started: a grandchild that outlives it would hold a pipe open, and the device."""
    monkeypatch.setattr(gpu, "WORK", tmp_path)
    grandchild = "import subprocess, sys; print('up', flush=True); subprocess.run([sys.executable, '-c', {!r}])"
    slow = f"import pathlib, time; time.sleep(4); pathlib.Path({str(tmp_path / 'late')!r}).touch()"
    start = time.monotonic()
    done = gpu.run([sys.executable, "-c", grandchild.format(slow)], 2.0)
    assert (done.returncode, done.stdout) == (gpu.CUT_SHORT, "up\n")
    assert time.monotonic() - start < 4
    time.sleep(max(0.0, start + 6 - time.monotonic()))
    assert not (tmp_path / "late").exists()


@pytest.mark.parametrize(
    ("note", "fails"),
    (("Unavailable: no CUDA toolkit was found", False), ("RuntimeError: nvcc failed", True), (None, False)),
)
def test_only_what_the_machine_cannot_have_is_left_out(note, fails, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "CHECKOUT", tmp_path)
    monkeypatch.setattr(gpu, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, "log"))
    (tmp_path / "taps_fast").mkdir()
    if note:
        (tmp_path / "taps_fast/_C_cuda_error.txt").write_text(note + "\n")
    built = gpu.build(1.0)
    assert built["left_out"] == ({"_C_cuda": note} if note else {})
    assert built["failed"] == ({"_C_cuda": note} if fails else {})


def test_what_tests_need_is_known():
    """Each package that a test imports is one that `make gpu` needs or can leave out."""
    known = set(gpu.NEEDED) | launches.OPTIONAL | set(sys.stdlib_module_names) | {"taps_fast", "benchmarks", "examples"}
    known |= {path.stem for folder in ("tests", "examples") for path in (ROOT / folder).glob("*.py")} | {"emulator"}
    unknown = set()
    for path in (ROOT / "tests").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            unknown |= {(path.name, name) for name in names if name.partition(".")[0] not in known}
    assert unknown == set()
