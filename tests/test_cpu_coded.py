"""The CPU kernels for bits and int8, each instruction set's, against the same products in plain PyTorch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from taps_fast import _coded
from taps_fast.formats import pack_bits
from taps_fast.tasks import TaskBatch
from taps_fast.testing import assert_no_worse_than_torch

OPS = torch.ops.taps_fast
IDS = [2, 0, -1, 2, 3, 0, 0, 4]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FORMATS = ("bits", "mask", "int8")
SHAPES = ((70, 130), (9, 5), (40, 64), (33, 257))


def arguments(format, shape, dtype, mixed, inner):
    g = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randn(size, generator=g, dtype=torch.float64).to(dtype)

    if format == "int8":
        codes = [torch.randint(-127, 128, shape, generator=g, dtype=torch.int8) for _ in range(3)]
    else:
        codes = [pack_bits(torch.rand(shape, generator=g) < 0.5) for _ in range(3)]
    tile = draw(*shape) if format == "mask" else None
    which = [1, -1, 2, 1, 0] if mixed else [2]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    factors = torch.randn(len(which), shape[0], generator=g, dtype=torch.float64).to(wide)
    index = TaskBatch.from_ids(torch.tensor(IDS), 5).tensors if mixed else (None, None, None)
    rows = inner * len(IDS)
    x, y, dy = draw(rows, shape[1]), draw(rows, shape[0]), draw(rows, shape[0])
    return x, y, dy, (codes, tile, factors, which, *index, inner if mixed else 1, format)


def check(format, shape, dtype, mixed, inner):
    x, y, dy, rest = arguments(format, shape, dtype, mixed, inner)
    codes, tile, factors, *how = rest
    wide = (codes, None if tile is None else tile.double(), factors.double(), *how)
    before = [t.clone() for t in (x, y, dy)]
    found = OPS.coded_fwd(y, x, *rest)
    assert torch.equal(found, OPS.coded_fwd(y, x, *rest)), "differs from run to run"
    truth = _coded.coded_fwd(y.double(), x.double(), *wide)
    plain = y + _coded.coded_fwd(torch.zeros_like(y), x, *rest)
    assert_no_worse_than_torch(found, truth, plain, name="y")
    exact = OPS.coded_fwd(y.to(factors.dtype), x, *rest)
    assert_no_worse_than_torch(exact, truth, _coded.coded_fwd(y.to(factors.dtype), x, *rest), name="y, not rounded")
    dx = OPS.coded_dx(dy, *rest, shape[1])
    plain = _coded.coded_dx(dy, *rest, shape[1])
    assert_no_worse_than_torch(dx, _coded.coded_dx(dy.double(), *wide, shape[1]), plain, name="dx")
    assert all(torch.equal(a, b) for a, b in zip((x, y, dy), before, strict=True)), "an input was changed"


def check_all(dtypes=DTYPES, shapes=SHAPES, inners=(1, 3, 9)):
    for format in FORMATS:
        for dtype in dtypes:
            for shape in shapes:
                check(format, shape, dtype, False, 1)
                for inner in inners:
                    check(format, shape, dtype, True, inner)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels(dtype):
    check_all((dtype,))


@pytest.mark.parametrize("isa", ["generic", "avx2"])
def test_other_instruction_sets(isa):
    """In a process of its own, since the choice is made once."""
    if isa == "avx2" and "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this CPU has no AVX2")
    code = f"import torch, test_cpu_coded as t\nassert t.OPS.cpu_isa() == {isa!r}\nt.check_all(inners=(3,))"
    env = {**os.environ, "TAPS_FAST_CPU_ISA": isa, "PYTHONPATH": str(Path(__file__).parent)}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_threads_change_nothing():
    x, y, dy, rest = arguments("mask", (300, 130), torch.float32, True, 7)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append((OPS.coded_fwd(y, x, *rest), OPS.coded_dx(dy, *rest, 130)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_another_task_holds_does_not_matter():
    x, y, _, (codes, _, factors, *how) = arguments("bits", (9, 70), torch.float32, True, 1)
    factors[1] = torch.nan  # of a task without a delta
    assert OPS.coded_fwd(y, x, codes, None, factors, *how).isfinite().all()


def test_nothing_to_do():
    x, y, dy, (codes, _, factors, which, *_) = arguments("bits", (9, 70), torch.float32, False, 1)
    how = (codes, None, factors, which, None, None, None, 1, "bits")
    assert OPS.coded_fwd(y[:0], x[:0], *how).shape == (0, 9) and OPS.coded_dx(dy[:0], *how, 70).shape == (0, 70)
    none = (codes, None, factors, [-1], None, None, None, 1, "bits")
    assert torch.equal(OPS.coded_fwd(y, x, *none), y) and not OPS.coded_dx(dy, *none, 70).any()


@pytest.mark.parametrize("format", FORMATS)
def test_operators_are_well_formed(format):
    x, y, dy, rest = arguments(format, (9, 70), torch.float32, True, 1)
    torch.library.opcheck(OPS.coded_fwd.default, (y, x, *rest))
    torch.library.opcheck(OPS.coded_dx.default, (dy, *rest, 70))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda a: [a[0], a[1], [a[2][0][:, :8]] * 3, *a[3:]],
            r"coded_fwd: codes must be contiguous, of shape \[9, 16\]",
        ),
        (lambda a: [*a[:3], a[1], *a[4:]], "coded_fwd: tile must be given for mask and for nothing else"),
        (lambda a: [*a[:5], [3, 0, 0, 0, 0], *a[6:]], r"coded_fwd: which must be in \[-1, 3\), got 3"),
        (lambda a: [*a[:-1], "int4"], "coded_fwd: format must be bits, mask or int8, got 'int4'"),
    ],
)
def test_operators_check_what_they_are_given(change, text):
    x, y, _, rest = arguments("bits", (9, 70), torch.float32, True, 1)
    with pytest.raises(RuntimeError, match=text):
        OPS.coded_fwd(*change([y, x, *rest]))
