"""The CUDA kernel for few rows, emulated: against the oracle on every edge, and what it asks of the machine."""

from __future__ import annotations

from dataclasses import replace

import emulator
import pytest
import torch

from taps_fast import _dispatch, testing
from taps_fast.testing import Case

emulated = emulator.load()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IDS = (1, 3, -1, 1, 0, 0, 3, 1, 2, 2, -1)


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    """The backend takes CPU tensors, which its emulated kernels serve."""
    monkeypatch.setitem(_dispatch._REASONS, "cuda", lambda problem: iter(()))
    _dispatch._cached_select.cache_clear()
    emulated.reset()
    yield emulated.settings()
    emulated.reset()
    _dispatch._cached_select.cache_clear()


@torch.no_grad()
def check(case: Case, inputs: testing.Inputs | None = None) -> torch.Tensor:
    """y against the oracle; the inputs unchanged."""
    n = inputs or testing.make_inputs(case)
    before = [t.clone() for t in (n.x, n.base, *n.deltas, n.coeffs)]
    y = testing.ours("cuda", "stream")(n)
    for t, old in zip((n.x, n.base, *n.deltas, n.coeffs), before, strict=True):
        assert torch.equal(t.nan_to_num(), old.nan_to_num())
    testing.assert_no_worse_than_torch(y, testing.oracle(n.to(torch.float64)), testing.plain_torch(n.to(case.dtype)))
    return y


@pytest.mark.parametrize("case", list(testing.linear_cases(DTYPES)), ids=str)
def test_the_axes_of_the_design(case):
    check(case)


@pytest.mark.parametrize("rows", (1, 2, 8, 9, 16, 17, 33))
@pytest.mark.parametrize("shape", ((1, 1), (15, 8), (16, 31), (17, 32), (33, 264)), ids=str)
def test_edges_of_tiles(rows, shape):
    for dtype in DTYPES:
        check(Case(dtype, rows=rows, shape=shape, num_deltas=1))


@pytest.mark.parametrize("deltas", (1, 2, 3, 4, 7, 16, 31, 32, 33))
def test_many_deltas(deltas):
    """Also more sources than a warp has lanes; half of the mixed batch's coefficients are 0."""
    check(Case(torch.bfloat16, rows=5, shape=(18, 72), num_deltas=deltas))
    zeros = tuple(range(0, 6 * deltas, 2))
    mixed = Case(
        torch.bfloat16, rows=16, shape=(18, 72), num_deltas=deltas, tasks=(5, 0, -1, 3, 5, 1, 2, 0), num_tasks=6,
        zeros=zeros, bias="task",
    )  # fmt: skip
    check(mixed)
    check(replace(mixed, dtype=torch.float32, baked=(0, 5), bias="base"))


