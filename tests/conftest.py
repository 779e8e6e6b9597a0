"""What every test gets: random numbers of its own, poisoned memory, and an honest count of what could not run."""

from __future__ import annotations

import importlib.util
import zlib

import cuda_build
import pytest
import torch

TRITON = importlib.util.find_spec("triton") is not None
if TRITON:
    # Before anything imports triton: without a device, its kernels are interpreted.
    import triton_shim  # noqa: F401
else:
    collect_ignore_glob = ["test_triton_*.py"]

NOT_RUN = pytest.StashKey[dict[str, int]]()


MISSING = {
    "gpu": ("GPU tests not run: no CUDA device", lambda: not torch.cuda.is_available()),
    "nvcc": ("compilations for GPUs not run: no CUDA toolkit for all", lambda: not cuda_build.compiles_for_all()),
    "mypy": ("checks of types not run: mypy is not installed", lambda: importlib.util.find_spec("mypy") is None),
}
"""Markers of what a machine may lack: how that is said, and whether this one does."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Tests marked with what this machine lacks are left out, and counted at the end: neither passed nor skipped."""
    config.stash[NOT_RUN] = {}
    for marker, (text, is_missing) in MISSING.items():
        marked = [item for item in items if item.get_closest_marker(marker)]
        if marked and is_missing():
            items[:] = [item for item in items if item not in marked]
            config.hook.pytest_deselected(items=marked)
            config.stash[NOT_RUN][text] = len(marked)


def pytest_sessionfinish(session):
    """A worker of pytest-xdist prints nothing, and hands on what it counted."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["not_run"] = session.config.stash.get(NOT_RUN, {})


@pytest.hookimpl(optionalhook=True)  # pytest-xdist calls it, where it is installed
def pytest_testnodedown(node):
    """Each worker collects all tests: the counts of one are those of the run. One that crashed has none."""
    node.config.stash.setdefault(NOT_RUN, {}).update(getattr(node, "workeroutput", {}).get("not_run", {}))


def pytest_terminal_summary(terminalreporter, config):
    if not TRITON:
        terminalreporter.write_line("Triton tests not run: Triton is not installed")
    for text, count in config.stash.get(NOT_RUN, {}).items():
        terminalreporter.write_line(f"{count} {text}")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """A test's random numbers follow from its name, not from what else its process ran before it."""
    torch.manual_seed(zlib.crc32(item.nodeid.encode()))


@pytest.fixture(autouse=True)
def poisoned_memory():
    """`empty` and its relatives return NaN (integers: the largest value), from Python and from C++ alike.

    An element that a kernel forgets is then wrong in every run, not only when the allocator reuses a page. PyTorch
    does this in its deterministic mode; a test of determinism turns the mode off again before it measures.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
