"""Compressed deltas: what each format means, and that every way of using one gives what its dense delta gives."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from taps_fast import TaskBatch, _coded, delta_conv2d, delta_linear
from taps_fast.formats import FORMATS, Format, Int8, LowRank, MaskBits, SignBits, compress, pack_bits, unpack_bits
from taps_fast.testing import assert_no_worse_than_torch

SHAPES = [(6, 5), (3, 64), (7, 65), (8, 3, 3, 3)]
KINDS = tuple(FORMATS)


def make(kind: str, shape: tuple[int, ...], dtype=torch.float32, seed=0, tile=None, rank=3) -> Format:
    """A format that trains what it can, exactly representable in ``dtype``."""
    g = torch.Generator().manual_seed(seed)
    delta = torch.randn(shape, generator=g, dtype=torch.float64).mul(math.prod(shape[1:]) ** -0.5).to(dtype)
    if kind == "mask":
        tile = delta if tile is None else tile
        made: Format = MaskBits.from_mask(torch.rand(shape, generator=g) < 0.4, tile, 0.75)
    else:
        made = compress(delta, kind, rank=rank if kind == "lowrank" else None)
    for name in made.trained:
        made.tensors[name].requires_grad_()
    return made


@pytest.mark.parametrize("shape", SHAPES)
def test_bits_round_trip(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    codes = pack_bits(mask)
    assert torch.equal(unpack_bits(codes, shape), mask)
    assert codes.dtype == torch.uint8 and codes.shape == (shape[0], 8 * math.ceil(math.prod(shape[1:]) / 64))


def test_bits_are_where_the_kernels_read_them():
    codes = pack_bits(torch.arange(70)[None] == torch.tensor([[0], [9], [69]]))
    assert codes[0].tolist() == [1] + [0] * 15 and codes[1, 1] == 2 and codes[2, 8] == 1 << 5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_formulas(shape, dtype):
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    delta.view(-1)[0] = 0
    wide = delta.double()
    exact = dict(atol=1e-6, rtol=1e-5) if dtype != torch.float64 else dict(atol=1e-12, rtol=1e-12)

    signs = SignBits.from_dense(delta).dense(torch.float64)
    torch.testing.assert_close(signs, ((wide >= 0).double() * 2 - 1) * wide.abs().mean(), **exact)

    mask = wide > 0.3
    torch.testing.assert_close(MaskBits.from_mask(mask, delta, 0.5).dense(torch.float64), wide * mask / 2, **exact)

    int8 = Int8.from_dense(delta)
    step = wide.flatten(1).abs().amax(1) / 127
    error = (int8.dense(torch.float64) - wide).flatten(1).abs()
    assert bool((error <= step[:, None] * 0.50001).all())
    assert int8.scale.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)

    u, s, v = torch.linalg.svd(wide.flatten(1), full_matrices=False)
    low = LowRank.from_dense(delta, 2)
    nearest = ((u[:, :2] * s[:2]) @ v[:2]).view(shape)
    rounding = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(low.dense(torch.float64), nearest, atol=rounding, rtol=rounding)
    assert low.error(delta) == pytest.approx(float(s[2:].norm() / s.norm()), abs=rounding)


def test_bytes():
    delta = torch.randn(16, 128)
    assert SignBits.from_dense(delta).bytes == 16 * 128 // 8 + 4
    assert MaskBits.from_mask(delta > 0, delta).bytes == 16 * 128 // 8 + 4  # the tile is not the task's own
    assert Int8.from_dense(delta).bytes == 16 * 128 + 16 * 4
    assert LowRank.from_dense(delta, 4).bytes == 4 * (16 + 128) * 4 + 4


def test_a_zero_delta_stays_zero():
    for kind in ("bits", "int8", "lowrank"):
        small = compress(torch.zeros(4, 6), kind, rank=2 if kind == "lowrank" else None)
        assert not small.dense().any() and small.error(torch.zeros(4, 6)) == 0


@pytest.mark.parametrize("rows", [0, 1])  # that are not 0
@pytest.mark.parametrize("kind", ["bits", "int8", "lowrank"])
def test_what_is_zero_can_be_trained(kind, rows):
    """Each scale, and each column of b, gets a gradient."""
    delta = torch.zeros(4, 6)
    delta[:rows] = 1
    small = compress(delta, kind, rank=3 if kind == "lowrank" else None)
    trained = getattr(small, small.trained[0]).requires_grad_()
    (small.dense() * torch.randn(4, 6)).sum().backward()
    assert (trained.grad.norm(dim=0) if kind == "lowrank" else trained.grad).all()
    if kind != "bits":
        torch.testing.assert_close(small.dense(), delta)


IDS = [2, 0, -1, 2, 3, 0, 0]
MIXED = (*KINDS, "dense", "lowrank")
CASES = [
    *(((kind,) * 4, shape, mix) for kind in KINDS for shape, mix in (((33, 128), "all"), ((70, 67), "own"))),
    *(((kind,) * 8, (13, 70), "one") for kind in KINDS),
    *((MIXED, (19, 65), mix) for mix in ("one", "all", "own")),
    *((MIXED, (6, 4, 3, 3), mix) for mix in ("one", "own")),
]
"""Kinds of the deltas, their shape, and how tasks use them: one weight, each task all, each task its own."""


class Problem:
    """Tensors of a case; ``leaves`` are those that get a gradient."""

    def __init__(self, kinds, shape, mix, dtype):
        g = torch.Generator().manual_seed(3)

        def draw(*size, scale=1.0):
            return (torch.randn(size, generator=g, dtype=torch.float64) * scale).to(dtype).requires_grad_()

        self.conv = len(shape) == 4
        self.x = draw(2 * len(IDS), shape[1], *((6, 5) if self.conv else ()))
        self.base, self.bias, tile = draw(*shape, scale=0.2), draw(shape[0]), draw(*shape, scale=0.2).detach()
        self.deltas = [
            draw(*shape, scale=0.2) if kind == "dense" else make(kind, shape, dtype, n, tile, 3 if n < 4 else 2)
            for n, kind in enumerate(kinds)
        ]
        count, wide = len(kinds), torch.float64 if dtype == torch.float64 else torch.float32
        self.pairs = [(t, t) for t in range(min(4, count))] if mix == "own" else None
        coeffs = torch.randn((count,) if mix == "one" else (4, count), generator=g, dtype=torch.float64).to(wide)
        if self.pairs is not None:
            coeffs = coeffs * torch.eye(4, count, dtype=wide)
        self.coeffs = coeffs.requires_grad_()
        self.tasks = None if mix == "one" else torch.tensor(IDS)
        self.leaves = {"dx": self.x, "dbase": self.base, "dbias": self.bias, "dcoeffs": self.coeffs}
        for n, delta in enumerate(self.deltas):
            own = {"delta": delta} if isinstance(delta, torch.Tensor) else delta.tensors
            self.leaves |= {f"d{name}[{n}]": value for name, value in own.items() if value.requires_grad}

    def results(self, y):
        up = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(y.dtype)
        found = torch.autograd.grad(y, list(self.leaves.values()), up, allow_unused=True)
        grads = [torch.zeros_like(v) if g is None else g for g, v in zip(found, self.leaves.values(), strict=True)]
        named = {"y": y.detach(), **dict(zip(self.leaves, grads, strict=True))}
        if self.pairs is not None:  # what no pair names is not asked for
            rows, columns = zip(*self.pairs, strict=True)
            named["dcoeffs"] = named["dcoeffs"][list(rows), list(columns)]
        return named

    def ours(self, **how):
        operation = delta_conv2d if self.conv else delta_linear
        how = {} if self.conv else how
        return operation(
            self.x, self.base, self.deltas, self.coeffs, self.bias, tasks=self.tasks, pairs=self.pairs, **how
        )

    def plain(self, dtype):
        """One product for the base and one for each delta, weighed row by row, all in ``dtype``."""
        product = F.conv2d if self.conv else F.linear
        x, base, bias, coeffs = (t.to(dtype) for t in (self.x, self.base, self.bias, self.coeffs))
        y = product(x, base, bias)
        if self.tasks is None:
            rows = coeffs.expand(len(x), -1)
        else:
            rows = F.pad(coeffs, (0, 0, 0, 1))[self.tasks].repeat_interleave(2, 0)
        for k, delta in enumerate(self.deltas):
            if isinstance(delta, LowRank) and not self.conv:
                part = F.linear(F.linear(x, delta.a.to(dtype)), delta.b.to(dtype)) * delta.scale.to(dtype)
            else:
                part = product(x, delta.dense(dtype) if isinstance(delta, Format) else delta.to(dtype))
            y = y + part * rows[:, k].view(-1, *(1,) * (y.dim() - 1))
        return y

    def pooled(self, named):
        """The gradients <P, Δ> of coefficients and scales as one tensor, in units of |Δ|.

        Each is one number whose error says little about PyTorch's error; all of them together do.
        """
        dense = [d.dense(torch.float64) if isinstance(d, Format) else d.detach().double() for d in self.deltas]
        units = [float(d.detach().norm()) for d in dense]
        sums = [named.pop("dcoeffs").double() / max(units)]
        for n, delta in enumerate(self.deltas):
            if f"dscale[{n}]" in named:
                sums.append(named.pop(f"dscale[{n}]").double() * float(delta.scale.detach().abs().max()) / units[n])
        return torch.cat([s.flatten() for s in sums]).to(named["y"].dtype)


@pytest.mark.parametrize("algorithm", ["auto", "split", "blend"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kinds, shape, mix", CASES, ids=str)
def test_products_and_gradients(kinds, shape, mix, dtype, algorithm):
    """y and every gradient, those of what the formats train too, against plain PyTorch in float64."""
    if len(shape) == 4 and algorithm != "auto":
        return  # a convolution makes formats dense whatever is asked
    problem = Problem(kinds, shape, mix, dtype)
    out, low = problem.results(problem.ours(algorithm=algorithm)), problem.results(problem.plain(dtype))
    truth = problem.results(problem.plain(torch.float64))
    size = float(truth["dbase"].norm())
    out["<P, Δ>"], low["<P, Δ>"], truth["<P, Δ>"] = (problem.pooled(found) for found in (out, low, truth))
    for name, value in out.items():
        assert_no_worse_than_torch(
            value, truth[name].double(), low[name], scale=size if name == "<P, Δ>" else None, name=name
        )


class HostNumbers(TorchFunctionMode):
    """Lists what is made from Python's numbers: on a GPU each is a copy that stalls, and none can be captured."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        index = args[1] if function is torch.Tensor.__getitem__ else ()
        parts = index if isinstance(index, tuple) else (index,)
        if function in (torch.tensor, torch.as_tensor) or any(isinstance(part, (list, range)) for part in parts):
            self.found.append((function, args))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("algorithm", ["split", "blend"])
