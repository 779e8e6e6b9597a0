"""The CPU kernels: every shape, type and instruction set against the oracle; special values; determinism.

What the public function computes on each backend is test_functional.py's business. Here are the paths that only these
kernels have: dot products and panels on either side of their thresholds, blocked depth, shared base products, strips
narrower than a vector, several jobs for one gradient.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from taps_fast import _ext
from taps_fast.tasks import TaskBatch
from taps_fast.testing import Case, assert_close_to_oracle, linear_cases

OPS = torch.ops.taps_fast
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NO_GROUPS = (None, None, None, 1)
EVERY = ("generic", "avx2", "avx512", "avx512bf16", "avx512amx")


def instruction_sets() -> list[str]:
    """Those this machine runs, worst first, so that the last is the default."""
    return list(EVERY[: EVERY.index(OPS.cpu_isa()) + 1])


def test_extension_is_loaded() -> None:
    assert _ext.CPU_ERROR is None


def kernel_cases() -> Iterator[Case]:
    """Both sides of each threshold of the plans, at sizes that no vector length divides."""
    for dtype in FLOATS:
        # Dot products, then tiles with every remainder.
        for rows in (1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 16, 17, 31, 48, 67):
            yield Case(dtype, rows=rows, shape=(71, 53), num_deltas=1)
        for shape in ((1, 1), (3, 2), (1, 97), (97, 1), (16, 16), (64, 128), (65, 127), (193, 15)):
            yield Case(dtype, rows=3, shape=shape, num_deltas=2)
            yield Case(dtype, rows=19, shape=shape, num_deltas=2)
        for rows in (5, 14, 29):  # long rows of weights, then several depth blocks, of forward and of dx
            yield Case(dtype, rows=rows, shape=(37, 2311), num_deltas=1, bias=None)
            yield Case(dtype, rows=rows, shape=(1301, 41), num_deltas=3, bias=None)
        yield Case(dtype, rows=3, shape=(5, 16421), num_deltas=1)  # rows too long to be read whole
        yield Case(dtype, rows=3, shape=(101, 8209), num_deltas=1)  # two items of dx, each in parts of the depth
        yield Case(dtype, rows=12, shape=(37, 1303), num_deltas=3, tasks=(0, 1, 2, -1) * 3, num_tasks=3)  # dx: no panel
        yield Case(dtype, rows=531, shape=(67, 35), num_deltas=1)  # several row blocks of dw
        # Weights of their own, of many rows and of few, in blocks of rows that divide both.
        yield Case(dtype, rows=430, shape=(161, 130), num_deltas=12, tasks=(0,) * 10 + tuple(range(1, 12)) * 3,
                   num_tasks=12, baked=tuple(range(12)))  # fmt: skip
        # Many one-row groups share the base's product; large ones have panels of their own; others are closed.
        ids = tuple((7 * i) % 13 - 1 for i in range(26)) + (3,) * 20 + (5,) * 15
        closed = tuple(12 * t + k for t in (4, 5, 7) for k in range(12))
        for baked in ((), (0, 3, 5)):
            yield Case(dtype, rows=len(ids), shape=(45, 37), num_deltas=12, tasks=ids, num_tasks=12, zeros=closed,
                       baked=baked, bias="base")  # fmt: skip
        yield Case(dtype, rows=2 * len(ids), shape=(45, 1037), num_deltas=1, tasks=ids, num_tasks=13, bias="task")


@pytest.mark.parametrize("algorithm", ["blend", "split"])
@pytest.mark.parametrize("case", list(kernel_cases()), ids=str)
def test_kernels_against_oracle(case: Case, algorithm: str) -> None:
    assert_close_to_oracle(case, "cpu", algorithm)


SHORT = """
import sys
from taps_fast.testing import assert_close_to_oracle, linear_cases
import torch, test_cpu_kernels as t
assert torch.ops.taps_fast.cpu_isa() == sys.argv[1]
cases = list(t.kernel_cases())[::3] + list(linear_cases(t.FLOATS))[::2]
for case in cases:
    for algorithm in ("blend", "split"):
        try:
            assert_close_to_oracle(case, "cpu", algorithm)
        except AssertionError as error:
            raise AssertionError(f"{case} {algorithm}") from error
