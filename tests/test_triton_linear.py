"""The Triton kernels through the public function: on a CUDA device where there is one, else in the interpreter."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from taps_fast.kernels import _arguments, _configs, linear, merge
from triton_shim import DEVICE, INTERPRETED

from taps_fast import _autograd, _dispatch
from taps_fast.functional import delta_linear
from taps_fast.tasks import TaskBatch
from taps_fast.testing import (
    Case,
    assert_close_to_oracle,
    assert_no_worse_than_torch,
    linear_cases,
    make_inputs,
    oracle,
    ours,
    plain_torch,
    run,
)

HALF = torch.bfloat16
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALGORITHMS = linear.ALGORITHMS


@pytest.fixture(autouse=True)
def kernels_take_cpu_tensors(monkeypatch):
    """Without a device, the public function is led to the interpreted kernels; with one, nothing is patched."""
    if INTERPRETED:
        operators = SimpleNamespace(
            linear_fwd=linear.linear_fwd, linear_dw=linear.linear_dw, linear_grad=linear.linear_grad
        )
        monkeypatch.setattr(_autograd, "ops", operators)
        monkeypatch.setitem(_dispatch._REASONS, "triton", linear.not_supported_reasons)
    _dispatch._cached_select.cache_clear()
    yield
    _dispatch._cached_select.cache_clear()


def split_in_two(*_: int) -> int:
    return 2


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("case", list(linear_cases(DTYPES)), ids=str)
def test_every_axis(case, algorithm):
    assert_close_to_oracle(case, "triton", algorithm, DEVICE)


# 40 deltas are more than travel as kernel arguments.
MANY = Case(HALF, rows=9, shape=(20, 24), num_deltas=40, tasks=(39, 0, 7), num_tasks=40, bias="base")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_more_deltas_than_arguments(algorithm):
    assert len(MANY.tasks) < _arguments.ARGUMENTS < MANY.num_deltas
    assert_close_to_oracle(Case(HALF, rows=3, shape=(20, 24), num_deltas=40), "triton", algorithm, DEVICE)
    with_owners(MANY, [(t, t) for t in range(40)], algorithm)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reductions_in_parts(monkeypatch, dtype):
    """Split-K forward and dx: what is chosen where tiles are too few for the chip."""
    monkeypatch.setattr(_configs, "splits", split_in_two)
    assert_close_to_oracle(Case(dtype, rows=37, shape=(20, 140), num_deltas=2), "triton", "split", DEVICE)
    mixed = Case(dtype, rows=12, shape=(70, 140), num_deltas=2, tasks=(1, -1, 0), num_tasks=2, bias="base")
    assert_close_to_oracle(mixed, "triton", "split", DEVICE)


@pytest.mark.parametrize("dtype", (HALF, torch.float16))
def test_the_product_of_one_weight_is_rounded_as_pytorchs_is(dtype):
    """To 16 bits before a coefficient's gradient is summed: by chance one may be less exact than PyTorch's, which is
    rounded oftener, many are not."""
    errors = []
    for seed in range(20):
        n = make_inputs(Case(dtype, rows=37, shape=(20, 24), num_deltas=3, seed=seed), DEVICE)
        exact, plain, found = (
            run(n.to(d), call)["dcoeffs"].double().cpu()
            for d, call in ((torch.float64, oracle), (dtype, plain_torch), (dtype, ours("triton", "split")))
        )
        errors.append([(dcoeffs - exact).square().sum() for dcoeffs in (found, plain)])
    own, theirs = torch.tensor(errors).sum(0)
    assert 0 < own <= theirs


@pytest.mark.parametrize("baked", (False, True))
@pytest.mark.parametrize("need_dcoeffs", (False, True))
@pytest.mark.parametrize("need_dbase", (False, True))
@pytest.mark.parametrize("ddeltas_for", ([], [1], [1, 0]))
def test_gradients_of_one_weight(baked, need_dcoeffs, need_dbase, ddeltas_for):
    """Whether or not one of them has a place for the product; wider than a tile, from rows that are not contiguous."""
    g = torch.Generator().manual_seed(0)
    dy, x, base, *deltas = (torch.randn(n, generator=g).to(DEVICE) for n in ((1, 40), (37, 280), *[(40, 140)] * 3))
    dy, x = dy.expand(37, 40), x[:, ::2]
    coeffs, base_coeffs = torch.tensor([0.5, 0.0], device=DEVICE), torch.tensor([0.25], device=DEVICE)
    given = (dy, x, base, deltas, coeffs, base_coeffs if baked else None, None, None, None, 1)
    x.requires_grad_()  # no business of an operator's, whose results have no gradient
    dcoeffs, ddeltas, dbase, _ = linear.linear_dw(*given, [], ddeltas_for, need_dcoeffs, need_dbase, True)
    product = dy.double().T @ x.double()
    expected = [product * coeffs[k] for k in ddeltas_for]
    found = list(ddeltas)
    if need_dcoeffs:
        found.append(dcoeffs)
        expected.append(torch.stack([(product * delta).sum() for delta in deltas]))
    if need_dbase:
        found.append(dbase)
        expected.append(product * (0.25 if baked else 1.0))
    torch.testing.assert_close(found, [e.float() for e in expected], rtol=1e-4, atol=1e-4)


def with_owners(case: Case, pairs: list[tuple[int, int]], algorithm: str) -> None:
    """`assert_close_to_oracle` where only ``pairs`` have coefficients and want gradients."""
    n = make_inputs(case, DEVICE)
    allowed = torch.zeros_like(n.coeffs)
    allowed[tuple(torch.tensor(pairs).T)] = 1.0
    with torch.no_grad():
        n.coeffs.mul_(allowed)

    def call(n):
        ids = torch.tensor(case.tasks)
        return delta_linear(
            n.x, n.base, n.deltas, n.coeffs, n.bias,
            tasks=ids, base_coeffs=n.base_coeffs, pairs=pairs, backend="triton", algorithm=algorithm,
        )  # fmt: skip

    out, ref, low = run(n, call), run(n.to(torch.float64), oracle), run(n.to(case.dtype), plain_torch)
    for results in (ref, low):
        results["dcoeffs"] = results["dcoeffs"] * allowed.to(results["dcoeffs"].dtype)
    scale = float(max(d.detach().norm() for d in n.deltas) * n.dy.norm() * n.x.detach().norm())
    for name in out:
        assert_no_worse_than_torch(
            out[name], ref[name], low[name], scale=scale if name == "dcoeffs" else None, name=name
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "pairs", ([(0, 0), (1, 1), (2, 2), (3, 3)], [(0, 0), (1, 0), (2, 0), (1, 1), (3, 3)], [(2, 1)]), ids=str
)
def test_pairs_name_what_is_computed(dtype, pairs):
    """Deltas of one task, deltas shared by several, and deltas of nobody."""
    case = Case(dtype, rows=22, shape=(70, 33), num_deltas=4, tasks=(1, 3, -1, 1, 0, 0, 3, 1, 2, 2, -1), num_tasks=4)
    with_owners(case, pairs, "split")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("batch_dim", (0, 1, 2))
def test_any_axis_may_carry_the_batch(batch_dim, algorithm):
    """Each id covers two entries of its axis; rows of a sample are then neither neighbours nor equally spaced."""
    x = torch.randn(2, 4, 6, 16, device=DEVICE)
    base, *deltas = torch.randn(3, 24, 16, device=DEVICE)
    coeffs = torch.tensor([[1.0, 0.5], [0.0, 0.0], [0.0, -2.0]], device=DEVICE)
    ids = torch.arange(x.shape[batch_dim] // 2, device=DEVICE).flip(0) % 4 - 1
    y = delta_linear(x, base, deltas, coeffs, tasks=ids, batch_dim=batch_dim, backend="triton", algorithm=algorithm)
    table = torch.cat([coeffs, coeffs.new_zeros(1, 2)])
    weights = (base + torch.einsum("tk,koi->toi", table, torch.stack(deltas))).double()
    each = ids.repeat_interleave(2).view([-1 if axis == batch_dim else 1 for axis in range(3)]).expand(x.shape[:3])
    ref = torch.einsum("abci,abcoi->abco", x.double(), weights[each])
    low = torch.einsum("abci,abcoi->abco", x, weights.float()[each])
    assert_no_worse_than_torch(y, ref, low)


def test_sources_of_different_layouts():
    """Transposed weights run as they are; weights that disagree are first brought to one layout."""
    x, base, delta = (torch.randn(n, 24, device=DEVICE) for n in (5, 20, 20))
    coeffs = torch.tensor([0.5], device=DEVICE)
    ref, low = (x.to(d) @ (base.to(d) + 0.5 * delta.to(d)).T for d in (torch.float64, torch.float32))
    turned = [w.t().contiguous().t() for w in (base, delta)]
    for weights in (turned, (turned[0], delta), (base, turned[1])):
        for algorithm in ALGORITHMS:
            y = delta_linear(x, weights[0], [weights[1]], coeffs, backend="triton", algorithm=algorithm)
            assert_no_worse_than_torch(y, ref, low)


def test_another_tasks_nan_stays_its_own():
    x, base = torch.randn(6, 16, device=DEVICE), torch.randn(16, 16, device=DEVICE)
    diverged = torch.full_like(base, float("nan"))
    ids = torch.tensor([0, 1, -1, 0, 1, -1], device=DEVICE)
    for algorithm in ALGORITHMS:
        coeffs = torch.eye(2, device=DEVICE)
        y = delta_linear(x, base, [diverged, base], coeffs, tasks=ids, backend="triton", algorithm=algorithm)
        assert y[ids == 0].isnan().all()
        assert y[ids != 0].isfinite().all()


def test_a_gradient_that_diverged_spoils_its_own_task():
    x, dy, (base, *deltas) = torch.randn(4, 8), torch.randn(4, 6), torch.randn(3, 6, 8)
    dy[1] = torch.nan
    x, dy, base, *deltas = (t.to(DEVICE) for t in (x, dy, base, *deltas))
    index = TaskBatch.from_ids(torch.tensor([0, 1, -1, 0], device=DEVICE), 2).tensors
    found = linear.linear_dw(
        dy, x, base, deltas, torch.eye(2, device=DEVICE), None, *index, 1, [0, 3], [0, 1], True, False, True
    )
    dcoeffs, ddeltas, _, dbias = found
    assert dcoeffs.isnan().tolist() == [[False, False], [False, True]]
    assert [d.isnan().any().item() for d in ddeltas] == [False, True]
    assert dbias.isnan().any(1).tolist() == [False, True, False]


def test_grouped_gemm_serves_merged_weights():
    """Rows of closed gates join the base's; both ways of multiplying by a bank of weights agree."""
    ids = (1, 3, -1, 1, 0, 0, 3, 1)
    case = Case(HALF, rows=16, shape=(32, 24), num_deltas=4, tasks=ids, num_tasks=4, zeros=(4, 5, 6, 7), bias="base")
    n = make_inputs(case, DEVICE)
    fits = (24, 32, 5)
    assert linear._grouped_mm_fits(n.x, *fits)
    assert not linear._grouped_mm_fits(n.x, 24, 31, 5)
    assert not linear._grouped_mm_fits(n.x.float(), *fits)
    assert not linear._grouped_mm_fits(n.x, 24, 32, 1024)
    assert_close_to_oracle(case, "triton", "merge", DEVICE)
    index = TaskBatch.from_ids(torch.tensor(ids, device=DEVICE), 4).tensors
    rows = linear.Rows(*index, n.x.shape[0], 2)
    joined, _ = linear._joined(linear.Weight.of(n.base, n.deltas, n.coeffs, None), rows)
    assert joined.ids.tolist() == [0, 4, 0, 0, 1, 1, 4, 0]
    assert joined.offsets.tolist() == [0, 4, 6, 6, 6, 8]
    baked = torch.tensor([1.0, 0.5, 1.0, 0.0], device=DEVICE)
    joined, ends = linear._joined(linear.Weight.of(n.base, n.deltas, n.coeffs, baked), rows)
    assert joined.ids.tolist() == [2, 4, 0, 2, 1, 1, 4, 2]
    samples = [2, 4, 5, 0, 3, 7, 1, 6]
    assert joined.place.tolist() == [2 * s + r for s in samples for r in range(2)]
    assert ends.tolist() == [2, 6, 12, 12, 16]


