"""What could not run is said once, and right, also where several processes share the tests."""

from __future__ import annotations

import os
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


@pytest.mark.parametrize("options", (("-p", "no:xdist"), ("-n", "0"), ("-n", "2")), ids=" ".join)
def test_what_is_not_run_is_counted_once(options, tmp_path):
    """Without pytest-xdist, without and with its workers, of which each counts all tests."""
    if "-n" in options:
        pytest.importorskip("xdist", reason="needs xdist")
    shutil.copy(CONFTEST, tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: on a device\n    nvcc: compiled\n")
    (tmp_path / "poor.py").write_text(POOR)
    (tmp_path / "test_a.py").write_text(TESTS.format("gpu", 3))
    (tmp_path / "test_b.py").write_text(TESTS.format("nvcc", 2))
    (tmp_path / "test_triton_c.py").write_text("import triton_is_not_here\n")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(CONFTEST.parent), *filter(None, sys.path)])}
    command = [sys.executable, "-m", "pytest", "-p", "poor", *options]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert [line for line in done.stdout.splitlines() if "not run" in line] == [
        "Triton tests not run: Triton is not installed",
        "3 GPU tests not run: no CUDA device",
        "2 compilations for GPUs not run: no CUDA toolkit for all",
    ], done.stdout + done.stderr
    assert "8 passed" in done.stdout and done.returncode == 0, done.stdout