t.check_rounding()
print(len(cases), "cases")
"""


@pytest.mark.parametrize("isa", EVERY)
def test_each_instruction_set(isa: str) -> None:
    """A third of the cases in a process that is told to use this set; a set this CPU lacks is refused by name."""
    result = run_python(SHORT, isa, TAPS_FAST_CPU_ISA=isa)
    if isa in instruction_sets():
        assert result.returncode == 0, result.stderr
    else:
        assert "one this CPU has" in result.stderr


def run_python(code: str, *argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)])
    env = os.environ | {"PYTHONPATH": path} | environment
    return subprocess.run([sys.executable, "-c", code, *argv], env=env, capture_output=True, text=True, timeout=600)


def forward(x: Tensor, base: Tensor, deltas: list[Tensor], coeffs: Tensor, algorithm: str = "blend") -> Tensor:
    return OPS.linear_fwd(x, base, deltas, coeffs, None, None, *NO_GROUPS, algorithm)


def check_rounding() -> None:
    """Results are rounded to nearest even, as torch does, for normal, subnormal, huge and special values."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    one = torch.ones(1)
    for dtype in (torch.bfloat16, torch.float16):
        values = every.view(dtype).unsqueeze(1)  # all 65536 of them, as a [65536, 1] input and as a weight
        flushes = dtype == torch.bfloat16 and OPS.cpu_isa() in (
            "avx512bf16",
            "avx512amx",
        )  # takes subnormal numbers for 0
        if flushes:
            values[values.abs() < torch.finfo(dtype).tiny] = 0.0
        eye = torch.ones(1, 1, dtype=dtype)
        for got in (forward(values, eye, [], one[:0]), forward(eye, values, [], one[:0]).t()):
            assert torch.equal(got.nan_to_num(7.0), values.nan_to_num(7.0)) and torch.equal(got.isnan(), values.isnan())
        # Halfway between neighbours and just beside it, by adding a delta scaled to half a unit in the last place.
        for scale in (0.5, 0.49, 0.51):
            low, high = every[:-1].view(dtype), every[1:].view(dtype)
            both = torch.stack([low, high], 1)
            weight = torch.tensor([[1 - scale, scale]]).to(torch.float32)
            want = (both.float() * weight).sum(1, keepdim=True).to(dtype)
            if flushes:
                want[want.abs() < torch.finfo(dtype).tiny] = 0.0
            deltas = [torch.tensor([[1.0, 0.0]]).to(dtype), torch.tensor([[0.0, 1.0]]).to(dtype)]
            got = forward(both, torch.zeros(1, 2, dtype=dtype), deltas, weight[0].contiguous(), "split")
            finite = want.isfinite() & both.isfinite().all(1, keepdim=True)
            assert torch.equal(got[finite], want[finite])


def test_rounding() -> None:
    check_rounding()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [3, 20])