@pytest.mark.parametrize("kinds, mix", [(MIXED, "all"), (MIXED, "own"), (("lowrank",) * 4, "own")], ids=str)
def test_nothing_is_copied_from_the_host(kinds, mix, algorithm):
    problem = Problem(kinds, (19, 65), mix, torch.float32)
    problem.tasks = TaskBatch.from_ids(problem.tasks, 4)
    if mix == "own" and kinds == MIXED:
        problem.pairs = [(t, (t + 1) % 4) for t in range(1, 4)]
    with HostNumbers() as mode:
        y = problem.ours(algorithm=algorithm)
        y.sum().backward()
        index = problem.tasks.tensors
        codes = [delta.codes for delta in problem.deltas if isinstance(delta, SignBits)]
        if codes:
            _coded.coded_fwd(y.detach(), problem.x, codes, None, torch.ones(4, 19), [0, -1, 0, 0], *index, 2, "bits")
    assert not mode.found


def test_a_gradient_that_diverged_spoils_the_scale_of_its_own_task():
    problem = Problem(("bits",) * 4, (19, 65), "own", torch.float32)
    y = problem.ours(algorithm="split")
    dy = torch.ones_like(y)
    dy[-1] = torch.nan  # a row of task 0
    y.backward(dy)
    assert [bool(delta.scale.grad.isnan()) for delta in problem.deltas] == [True, False, False, False]