@pytest.mark.parametrize("dtype", (torch.float32, HALF))
def test_weights_of_a_mixed_batch_take_bounded_scratch(monkeypatch, dtype):
    """In parts of 64 features, forward and in dx, for `F.grouped_mm` and for the kernel that stands in for it."""
    limit = 6 * 200 * 64 * dtype.itemsize
    monkeypatch.setattr(merge, "SCRATCH", limit)
    banks = []

    def recorded(*args, **how):
        banks.append(merge.merged(*args, **how))
        return banks[-1]

    monkeypatch.setattr(linear, "merged", recorded)
    case = Case(dtype, rows=12, shape=(136, 200), num_deltas=2, tasks=(1, -1, 0, 4), num_tasks=5, bias="task")
    assert_close_to_oracle(case, "triton", "merge", DEVICE)
    assert len(banks) == 2 * (3 + 4)  # it runs twice
    assert max(bank.nbytes for bank in banks) <= limit


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bias_by_task_is_added_as_torch_adds_it(dtype):
    """Bit for bit: in float32, and rounded once more."""
    x, base, bias = (torch.randn(n, 24, device=DEVICE).to(dtype) for n in (15, 24, 4))
    ids = torch.tensor([2, -1, 0, 2, 1], device=DEVICE)
    weight, index = (base, [base], torch.ones(3, 1, device=DEVICE), None), TaskBatch.from_ids(ids, 3).tensors
    plain, biased = (linear.linear_fwd(x, *weight, b, *index, 3, "merge") for b in (None, bias))
    assert torch.equal(biased, plain + bias[ids.repeat_interleave(3)])