def test_special_values_stay_where_they_belong(dtype: torch.dtype, rows: int) -> None:
    """A NaN in a row or a weight reaches that row or column alone; a closed delta's reaches nothing."""
    x, base, delta = torch.randn(rows, 40).to(dtype), torch.randn(21, 40).to(dtype), torch.randn(21, 40).to(dtype)
    coeffs = torch.ones(1, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    x[1, 39], base[20, 5] = float("nan"), float("inf")
    y = forward(x, base, [delta], coeffs)
    assert y[1].isnan().all() and y[[0, 2], :20].isfinite().all() and not y[[0, 2], 20].isfinite().any()
    closed = forward(x, base, [torch.full_like(delta, float("nan"))], torch.zeros_like(coeffs))
    assert torch.equal(closed.nan_to_num(7.0), forward(x, base, [], coeffs[:0]).nan_to_num(7.0))


def mixed_arguments(rows: int = 300, out: int = 200, into: int = 150, tasks: int = 9) -> tuple[Tensor, tuple]:
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(-1, tasks, (rows,), generator=g)
    x, base = torch.randn(rows, into, generator=g), torch.randn(out, into, generator=g)
    deltas = [torch.randn(out, into, generator=g) for _ in range(tasks)]
    coeffs = torch.diag(torch.rand(tasks, generator=g) + 0.1)
    coeffs[::3] = 0
    batch = TaskBatch.from_ids(ids, tasks)
    return x, (base, deltas, coeffs, None, batch)


def every_result(x: Tensor, arguments: tuple) -> list[Tensor]:
    base, deltas, coeffs, base_coeffs, batch = arguments
    weight, dy = (base, deltas, coeffs, base_coeffs), torch.ones(len(x), len(base), dtype=x.dtype).cumsum(0)
    found = [OPS.linear_fwd(x, *weight, None, *batch.tensors, 1, name) for name in ("blend", "split")]
    found += [OPS.linear_dx(dy, *weight, *batch.tensors, 1, name) for name in ("blend", "split")]
    wanted = ([], [0, 1, 5], True, True, True)
    dcoeffs, ddeltas, dbase, dbias = OPS.linear_dw(dy, x, *weight, *batch.tensors, 1, *wanted)
    return [*found, dcoeffs, *ddeltas, dbase, dbias]


@pytest.mark.parametrize("rows", [300, 12])  # of few rows of dx, each thread sums a part of the depth
def test_same_bits_again_and_right_at_any_thread_count(rows: int) -> None:
    x, arguments = mixed_arguments(rows)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = every_result(x, arguments)
        for threads in (1, 2, 3, 4, 7):
            torch.set_num_threads(threads)
            first = every_result(x, arguments)
            for _ in range(5):
                for got, want in zip(every_result(x, arguments), first, strict=True):
                    assert torch.equal(got, want)
            for got, want in zip(first, single, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    finally:
        torch.set_num_threads(before)


def test_only_what_was_asked_for_is_computed() -> None:
    x, (base, deltas, coeffs, _, batch) = mixed_arguments(rows=40)
    num_deltas = len(deltas)
    dy = torch.randn(40, len(base))
    arguments = (dy, x, base, deltas, coeffs, None, *batch.tensors, 1)
    full, every, dbase, _ = OPS.linear_dw(*arguments, [], list(range(num_deltas)), True, True, False)
    pairs = [1 * num_deltas + 1, 2 * num_deltas + 5]
    some, (fifth,), none, _ = OPS.linear_dw(*arguments, pairs, [5], True, False, False)
    kept = torch.zeros(coeffs.numel(), dtype=torch.bool)
    kept[pairs] = True
    assert torch.equal(some.view(-1)[kept], full.view(-1)[kept]) and not some.view(-1)[~kept].any()
    assert torch.equal(fifth, every[5]) and none.numel() == 0
    nothing, no_deltas, again, _ = OPS.linear_dw(*arguments, [], [], False, True, False)
    assert nothing.numel() == 0 and no_deltas == [] and torch.equal(again, dbase)
    assert not every[0].any(), "a delta that every present task has closed has gradient 0"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("into", [0, 1, 600])
def test_sums_of_the_rows_of_dy(dtype: torch.dtype, into: int) -> None:
    """Of each task, whether or not it has another gradient, over more rows and outputs than one tile packs."""
    rows, out, tasks = 700, 201, 4
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    ids = torch.randint(-1, tasks - 1, (rows,), generator=torch.Generator().manual_seed(0))  # the last task is absent
    x, dy, base = torch.randn(rows, into).to(dtype), torch.randn(rows, out).to(dtype), torch.randn(out, into).to(dtype)
    coeffs, batch = torch.eye(tasks, dtype=wide)[:, :2].contiguous(), TaskBatch.from_ids(ids, tasks)
    want = torch.stack([dy[ids == t].double().sum(0) for t in (*range(tasks), -1)])
    for wanted in (([], [], False, False), ([0], [1], True, False), ([], [0, 1], True, True)):
        *_, found = OPS.linear_dw(dy, x, base, [base, base], coeffs, None, *batch.tensors, 1, *wanted, True)
        torch.testing.assert_close(found, want.to(wide), rtol=1e-5, atol=1e-4)
    *_, found = OPS.linear_dw(dy, x, base, [], coeffs[0, :0], None, None, None, None, 1, [], [], False, False, True)
    torch.testing.assert_close(found, dy.double().sum(0, keepdim=True).to(wide), rtol=1e-5, atol=1e-4)


def test_cost_does_not_grow_with_tasks_that_are_absent() -> None:
    """1024 tasks, two of them present: the other deltas are never read (they hold NaN)."""
    x, base = torch.randn(6, 33), torch.randn(20, 33)
    poison = torch.full_like(base, float("nan"))
    deltas = [poison] * 1024
    deltas[700] = torch.randn_like(base)
    coeffs = torch.zeros(1024, 1024)
    coeffs.fill_diagonal_(1.0)[3, 3] = 0.0
    batch = TaskBatch.from_ids([700, 3, -1, 700, 3, -1], 1024)
    y = OPS.linear_fwd(x, base, deltas, coeffs, None, None, *batch.tensors, 1, "blend")
    want = x @ base.t()
    want[[0, 3]] = x[[0, 3]] @ (base + deltas[700]).t()
    torch.testing.assert_close(y, want)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(algorithm="merge"), "algorithm must be blend or split on CPU, got 'merge'"),
        (dict(base=torch.randn(5, 4)), r"x must have shape \[2, 4\], got \[2, 3\]"),
        (dict(deltas=[torch.randn(5, 2)]), r"deltas must have shape \[5, 3\], got \[5, 2\]"),
        (dict(coeffs=torch.ones(2)), r"coeffs must have 1 elements, got \[2\]"),
        (dict(bias=torch.randn(4)), r"bias must have 5 elements, got \[4\]"),
        (dict(coeffs=torch.ones(1, dtype=torch.float64)), "coeffs must have scalar type 6, got 7"),
        (dict(x=torch.ones(2, 3, dtype=torch.int64)), "x must be float32, bfloat16, float16 or float64"),
    ],
)
def test_internal_checks_name_both_values(change: dict, text: str) -> None:
    x, base, coeffs = torch.randn(2, 3), torch.randn(5, 3), torch.ones(1)
    given = dict(x=x, base=base, deltas=[base], coeffs=coeffs, bias=None, algorithm="blend") | change
    with pytest.raises(RuntimeError, match=f"linear_fwd: {text}"):
        OPS.linear_fwd(given["x"], given["base"], given["deltas"], given["coeffs"], None, given["bias"], *NO_GROUPS,
                       given["algorithm"])  # fmt: skip


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(order=torch.tensor([0, 4, 2])), r"order must be in \[0, 3\), got 4"),
        (dict(order=torch.tensor([0, -1, 2])), r"order must be in \[0, 3\), got -1"),
        (dict(offsets=torch.tensor([0, 9, 2, 3])), "offsets must not descend, got 9 before 2"),
        (dict(offsets=torch.tensor([0, 1, 2, 2])), "offsets must span the batch of 3, got 0 to 2"),
        (dict(offsets=None), "ids, order and offsets must come together"),
        (
            dict(ids=torch.zeros(4).long(), order=torch.arange(4), offsets=torch.tensor([0, 0, 4, 4]), inner=2**62),
            "rows must be a multiple of inner times the batch, got 3 .inner 4611686018427387904, batch 4.",
        ),
    ],
)
def test_groups_are_checked_by_every_operator(change: dict, text: str) -> None:
    """A `TaskBatch` is a dataclass that anybody can fill; what it says is where rows are read and written."""
    given = dict(ids=torch.tensor([-1, 0, 1]), order=torch.arange(3), offsets=torch.tensor([0, 1, 2, 3]), inner=1)
    index = tuple((given | change).values())
    x, base, coeffs = torch.randn(3, 5), torch.randn(4, 5), torch.ones(2, 1)
    y, weight, bytes_ = x @ base.t(), (base, [base], coeffs, None), torch.ones(4, 5, dtype=torch.int8)
    codes = ([bytes_], None, torch.ones(2, 4), [0, 0], *index, "int8")
    calls = {
        "linear_fwd": (x, *weight, None, *index, "blend"),
        "linear_coded": (x, *weight, None, *index, "auto", [torch.ones(())], [], [-1]),
        "linear_dx": (y, *weight, *index, "blend"),
        "linear_dw": (y, x, *weight, *index, [], [0], True, True, False),
        "coded_fwd": (y, x, *codes),
        "coded_dx": (y, *codes, 5),
        "moments": (x, *index),
        "scale_shift": (x, None, None, *index, "relu"),
        "group_norm": (x, [], [], 1, 1e-5, True, *index),
        "group_norm_train": (x, [], [], 1, 1e-5, True, *index),
        "group_norm_grad": (x, x, [], x[:, :1], x[:, :1], True, *index, True),
        "batch_norm_train": (x, [], [], [], [], [], [0.0] * 3, *index),
        "batch_norm_grad": (x, x, [], torch.ones(3, 5), torch.ones(3, 5), [], [0.0] * 3, *index, True),
    }
    for name, arguments in calls.items():
        with pytest.raises(RuntimeError, match=f"{name}: {text}"):
            getattr(OPS, name)(*arguments)


