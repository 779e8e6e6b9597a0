"""What the host code costs a call: no Python is executed for each delta or task, once a layer has run. What it refuses:
more programs than a grid can have, before anything is launched."""

from __future__ import annotations

import functools
import re
import sys
from pathlib import Path

import pytest
import torch
from taps_fast.kernels import _arguments, _gradients, coded, conv2d, fold, linear, merge, pointwise
from triton_shim import DEVICE

from taps_fast.tasks import TaskBatch

FOLDER = str(Path(linear.__file__).parent)


class NoKernel:
    launches = 0

    def __init__(self, makes_indices: bool) -> None:
        self.makes_indices = makes_indices

    def __getitem__(self, grid):
        NoKernel.launches += 1
        return self._launch

    def _launch(self, *arguments, **_):
        if self.makes_indices:  # through which the host reads
            for made in filter(torch.is_tensor, arguments[:2]):
                made.zero_()


@pytest.fixture(autouse=True)
def host_code_alone(monkeypatch):
    """Kernels are not run, and tables of addresses are kept on a CPU too."""
    NoKernel.launches = 0
    for module in (_arguments, _gradients, coded, conv2d, fold, linear, merge, pointwise):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            makes_indices = name in ("joined_ids_kernel", "grouped_rows_kernel", "write_kernel")
            monkeypatch.setattr(module, name, NoKernel(makes_indices))
    kept = _arguments._kept
    monkeypatch.setattr(_arguments, "_kept_or_written", kept)
    kept.cache_clear()
    # Results lie elsewhere each time, and their addresses are written anew.
    monkeypatch.setattr(torch, "empty_like", functools.cache(torch.empty_like))
    yield
    kept.cache_clear()


def executed(call) -> int:
    """Instructions of Python that a call executes in the kernels' host code, when it is not the first."""
    count = 0

    def trace(frame, event, _):
        nonlocal count
        if not frame.f_code.co_filename.startswith(FOLDER):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    call()
    before = sys.gettrace()
    for _ in range(2):  # Python 3.12 tells a process of instructions from the second trace on
        count = 0
        sys.settrace(trace)
        try:
            call()
        finally:
            sys.settrace(before)
    return count


def calls(tasks: int):
    """Each operator on as many tasks, each with a delta of its own."""
    x, base = torch.ones(4, 16, device=DEVICE), torch.ones(16, 16, device=DEVICE)
    deltas = [torch.ones(16, 16, device=DEVICE) for _ in range(tasks)]
    coeffs = torch.eye(tasks, device=DEVICE)
    index = TaskBatch.from_ids(torch.tensor([0, -1], device=DEVICE), tasks).tensors
    weight = (base, deltas, coeffs, None)
    pairs = [t * tasks + t for t in range(tasks)]
    image, taps = (t[:, :, None, None] for t in (x, base))
    codes = [torch.ones(16, 16, dtype=torch.int8, device=DEVICE)] * tasks
    factors, which = torch.ones(tasks, 16, device=DEVICE), list(range(tasks))
    images = [d[:, :, None, None] for d in deltas]
    ones = [[1, 1], [0, 0], [1, 1]]
    return {
        "forward": lambda: linear.linear_fwd(x, *weight, None, *index, 2, "split"),
        "dx": lambda: linear.linear_dx(x, *weight, *index, 2, "split"),
        "merge": lambda: linear.linear_fwd(x, *weight, None, *index, 2, "merge"),
        "dw": lambda: linear.linear_dw(x, x, *weight, *index, 2, pairs, [], True, False, False),
        "convolution": lambda: conv2d.conv2d_implicit(image, taps, images, coeffs, None, None, *ones, index[0], 2),
        "fold": lambda: merge.fold([base], deltas, torch.ones(1, 1, tasks, device=DEVICE)),
        "coded": lambda: coded.coded_fwd(x, x, codes, None, factors, which, *index, 2, "int8"),
    }


@pytest.mark.parametrize("name", calls(1))
def test_no_python_is_executed_for_each_task(name):
    """As many instructions for few tasks as for many, whether their addresses travel as arguments or in a table."""
    for few, many in ((2, 20), (40, 100)):
        assert executed(calls(few)[name]) == executed(calls(many)[name]) > 50


def refused_calls():
    """Each operator on sizes that make 2³¹ programs or more, of tensors without memory."""

    def half(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float16, device="meta")

    n, many = 2**23, half(2**31, 1)
    square, row, column = half(n, n), half(1, n), half(n, 1)
    index = (None, None, None)
    groups = tuple(torch.empty(size, dtype=torch.int64, device="meta") for size in (2**31, 2**31, 2**31 + 2))
    rest = ([], torch.empty(0, device="meta"), None)
    codes = ([column.char()], None, torch.empty(1, n, device="meta"), [0], *index, 1, "int8")
    ones = ([1, 1], [0, 0], [1, 1])
    folded = torch.empty(1, 1, 1, device="meta")
    return {
        "scale_shift": lambda: pointwise.scale_shift(square, None, None, *index, 1, "none"),
        "scale_shift_": lambda: pointwise.scale_shift_(square, None, None, *index, 1, "none"),
        "scale_shift_dx": lambda: pointwise.scale_shift_dx(square, square, None, None, None, None, *index, 1, "none"),
        "scale_shift_sums": lambda: pointwise.scale_shift_sums(many, many, None, None, None, *groups, 1, "none"),
        "moments": lambda: pointwise.moments(many, *groups, 1),
        "coded_fwd": lambda: coded.coded_fwd(square, column, *codes),
        "coded_dx": lambda: coded.coded_dx(square, *codes, n),
        "fold": lambda: fold.fold([square], [square], folded, [], []),
        "fold with masks": lambda: fold.fold([square], [square], folded, [], [square]),
        "fold_grad": lambda: fold.fold_grad([square], [square], folded, [], [], True, False),
        "linear_fwd": lambda: linear.linear_fwd(column, column, *rest, None, *index, 1, "split"),
        "linear_dx": lambda: linear.linear_dx(column, row, *rest, *index, 1, "split"),
        "linear_dw": lambda: linear.linear_dw(row, row, square, *rest, *index, 1, [], [], False, True, False),
        "merge": lambda: linear.linear_fwd(row, square, *rest, None, *index, 1, "merge"),
        "conv2d": lambda: conv2d.conv2d_implicit(
            half(1, 1, 2**13, 2**13), half(2**20, 1, 1, 1), *rest, None, *ones, None, 1
        ),
    }


@pytest.mark.parametrize("name", refused_calls())
def test_more_programs_than_a_grid_has_are_refused(name):
    with pytest.raises(ValueError, match=r"triton: sizes must make fewer than 2\*\*31 programs, got \d{10,} \(sizes "):
        refused_calls()[name]()
    assert NoKernel.launches == 0


def test_every_launch_asks():
    """One that makes its grid by itself could ask for more."""
    source = "".join(path.read_text() for path in sorted(Path(FOLDER).glob("*.py")))
    launches = re.findall(r"_kernel\[(\w+)", source)
    assert len(launches) > 12 and set(launches) == {"grid", "programs"}
    assert source.count("programs = grid(") == launches.count("programs") == 2