def test_how_many_features_are_merged_at_once():
    scratch = merge.SCRATCH
    assert merge.part_of(4096, 4096, 9, 2) == 3584
    assert merge.part_of(768, 3072, 9, 2) == 768
    assert merge.part_of(4096, 4096, 33, 2) * 4096 * 33 * 2 <= scratch
    assert merge.scratch_refusal((4096, 4096), 511, 2) is None
    assert merge.part_of(4096, 4096, 512, 2) == 64


def test_too_many_weights_to_merge_are_refused_with_a_reason():
    """By itself the batch runs by split, however many its rows."""
    problem = _dispatch.Problem("linear", "cuda", HALF, (4096, 4096), 2**25, 512, 512, grad=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_dispatch._REASONS, "triton", linear.not_supported_reasons)
        assert _dispatch._select(problem._replace(num_tasks=511), "triton", "auto") == ("triton", "merge")
        assert _dispatch._select(problem, "triton", "auto") == ("triton", "split")
        with pytest.raises(_dispatch.BackendError, match="at most 256 MiB of scratch, 512 tasks need 256 MiB or more"):
            _dispatch._select(problem, "triton", "merge")


def test_tables_hold_any_value():
    values = [*range(40), 2**47 - 16, 16, 0, 1]
    assert _arguments.table(values, torch.device(DEVICE))[: len(values)].tolist() == values