@pytest.mark.parametrize("algorithm", ["blend", "split"])
def test_base_coefficients_that_are_no_numbers_spoil_their_own_tasks(algorithm: str) -> None:
    x, base, batch = torch.randn(6, 5), torch.randn(4, 5), TaskBatch.from_ids([0, 1, 2, 0, 1, -1], 3)
    base_coeffs = torch.tensor([1, torch.nan, torch.nan])
    coeffs = torch.tensor([[0.0], [1.0], [0.0]])
    y = OPS.linear_fwd(x, base, [base], coeffs, base_coeffs, None, *batch.tensors, 1, algorithm)
    spoilt = torch.tensor([False, True, True, False, True, False])
    assert y[spoilt].isnan().all()
    torch.testing.assert_close(y[~spoilt], x[~spoilt] @ base.t())


def test_rows_with_strides_are_read_in_place() -> None:
    """A column slice and an expanded row need no copy, and nothing beyond their columns is read."""
    wide = torch.full((30, 64), float("nan"))
    wide[:, 10:47] = torch.randn(30, 37)
    x, base = wide[:20, 10:47], torch.randn(37, 9).t()
    torch.testing.assert_close(forward(x, base, [base], torch.ones(1)), x @ (2 * base).t())
    row = torch.randn(1, 37).expand(20, 37)
    torch.testing.assert_close(forward(row, base, [base], torch.ones(1)), row @ (2 * base).t())