@pytest.mark.parametrize("algorithm", ["auto", "split", "blend"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kinds, shape, mix", [case for case in CASES if len(case[1]) == 2], ids=str)
def test_products_without_gradients(kinds, shape, mix, dtype, algorithm):
    """On a CPU one operator then takes base, dense deltas and codes."""
    problem = Problem(kinds, shape, mix, dtype)
    with torch.no_grad():
        y = problem.ours(algorithm=algorithm)
        assert_no_worse_than_torch(y, problem.plain(torch.float64), problem.plain(dtype), name="y")


def test_everything_beside_codes_without_gradients():
    """A bias by task, base coefficients and what follows the product, on more than one axis of rows."""
    tile = torch.randn(9, 70)
    deltas = [make(kind, (9, 70), seed=n, tile=tile).detach() for n, kind in enumerate(MIXED[:4])]
    how = {
        "tasks": torch.tensor([1, -1, 0]),
        "base_coeffs": torch.tensor([1.0, 0.0]),
        "scale": torch.rand(2, 9),
        "shift": torch.randn(9),
        "activation": "relu",
    }
    x, base, coeffs, bias = torch.randn(3, 5, 70), torch.randn(9, 70), torch.randn(2, 4), torch.randn(2, 9)
    with torch.inference_mode():
        y = delta_linear(x, base, deltas, coeffs, bias, **how)
        dense = [d.dense() for d in deltas]
        low = delta_linear(x, base, dense, coeffs, bias, backend="reference", **how)
        wide = {name: t.double() if name in ("base_coeffs", "scale", "shift") else t for name, t in how.items()}
        dense = [d.dense(torch.float64) for d in (d.to(dtype=torch.float64) for d in deltas)]
        given = (x.double(), base.double(), dense, coeffs.double(), bias.double())
        assert_no_worse_than_torch(y, delta_linear(*given, backend="reference", **wide), low, name="y")


@pytest.mark.parametrize("kind", ["bits", "int8", "lowrank"])
@pytest.mark.parametrize("num_deltas", [1, 2])
@pytest.mark.parametrize("grad", [False, True])
def test_no_samples(kind, num_deltas, grad):
    deltas = [compress(torch.randn(8, 36), kind, rank=2 if kind == "lowrank" else None) for _ in range(num_deltas)]
    x, base = torch.randn(0, 5, 36, requires_grad=grad), torch.randn(8, 36)
    y = delta_linear(x, base, deltas, torch.rand(2, num_deltas), tasks=[])
    assert y.shape == (0, 5, 8) and y.requires_grad == grad


@pytest.mark.parametrize("kind", ["bits", "int8", "lowrank"])
@pytest.mark.parametrize("shape", [(0, 6), (4, 0)])
@pytest.mark.parametrize("grad", [False, True])
def test_no_weights(kind, shape, grad):
    delta = compress(torch.zeros(shape), kind, rank=2 if kind == "lowrank" else None)
    assert torch.equal(delta.dense(), torch.zeros(shape)) and not delta.scale.isnan().any()
    x = torch.randn(3, shape[1], requires_grad=grad)
    y = delta_linear(x, torch.zeros(shape), [delta], torch.ones(2, 1), tasks=[0, 1, -1])
    assert torch.equal(y, torch.zeros(3, shape[0]))


def test_a_low_rank_delta_that_diverged_spoils_the_rows_of_its_own_task():
    x, base = torch.randn(3, 8), torch.randn(6, 8)
    bad = LowRank.of(torch.full((6, 2), torch.nan), torch.randn(2, 8))
    deltas, coeffs = [bad, make("lowrank", (6, 8), rank=3), make("lowrank", (6, 8), rank=2)], torch.eye(3)
    for some in (1, 3):
        y = delta_linear(x[:some], base, deltas[:some], coeffs[:some, :some], tasks=[-1, 1, 2][:some])
        assert y.isfinite().all()
    y = delta_linear(x, base, deltas, coeffs, tasks=[0, 1, -1])
    assert y.isnan().all(1).tolist() == [True, False, False]
    torch.testing.assert_close(y[1], (base + deltas[1].dense()) @ x[1])
    x.requires_grad_()
    delta_linear(x, base, deltas, coeffs, tasks=[0, 1, -1])[1:].sum().backward()
    assert x.grad[1:].isfinite().all()


def test_an_unknown_algorithm_is_refused_by_name():
    with pytest.raises(ValueError, match="algorithm must be auto, blend, split.* got 'fast'"):
        delta_linear(torch.randn(2, 5), torch.randn(6, 5), [make("bits", (6, 5))], torch.ones(1), algorithm="fast")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("form", ["linear", "conv2d"])
def test_a_scale_that_is_not_finite_stays_with_its_task(form, shared, value):
    """With one delta a task, or one more that two tasks share; other tasks' rows and gradients are as without it."""
    torch.manual_seed(0)
    shape, x = ((6, 4), torch.randn(5, 4)) if form == "linear" else ((6, 4, 1, 1), torch.randn(5, 4, 2, 2))
    run = delta_linear if form == "linear" else delta_conv2d
    base, ids = torch.randn(shape), torch.tensor([0, 1, -1, 0, 2])
    factors = [(torch.randn(6, 2), torch.randn(2, 4)) for _ in range(3)]
    pairs = [(0, 0), (1, 1), (2, 2)] + [(0, 1), (2, 1)] * shared

    def calls(last):
        deltas = [
            LowRank.of(b.clone(), a.clone(), s, shape) for (b, a), s in zip(factors, (2.0, 1.0, last), strict=True)
        ]
        held = [t.requires_grad_() for d in deltas for t in (d.b, d.a)]
        coeffs = torch.zeros(3, 3)
        for t, k in pairs:
            coeffs[t, k] = 0.5
        coeffs.requires_grad_()
        y = run(x, base, deltas, coeffs, tasks=ids, pairs=pairs, algorithm="split")
        y[:4].sin().sum().backward()
        return y.detach(), coeffs.grad, [t.grad for t in held]

    (y, dcoeffs, dheld), (want, dcoeffs_want, dheld_want) = calls(value), calls(1.0)
    assert not y[4].isfinite().all()
    torch.testing.assert_close(y[:4], want[:4])
    torch.testing.assert_close(dcoeffs[:2], dcoeffs_want[:2])
    for found, expected in zip(dheld[:4], dheld_want[:4], strict=True):
        torch.testing.assert_close(found, expected)
