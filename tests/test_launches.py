"""The plugin of `make gpu` where there is no GPU: what it counts, and how processes share the tests."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import launches
import pytest
import torch

from benchmarks import gpu

ROOT = Path(gpu.__file__).parents[1]
MARKERS = "[pytest]\nmarkers =\n    gpu: on a device\n    large: in memory\n    nvcc: compiled\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_its_tests_do_not_run_without_a_device(tmp_path):
    command = [sys.executable, "-m", "pytest", "-p", "launches", "--report", str(tmp_path / "r.json")]
    env = {"PYTHONPATH": str(ROOT / "tests"), "PATH": ""}
    done = subprocess.run([*command, "tests/test_docs.py"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 3, done.stdout
    assert "there is no CUDA device" in done.stdout + done.stderr
    assert not (tmp_path / "r.json").exists()


def counted_run(folder, *options):
    """pytest with the plugin, with a device made up: its report, and what it printed."""
    command = [sys.executable, "-c", "import torch; torch.cuda.is_available = lambda: True; import pytest, sys; "]
    command[-1] += "sys.exit(pytest.main(sys.argv[1:]))"
    env = {"PYTHONPATH": str(ROOT / "tests"), "PATH": ""}
    arguments = ["-q", "-p", "launches", "--report", "r.json", *options]
    done = subprocess.run([*command, *arguments], cwd=folder, env=env, capture_output=True, text=True)
    return json.loads((folder / "r.json").read_text()), done.stdout


def test_what_takes_long_or_only_a_device_can_run_is_taken_first(tmp_path):
    """Large tests are one piece, wherever they are, and so are those that share compilations."""
    (tmp_path / "pytest.ini").write_text(MARKERS)
    test = "@pytest.mark.{0}\n@pytest.mark.parametrize('n', range({1}))\ndef test_{0}(n): pass\n"
    text = "import pytest\n" + "".join(test.format(*a) for a in (("gpu", 7), ("nvcc", 4), ("large", 3)))
    (tmp_path / "test_a.py").write_text("def test_a(): pass\n" + text)
    (tmp_path / "test_b.py").write_text(text)
    (tmp_path / "test_triton_c.py").write_text("def test_c(): pass\n")
    (tmp_path / "conftest.py").write_text(
        "import launches, pytest\n@pytest.hookimpl(trylast=True)\ndef pytest_collection_modifyitems(items):\n"
        "    found = [[f'{i.path.name[5:-3]} {i.name}' for i in piece] for piece in launches.pieces(items)]\n"
        "    print('pieces:', [(piece[0], len(piece)) for piece in found])\n"
    )
    report, log = counted_run(tmp_path, "-s")
    (found,) = re.findall("^pieces: (.*)", log, re.M)
    assert ast.literal_eval(found) == [
        *(("a test_large[0]", 6), ("a test_nvcc[0]", 8)),
        *(("a test_gpu[0]", 5), ("a test_gpu[5]", 2), ("b test_gpu[0]", 5), ("b test_gpu[5]", 2)),
        *(("triton_c test_c", 1), ("a test_a", 1)),
    ]
    assert (report["exit"], len(report["finished"])) == (0, 30), log


def test_when_the_time_is_up_no_test_is_begun(tmp_path):
    """The one that runs is finished. What is left is for others, but for what was taken: that is not reached."""
    (tmp_path / "pytest.ini").write_text(MARKERS)
    (tmp_path / "queue").mkdir()
    (tmp_path / "test_a.py").write_text(
        "import pytest\ndef test_a(): pass\n@pytest.mark.gpu\ndef test_b(): pass\n"
        "@pytest.mark.parametrize('n', range(5))\ndef test_c(n): pass\n"
    )
    late, log = counted_run(tmp_path, "--queue", "queue", "--seconds", "0")
    assert (late["exit"], late["gpu"], len(late["finished"])) == (2, {"test_a.py::test_b": "passed"}, 1), log
    other, log = counted_run(tmp_path, "--queue", "queue")
    assert (other["exit"], list(other["finished"])) == (0, ["test_a.py::test_c[4]"]), log
    none, log = counted_run(tmp_path, "--queue", "queue")
    assert (none["exit"], none["finished"]) == (0, {}), log
    collected = json.loads((tmp_path / "r.collected.json").read_text())
    assert gpu.unreached({"tests": [late | {"collected": collected}, other, none]}) == [
        "test_a.py::test_a", *(f"test_a.py::test_c[{n}]" for n in range(4))
    ]  # fmt: skip


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """`benchmarks.gpu.test` of a file of tests, with a device made up."""
    monkeypatch.setattr(gpu, "CHECKOUT", tmp_path)
    monkeypatch.setattr(gpu, "WORK", tmp_path / "work")
    (tmp_path / "pytest.ini").write_text(MARKERS)
    (tmp_path / "conftest.py").write_text("import torch\ntorch.cuda.is_available = lambda: True\n")

    def run(text, processes, after=""):
        (tmp_path / "test_a.py").write_text("import os, pathlib, pytest, time, torch\n" + text)
        (tmp_path / "test_b.py").write_text(after)
        found = gpu.test(120.0, processes, ["test_a.py", "test_b.py"])
        return found, "".join(path.read_text() for path in sorted((tmp_path / "work").glob("*.log")))

    return run


def test_what_a_file_shares_is_set_up_once_and_torn_down_in_time(suite):
    """By a process that takes one piece of the file after another."""
    (report,), log = suite(
        "made = []\n@pytest.fixture(scope='module')\ndef shared(): made.append(1); yield; made.append(0)\n"
        "@pytest.mark.parametrize('n', range(12))\ndef test_a(n, shared): assert made == [1]\n",
        1,
        "import test_a\ndef test_b(): assert test_a.made == [1, 0]\n",
    )
    assert (report["exit"], len(report["finished"])) == (0, 13), log


def test_processes_share_the_tests(suite):
    """Each test runs once. The first waits for the last, which another process must have taken meanwhile."""
    for _ in range(2):  # the second finds what the first left behind
        reports, log = suite(
            "last = pathlib.Path('work/last')\n"
            "@pytest.mark.parametrize('n', range(43))\ndef test_a(n):\n"
            "    end = time.monotonic() + 60\n"
            "    while n == 0 and not last.exists():\n"
            "        assert time.monotonic() < end\n        time.sleep(0.01)\n"
            "    if n == 42: last.touch()\n"
            "    if n == 0: last.unlink()\n",
            3,
        )
        finished = [name for process in reports for name in process["finished"]]
        assert sorted(finished) == sorted(reports[0]["collected"]) and len(finished) == 43, log
        assert [process["exit"] for process in reports] == [0, 0, 0], log
        assert reports[0]["collected"] == reports[1]["collected"] == reports[2]["collected"]
        assert gpu.unreached({"tests": reports}) == []


@pytest.mark.parametrize(
    ("end", "exits", "lost"),
    (
        ("os.kill(os.getpid(), 9)", {0, gpu.CUT_SHORT}, (7, 8, 9)),
        ("lose_device(); assert False", {0, 2}, (8, 9)),
        ("assert False", {0, 1}, ()),
    ),
)
def test_a_process_that_is_lost_takes_no_more_tests(suite, end, exits, lost):
    """What it had taken is not reached; the others run the rest. A failure alone ends nothing."""
    reports, log = suite(
        "def synchronize(): raise RuntimeError('illegal access')\n"
        "def lose_device(): torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, synchronize\n"
        f"@pytest.mark.parametrize('n', range(20))\ndef test_a(n):\n    if n == 7: {end}\n",
        2,
    )
    assert {process["exit"] for process in reports} == exits, log
    assert gpu.unreached({"tests": reports}) == [f"test_a.py::test_a[{n}]" for n in lost], log


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
    assert len(report["finished"]) == 5 and report["failed"].keys() == {"test_d.py::test_d"}