@pytest.mark.parametrize("case", list(linear_cases([torch.float32])), ids=str)
def test_design_axes(case: Case) -> None:
    assert_close_to_oracle(case, "cpu", "split")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_weights_that_are_stored_transposed_are_read_in_place(dtype: torch.dtype) -> None:
    """As layers that keep [I, O] hand them over: the same results, and no copy of a weight."""
    torch.manual_seed(0)
    for rows, into, out in ((1, 70, 33), (6, 33, 130), (60, 130, 70)):
        x, dy = torch.randn(rows, into).to(dtype), torch.randn(rows, out).to(dtype)
        base, *deltas = (torch.randn(into, out).to(dtype) for _ in range(4))
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        ids = torch.arange(rows) % 4 - 1
        weights, coeffs = (
            torch.stack([base, *deltas]),
            torch.tensor([[1.0, 0, 0.5], [0, 0, 0], [0, 2.0, 0]], dtype=wide),
        )
        groups = (*TaskBatch.from_ids(ids, 3).tensors, 1)
        turned = (base.t(), [d.t() for d in deltas], coeffs, None)
        whole = weights[:1].double() + torch.einsum("tk,kio->tio", coeffs.double(), weights[1:].double())
        whole = torch.cat([whole, base.double()[None]])[ids]
        for algorithm in ("blend", "split"):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                y, dx = (
                    OPS.linear_fwd(x, *turned, None, *groups, algorithm),
                    OPS.linear_dx(dy, *turned, *groups, algorithm),
                )
            assert not [e.key for e in profile.key_averages() if e.key in ("aten::contiguous", "aten::copy_")]
            tolerance = (
                {"rtol": 1e-4, "atol": 1e-4} if wide == dtype or dtype == torch.float32 else {"rtol": 2e-2, "atol": 0.4}
            )
            torch.testing.assert_close(y.double(), torch.einsum("mi,mio->mo", x.double(), whole), **tolerance)
            torch.testing.assert_close(dx.double(), torch.einsum("mo,mio->mi", dy.double(), whole), **tolerance)


WAKE = """
import os, sys, torch, taps_fast
torch.set_num_threads(4)
rows, size = map(int, sys.argv[1:])
x, base, delta = torch.randn(rows, size), torch.randn(size, size), torch.randn(size, size)
leaves = [x.requires_grad_(), base, delta.requires_grad_()]
torch.ones(1, requires_grad=True).backward()  # autograd has a thread for each GPU
before = len(os.listdir("/proc/self/task"))
y = taps_fast.delta_linear(x, base, [delta], torch.ones(1))
y.sum().backward()
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads as Linux lists them")
@pytest.mark.parametrize(("rows", "size", "woken"), [(4, 64, 0), (1, 128, 0), (64, 512, 3)])
def test_small_products_wake_no_thread(rows: int, size: int, woken: int) -> None:
    """A thread that has to be woken, or waits for a core that others keep busy, costs more than they take."""
    assert int(run_python(WAKE, str(rows), str(size)).stdout) == woken
