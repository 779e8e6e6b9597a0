"""What each test gets does not depend on how processes share the tests, nor does what is said of those not run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).with_name("conftest.py")
POOR = """
import importlib.util

import cuda_build, torch

find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find_spec(name, *rest)
torch.cuda.is_available = cuda_build.compiles_for_all = lambda: False
"""
"""A machine without a GPU, a CUDA toolkit and Triton, whatever this one has."""
TESTS = """
import pytest

@pytest.mark.parametrize("n", range(4))
def test_anywhere(n): pass

@pytest.mark.{}
@pytest.mark.parametrize("n", range({}))
def test_there(n): pass
"""


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """pytest on the tests in a folder, with a copy of the conftest."""
    shutil.copy(CONFTEST, folder)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(CONFTEST.parent), *filter(None, sys.path)])}
    command = [sys.executable, "-m", "pytest", *options]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("options", (("-p", "no:xdist"), ("-n", "0"), ("-n", "2")), ids=" ".join)
def test_what_is_not_run_is_counted_once(options, tmp_path):
    """Without pytest-xdist, without and with its workers, of which each counts all tests."""
    if "-n" in options:
        pytest.importorskip("xdist", reason="needs xdist")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: on a device\n    nvcc: compiled\n")
    (tmp_path / "poor.py").write_text(POOR)
    (tmp_path / "test_a.py").write_text(TESTS.format("gpu", 3))
    (tmp_path / "test_b.py").write_text(TESTS.format("nvcc", 2))
    (tmp_path / "test_triton_c.py").write_text("import triton_is_not_here\n")
    done = run(tmp_path, "-p", "poor", *options)
    assert [line for line in done.stdout.splitlines() if "not run" in line] == [
        "Triton tests not run: Triton is not installed",
        "3 GPU tests not run: no CUDA device",
        "2 compilations for GPUs not run: no CUDA toolkit for all",
    ], done.stdout + done.stderr
    assert "8 passed" in done.stdout and done.returncode == 0, done.stdout


def test_random_numbers_do_not_depend_on_the_tests_before(tmp_path):
    test = "def test_{0}(): print('{0} drew', torch.rand(3).tolist())\n"
    (tmp_path / "test_a.py").write_text("import torch\n" + test.format("a") + test.format("b"))
    (both, alone) = (re.findall("(.) drew (.*)", run(tmp_path, "-s", *o).stdout) for o in ((), ("-k", "test_b")))
    assert [name for name, _ in both] == ["a", "b"] and both[1:] == alone
    assert both[0][1] != both[1][1]
