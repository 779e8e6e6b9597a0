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

from benchmarks import gpu

ROOT = Path(gpu.__file__).parents[1]
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
RECORD = {
    "provider": "taps_fast", "graph": False, "status": "ok", "op": "linear", "backend": "triton", "workload": "w",
    "reason": None,
}  # fmt: skip
GOOD = {
    "build": {"exit": 0, "failed": {}, "left_out": {}},
    "tests": [
        {"exit": 0, "gpu": {"a": "passed"}, "launches": {"split_kernel": 3}, "outcomes": {"passed": 9}},
        {"exit": 5, "gpu": {}, "launches": {"merge_kernel": 1}, "left_out": {"test_x.py": "pybind11"}},
    ],
    "bench": {
        "exits": {"targets": 0, "rows": 0, "train": 124},
        "launches": {"split_kernel": 7},
        "records": [RECORD],
        "targets": [{"what": "a", "holds": False}],
    },
}
KERNELS = {"split_kernel", "merge_kernel"}


@without_gpu
def test_without_a_device_it_says_so_and_fails(capsys):
    assert gpu.main([]) == 2
    assert "nothing was run: PyTorch sees no CUDA device" in capsys.readouterr().err


@without_gpu
def test_its_tests_do_not_run_without_a_device(tmp_path):
    command = [sys.executable, "-m", "pytest", "-p", "launches", "--report", str(tmp_path / "r.json")]
    env = {"PYTHONPATH": str(ROOT / "tests"), "PATH": ""}
    done = subprocess.run([*command, "tests/test_docs.py"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 3, done.stdout
    assert "there is no CUDA device" in done.stdout + done.stderr
    assert not (tmp_path / "r.json").exists()


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


def test_a_run_out_of_time_is_written_with_what_did_not_run(clock, monkeypatch, tmp_path, capsys):
    """Each step gets its share of nine minutes and takes all of it."""
    given, written = [], {}

    def takes_all(seconds):
        given.append(seconds)
        clock[0] += seconds

    def build(seconds):
        takes_all(seconds)
        return GOOD["build"]

    def test(seconds, shards, files):
        takes_all(seconds + gpu.GRACE)
        return [GOOD["tests"][0] | {"exit": 2, "unreached": 7}]

    def bench(seconds, out):
        takes_all(seconds)
        return GOOD["bench"] | {"exits": {"targets": gpu.CUT_SHORT, "rows": gpu.NOT_STARTED}}

    def write(report, reasons):
        written.update(not_run=gpu.not_run(report), reasons=reasons)
        return tmp_path / "results.json"

    for name, step in {"build": build, "test": test, "bench": bench, "write": write}.items():
        monkeypatch.setattr(gpu, name, step)
    monkeypatch.setattr(gpu, "missing", lambda *_: [])
    monkeypatch.setattr(gpu, "WORK", tmp_path)
    assert gpu.main([]) == 1
    assert clock[0] <= 9 * 60
    assert all(seconds > 60 for seconds in given)
    assert written["not_run"] == [
        "7 tests of part 0",
        "benchmark targets was cut short",
        "benchmark rows was not started",
    ]
    assert "tests, part 0: pytest ended with 2, 7 tests were not reached" in written["reasons"][0]
    assert "the time was up: benchmark rows was not started" in capsys.readouterr().out


def test_a_whole_run_is_a_success():
    assert gpu.verdict(GOOD, KERNELS) == []


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    (
        (("build", "exit"), 1, "the build ended with 1"),
        (("build", "failed"), {"_C_cuda": "nvcc failed"}, "_C_cuda was not built: nvcc failed"),
        (("tests", 0, "exit"), 1, "tests, part 0: pytest ended with 1"),
        (("tests", 0, "exit"), 124, "pytest ended with 124"),
        (("tests", 0, "gpu"), {}, "no test marked gpu ran"),
        (("tests", 0, "gpu"), {"a": "skipped"}, "a: skipped"),
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
    assert gpu.kernels() >= {"split_kernel", "sum_splits_kernel", "merge_kernel", "sum_slots_kernel", "write_kernel"}
    assert len(gpu.kernels()) >= 17  # however they are decorated


def test_a_step_that_takes_too_long_is_ended(monkeypatch, tmp_path):
    """With what it started: a grandchild that outlives it would hold a pipe open, and the device."""
    monkeypatch.setattr(gpu, "WORK", tmp_path)
    grandchild = "import subprocess, sys; print('up', flush=True); subprocess.run([sys.executable, '-c', {!r}])"
    slow = f"import pathlib, time; time.sleep(3); pathlib.Path({str(tmp_path / 'late')!r}).touch()"
    start = time.monotonic()
    done = gpu.run([sys.executable, "-c", grandchild.format(slow)], 1.0)
    assert (done.returncode, done.stdout) == (gpu.CUT_SHORT, "up\n")
    assert time.monotonic() - start < 3
    time.sleep(max(0.0, start + 4 - time.monotonic()))
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


def counted_run(folder, *options):
    """pytest with the plugin, with a device made up: its report, and what it printed."""
    command = [sys.executable, "-c", "import torch; torch.cuda.is_available = lambda: True; import pytest, sys; "]
    command[-1] += "sys.exit(pytest.main(sys.argv[1:]))"
    env = {"PYTHONPATH": str(ROOT / "tests"), "PATH": ""}
    arguments = ["-q", "-p", "launches", "--report", "r.json", *options]
    done = subprocess.run([*command, *arguments], cwd=folder, env=env, capture_output=True, text=True)
    return json.loads((folder / "r.json").read_text()), done.stdout


def test_when_the_time_is_up_the_report_says_how_many_were_not_reached(tmp_path):
    """What only a device can run comes first; what is large is all in the first part."""
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: on a device\n    large: in memory\n")
    (tmp_path / "test_a.py").write_text(
        "import pytest\ndef test_a(): pass\n@pytest.mark.large\ndef test_b(): pass\ndef test_c(): pass\n"
        "@pytest.mark.gpu\ndef test_d(): pass\n"
    )
    report, log = counted_run(tmp_path, "--shard", "0/2", "--seconds", "0")
    assert (report["exit"], report["unreached"], report["gpu"]) == (2, 2, {"test_a.py::test_d": "passed"}), log
    report, log = counted_run(tmp_path, "--shard", "1/2")
    assert (report["exit"], report["unreached"], report["outcomes"]) == (0, 0, {"passed": 1}), log


def test_nothing_is_counted_while_the_clock_runs():
    triton = pytest.importorskip("triton")
    counted, hook = launches.Launches().install(), triton.knobs.runtime.launch_enter_hook
    launch = SimpleNamespace(get=lambda: {"name": "split_kernel"})
    try:
        hook(launch)
        with counted.paused():
            hook(launch)
        assert counted == {"split_kernel": 1}
        hook(launch)
        assert counted == {"split_kernel": 2}
    finally:
        hook.remove(counted._count)


def test_launches_are_counted_and_files_without_their_package_left_out(tmp_path):
    """The plugin on a run of its own, with a device made up: a launch, a gpu test, two absent packages."""
    (tmp_path / "conftest.py").write_text(
        "import sys, torch, triton\n"
        f"sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "torch.cuda.is_available = lambda: True\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: on a device\n")
    (tmp_path / "test_a.py").write_text(
        "import pytest, triton\n@pytest.mark.gpu\ndef test_a():\n"
        "    class Meta:\n        def get(self): return {'name': 'split_kernel'}\n"
        "    triton.knobs.runtime.launch_enter_hook(Meta())\n"
    )
    (tmp_path / "test_b.py").write_text("import peft_is_not_here\n")
    (tmp_path / "test_c.py").write_text("import pybind11.nothing_like_it\n")
    (tmp_path / "test_d.py").write_text(
        "import pytest\n@pytest.mark.gpu\ndef test_a(): import peft.nothing_like_it\n"
        "@pytest.mark.gpu\ndef test_b(): pytest.skip('needs CUPTI')\n"
        "@pytest.mark.gpu\ndef test_c(): pytest.skip('not today')\n"
        "@pytest.mark.gpu\ndef test_d(): import peft_is_not_here\n"
    )
    report, log = counted_run(tmp_path, "--continue-on-collection-errors")
    assert report["launches"] == {"split_kernel": 1}, log
    assert report["gpu"] == {
        "test_a.py::test_a": "passed", "test_d.py::test_c": "skipped", "test_d.py::test_d": "failed",
    }  # fmt: skip
    assert report["left_out"] == {"test_c.py": "pybind11", "test_d.py::test_a": "peft", "test_d.py::test_b": "CUPTI"}
    assert report["exit"] == 1  # a module that is not optional is an error
    assert len(report["slowest"]) == 5 and report["failed"].keys() == {"test_d.py::test_d"}
