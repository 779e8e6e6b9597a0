"""What every test gets: poisoned memory, and an honest count of what could not run."""

from __future__ import annotations

import importlib.util

import pytest
import torch

TRITON = importlib.util.find_spec("triton") is not None
if TRITON:
    # Before anything imports triton: without a device, its kernels are interpreted.
    import triton_shim  # noqa: F401
else:
    collect_ignore_glob = ["test_triton_*.py"]

GPU_TESTS = pytest.StashKey[int]()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Without a CUDA device, tests marked ``gpu`` are left out, and counted at the end: neither passed nor skipped."""
    if not torch.cuda.is_available():
        gpu = [item for item in items if item.get_closest_marker("gpu")]
        items[:] = [item for item in items if item not in gpu]
        config.hook.pytest_deselected(items=gpu)
        config.stash[GPU_TESTS] = len(gpu)


def pytest_terminal_summary(terminalreporter, config):
    if not TRITON:
        terminalreporter.write_line("Triton tests not run: Triton is not installed")
    if config.stash.get(GPU_TESTS, 0):
        terminalreporter.write_line(f"{config.stash[GPU_TESTS]} GPU tests not run: no CUDA device")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """`empty` and its relatives return NaN (integers: the largest value), from Python and from C++ alike.

    An element that a kernel forgets is then wrong in every run, not only when the allocator reuses a page. PyTorch
    does this in its deterministic mode; a test of determinism turns the mode off again before it measures.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