def test_tables_are_kept_on_the_default_stream_alone(monkeypatch):
    """The compiler's CUDA graphs warm up uncaptured, on a stream of their own, in memory that is theirs."""
    stream = SimpleNamespace(cuda_stream=_arguments.DEFAULT_STREAM)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def write(values, device):
        return [*values]

    def table(index=0):
        return _arguments._kept_or_written(write, (3, 5), torch.device("cuda", index))

    kept = table()
    stream.cuda_stream = 0x7F00
    warm = table()
    assert warm is not kept and warm is not table()
    stream.cuda_stream = _arguments.DEFAULT_STREAM
    assert table() is kept and table(1) is not kept


def test_an_algorithm_it_does_not_have_is_refused():
    x = torch.randn(3, 16, device=DEVICE)
    with pytest.raises(ValueError, match="algorithm must be split or merge, got 'blend'"):
        linear.linear_fwd(x, x, [], torch.ones(0, device=DEVICE), None, None, None, None, None, 1, "blend")


@pytest.mark.parametrize(
    ("change", "reason"),
    (
        ({"dtype": torch.float64}, "float64"),
        ({"rows": 2**31}, "31 bits"),
        ({"shape": (2**31, 8)}, "31 bits"),
        ({"shape": (2**15, 2**15), "num_tasks": 2**13}, "numbers its programs in 31 bits, got 8 rows, 8192 tasks"),
        ({"shape": (2**15, 64), "rows": 2**26}, "numbers its programs in 31 bits"),
        ({"num_tasks": 2**16, "num_deltas": 2**15}, "65536 tasks, 32768 deltas"),
    ),
)
def test_what_kernels_cannot_take_is_refused_with_its_reason(change, reason):
    good = dict(op="linear", device="cuda", dtype=torch.float32, shape=(8, 8), rows=8, num_deltas=1, num_tasks=2)
    assert list(linear.not_supported_reasons(_dispatch.Problem(**good, grad=False))) == []
    (text,) = linear.not_supported_reasons(_dispatch.Problem(**good | change, grad=False))
    assert reason in text