@pytest.mark.parametrize("order", ("backward", "random"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_order_of_threads_changes_no_bit(settings, order, dtype):
    """A barrier too few would let it."""
    case = Case(dtype, rows=11, shape=(20, 600), num_deltas=3, tasks=IDS, num_tasks=4, bias="task")
    settings.processors, settings.has_clusters = 132, True
    expected = check(case)
    settings.order = order
    for seed in range(2):
        settings.seed = seed
        assert torch.equal(check(case), expected)


@pytest.mark.parametrize(("in_features", "cluster"), ((256, 1), (1024, 2), (2048, 4), (4096, 8), (8192, 8)))
def test_clusters_share_the_in_features(settings, in_features, cluster):
    """Few tiles and a long sum: the blocks of a cluster add theirs through distributed shared memory."""
    settings.processors = 64
    case = Case(torch.bfloat16, rows=3, shape=(19, in_features), num_deltas=1)
    one = check(case)
    (launch,) = settings.launches
    assert launch.cluster == 1 and launch.blocks == 2
    settings.has_clusters = True
    many = check(case)
    assert emulated.settings().launches[-1].cluster == cluster
    assert cluster > 1 or torch.equal(one, many)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", (0, 1), ids=("aligned", "misaligned"))
def test_misaligned_tensors(dtype, offset):
    """Rows of a wider buffer that start one element late: right, by single loads."""
    n = testing.make_inputs(Case(dtype, rows=9, shape=(21, 64), num_deltas=2))

    def moved(t: torch.Tensor) -> torch.Tensor:
        wide = torch.full((t.shape[0], 80), float("nan"), dtype=dtype)
        wide[:, offset : offset + t.shape[1]] = t.detach()
        return wide[:, offset : offset + t.shape[1]]

    check(n.case, replace(n, x=moved(n.x), base=moved(n.base), deltas=[moved(d) for d in n.deltas]))
    # Strides that differ between sources are made equal first.
    check(n.case, replace(n, deltas=[moved(n.deltas[0]), n.deltas[1]]))
    check(n.case, replace(n, base=n.base.detach().t().contiguous().t()))


def test_rows_may_be_far_apart(tmp_path):
    """Beyond 2**31 elements, in a sparse file of which only the pages that hold data exist."""
    room = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2**32, dtype=torch.float16)
    n = testing.make_inputs(Case(torch.float16, rows=3, shape=(4, 40), num_deltas=1, tasks=(0, -1, 0), num_tasks=1))

    def far(tensor: torch.Tensor, first: int) -> torch.Tensor:
        return room[first:].as_strided(tensor.shape, (2**30, 1)).copy_(tensor.detach())

    moved = replace(n, x=far(n.x, 0), base=far(n.base, 64), deltas=[far(n.deltas[0], 128)])
    assert torch.equal(check(n.case, moved), check(n.case, n))


@pytest.mark.parametrize("in_features", (64, 1024, 4096))
def test_a_closed_gate_keeps_the_nan_of_a_delta_alone_out(in_features):
    """It is fetched before its gate is known, in as many steps as the ring holds."""
    x, base = torch.randn(5, in_features), torch.randn(20, in_features)
    deltas, coeffs = [torch.full_like(base, torch.nan)], torch.zeros(1)
    with torch.no_grad():
        y = testing.functional.delta_linear(x, base, deltas, coeffs, backend="cuda", algorithm="stream")
    torch.testing.assert_close(y, x @ base.T, rtol=1e-4, atol=1e-4)


def test_a_closed_gate_keeps_a_nan_out():
    n = testing.make_inputs(Case(torch.bfloat16, rows=6, num_deltas=2, tasks=(0, 1, 0, 1, -1, -1), num_tasks=2))
    coeffs = torch.eye(2)
    broken = [n.deltas[0].detach(), torch.full_like(n.deltas[1], float("nan"))]
    y = testing.ours("cuda", "stream")(replace(n, coeffs=coeffs, deltas=broken))
    assert y[[1, 3]].isnan().all() and y[[0, 2, 4, 5]].isfinite().all()


def test_rows_of_several_samples(settings):
    """inner > 1: consecutive rows belong to one sample; samples repeat along an outer axis."""
    x, base, delta = torch.randn(2, 3, 2, 8), torch.randn(5, 8), torch.randn(5, 8)
    ids = torch.tensor([0, 1, -1])
    coeffs = torch.tensor([[0.5], [0.0]])
    with torch.no_grad():
        y, expected = (
            testing.functional.delta_linear(x, base, [delta], coeffs, tasks=ids, batch_dim=1, backend=backend)
            for backend in ("cuda", "reference")
        )
    torch.testing.assert_close(y, expected)


def test_one_launch_without_memory_of_its_own(settings):
    check(Case(torch.bfloat16, rows=11, shape=(40, 64), num_deltas=4, tasks=IDS, num_tasks=4, bias="task"))
    (launch,) = settings.launches
    assert launch.blocks == 3 and launch.shared_bytes <= settings.shared_limit


def test_many_deltas_on_a_small_gpu(settings):
    """Sixteen rows beside a long list of coefficients do not fit in its shared memory: eight do."""
    case = Case(torch.bfloat16, rows=16, shape=(18, 72), num_deltas=60)
    small = check(case)
    settings.shared_limit = 227 * 1024
    large = check(case)
    assert [launch.blocks for launch in settings.launches] == [4, 2]
    assert torch.equal(small, large)


def test_a_failed_launch_says_what_was_started(settings):
    settings.refuse = "out of resources"
    with pytest.raises(RuntimeError) as error:
        check(Case(torch.bfloat16, rows=3, shape=(20, 64), num_deltas=2))
    assert (
        "linear_stream: stream_kernel did not start: out of resources (bfloat16, rows 3, base [20, 64], 2 deltas; "
        "2 blocks in clusters of 1, "
    ) in str(error.value)


def call(**changed):
    arguments = dict(
        x=torch.ones(4, 8), base=torch.ones(6, 8), deltas=[torch.ones(6, 8)], coeffs=torch.ones(2, 1),
        base_coeffs=None, bias=None, ids=torch.tensor([0, 1]), inner=1,
    )  # fmt: skip
    return torch.ops.taps_fast.linear_stream(*(arguments | changed).values())


@pytest.mark.parametrize(
    ("changed", "text"),
    (
        ({"x": torch.ones(8)}, "linear_stream: x and base must have 2 dimensions, got [8] and [6, 8]"),
        ({"x": torch.ones(4, 8).double()}, "linear_stream: x must be float32, bfloat16 or float16, got float64"),
        ({"x": torch.ones(4, 7)}, "linear_stream: x must have shape [4, 8], got [4, 7]"),
        ({"deltas": [torch.ones(5, 8)]}, "linear_stream: deltas must have shape [6, 8], got [5, 8]"),
        ({"deltas": [torch.ones(6, 8).half()]}, "linear_stream: deltas must have scalar type 6, got 5"),
        ({"deltas": [torch.ones(6, 8)] * 256}, "linear_stream: deltas must be fewer than 256, got 256"),
        ({"coeffs": torch.ones(2)}, "linear_stream: coeffs must have shape [T, K] with tasks, got [2]"),
        ({"coeffs": torch.ones(2, 3)}, "linear_stream: coeffs must have 2 elements, got [2, 3]"),
        ({"ids": torch.tensor([0, 1, 0])}, "must be a multiple of inner times the batch, got 4 (inner 1, batch 3)"),
        ({"bias": torch.ones(2, 6)}, "linear_stream: bias must have shape [3, 6], got [2, 6]"),
        (
            {"bias": torch.ones(3, 6), "ids": None, "coeffs": torch.ones(1)},
            "linear_stream: bias must have shape [O] without tasks, got [3, 6]",
        ),
    ),
)
def test_wrong_arguments_are_errors(changed, text):
    with pytest.raises(RuntimeError) as error:
        call(**changed)
    assert text in str(error.value)


def test_shapes_while_tracing():
    torch.library.opcheck(
        torch.ops.taps_fast.linear_stream,
        (torch.ones(4, 8), torch.ones(6, 8), [torch.ones(6, 8)], torch.ones(2, 1), None, torch.ones(3, 6),
         torch.tensor([0, -1]), 2),
    )  # fmt: skip
