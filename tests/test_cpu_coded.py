"""The CPU kernels for bits and int8, each instruction set's, against the same products in plain PyTorch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from taps_fast import _coded, delta_linear
from taps_fast.formats import Int8, SignBits, pack_bits
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


def check_linear(shape, dtype, inner, algorithm):
    """All formats and a dense delta in one call, against one product for each delta."""
    g = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randn(size, generator=g, dtype=torch.float64).to(dtype)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    base, tile, dense, bias = draw(*shape), draw(*shape), draw(*shape), draw(shape[0])
    bits = [pack_bits(torch.rand(shape, generator=g) < 0.5) for _ in range(2)]
    bytes_ = torch.randint(-127, 128, shape, generator=g, dtype=torch.int8)
    codes, tiles, tile_of = [bits[0], dense, bits[1], bytes_], [tile], [-1, -1, 0, -1]
    scales = [draw().to(wide), draw(0).to(wide), draw(shape[0]).to(wide), draw(shape[0]).to(wide) / 100]
    # Each task with another set of deltas: of one kind alone, of several, of none.
    coeffs = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0.5, 0], [0, 0, 0, 2], [0, 0, 0, 0]]).to(wide)
    index = TaskBatch.from_ids(torch.tensor(IDS), 5).tensors
    x = draw(inner * len(IDS), shape[1])
    found = OPS.linear_coded(x, base, codes, coeffs, None, bias, *index, inner, algorithm, scales, tiles, tile_of)
    again = OPS.linear_coded(x, base, codes, coeffs, None, bias, *index, inner, algorithm, scales, tiles, tile_of)
    assert torch.equal(found, again), "differs from run to run"

    def plain(dtype, sizes=False):
        """The product, or the size of what is summed for it."""
        rows = torch.nn.functional.pad(coeffs, (0, 0, 0, 1))[torch.tensor(IDS)].repeat_interleave(inner, 0).to(dtype)
        of_x = x.to(dtype).abs() if sizes else x.to(dtype)
        y = of_x @ base.to(dtype).T + bias.to(dtype)
        for k, (format, of) in enumerate((("bits", None), (None, None), ("mask", tile), ("int8", None))):
            weight = dense if format is None else _coded.decoded(codes[k], of, format, shape[1])
            scale = 1 if format is None else scales[k].to(dtype)
            part = (rows[:, k : k + 1] * scale, weight.to(dtype))
            factor, weight = (t.abs() for t in part) if sizes else part
            y = y + factor * (of_x @ weight.T)
        return y

    size = float(plain(torch.float64, sizes=True).max())
    assert_no_worse_than_torch(found, plain(torch.float64), plain(dtype), scale=size, name=f"y, {algorithm}")


def check_masks(shape, dtype, inner):
    """Masks of one tile: alone, two of them, beside a dense delta, and without the base."""
    g = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randn(size, generator=g, dtype=torch.float64).to(dtype)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    base, tile, dense = draw(*shape), draw(*shape), draw(*shape)
    bits = [torch.rand(shape, generator=g) < 0.5 for _ in range(2)]
    codes, tile_of = [pack_bits(bits[0]), dense, pack_bits(bits[1])], [0, -1, 0]
    scales = [draw(shape[0]).to(wide), draw(0).to(wide), draw().to(wide)]
    coeffs = torch.tensor([[1, 0, 0], [0.5, 0, 2], [1, 1, 0], [0, 0, 1], [1, 0, 1]]).to(wide)
    base_coeffs = torch.tensor([1, 1, 1, 0, 0]).to(wide)
    index = TaskBatch.from_ids(torch.tensor(IDS), 5).tensors
    x = draw(inner * len(IDS), shape[1])
    rest = (*index, inner, "auto", scales, [tile], tile_of)
    found = OPS.linear_coded(x, base, codes, coeffs, base_coeffs, None, *rest)
    assert torch.equal(found, OPS.linear_coded(x, base, codes, coeffs, base_coeffs, None, *rest))

    def plain(dtype, sizes=False):
        each = torch.nn.functional.pad(torch.cat([base_coeffs[:, None], coeffs], 1), (0, 0, 0, 1))
        each[-1, 0] = 1
        each = each[torch.tensor(IDS)].repeat_interleave(inner, 0).to(dtype)
        weights = [base, scales[0][:, None] * (tile * bits[0]), dense, scales[2] * (tile * bits[1])]
        parts = [(each[:, k, None], x.to(dtype), w.to(dtype)) for k, w in enumerate(weights)]
        return sum(c * (a @ w.T) for c, a, w in (map(absolute, parts) if sizes else parts))

    def absolute(part):
        return tuple(t.abs() for t in part)

    size = float(plain(torch.float64, sizes=True).max())
    assert_no_worse_than_torch(found, plain(torch.float64), plain(dtype), scale=size, name="y")


# Rows of each task, with the tile that its mask is of (2: none but a dense delta) and what multiplies it.
MASKED = (
    (1, 0, 1.0), (3, 0, 1.0), (0, 0, 1.0), (40, 0, 1.0), (7, 0, 0.25), (1, 0, -2.0), (2, 1, 1.0), (130, 0, 1.0),
    (6, 1, 1.0), (5, 2, 1.0), (1, 1, 1.0), (4, 0, 0.0), (13, 1, 0.25), (140, 1, 1.0), (9, 0, 1.0), (3, 3, 0.0),
    (8, 3, 1.0),
)  # fmt: skip


def check_shared_tiles(shape, dtype):
    """Many tasks whose masks are of two tiles, in groups of all sizes, beside others and rows of the base."""
    g = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randn(size, generator=g, dtype=torch.float64).to(dtype)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    base, dense, tasks = draw(*shape), draw(*shape), len(MASKED)
    tiles = [draw(*shape) for _ in range(4)]
    bits = [torch.rand(shape, generator=g) < 0.5 for _ in MASKED]
    ids = [t for t, (rows, *_) in enumerate(MASKED) for _ in range(rows)] + [-1] * 5
    ids = torch.tensor(ids)[torch.randperm(len(ids), generator=g)]
    codes = [dense if tile == 2 else pack_bits(b) for b, (_, tile, _) in zip(bits, MASKED, strict=True)]
    tile_of = [-1 if tile == 2 else tile for _, tile, _ in MASKED]
    scales = [torch.tensor(scale).to(wide) for _, _, scale in MASKED]
    scales[8] = draw(shape[0]).to(wide)
    coeffs = torch.eye(tasks).to(wide)
    coeffs[3, 3] = 0.5
    index = TaskBatch.from_ids(ids, tasks).tensors
    x, bias = draw(len(ids), shape[1]), draw(tasks + 1, shape[0])
    rest = (base, codes, coeffs, None, bias, *index, 1, "auto", scales, tiles, tile_of)
    found = OPS.linear_coded(x, *rest)
    assert torch.equal(found, OPS.linear_coded(x, *rest)), "differs from run to run"

    def plain(dtype, sizes=False):
        y = torch.empty(len(ids), shape[0], dtype=dtype)
        for t in range(-1, tasks):
            delta = torch.zeros(shape, dtype=dtype)
            if t >= 0:
                weight = dense if tile_of[t] < 0 else tiles[tile_of[t]] * bits[t]
                scale = torch.ones(()) if tile_of[t] < 0 else scales[t]
                delta = coeffs[t, t].to(dtype) * scale.to(dtype).view(-1, 1) * weight.to(dtype)
            of = [x[ids == t].to(dtype), base.to(dtype), delta, bias[t].to(dtype)]
            rows, weight, delta, b = [p.abs() for p in of] if sizes else of
            y[ids == t] = rows @ (weight + delta).T + b
        return y

    size = float(plain(torch.float64, sizes=True).max())
    assert_no_worse_than_torch(found, plain(torch.float64), plain(dtype), scale=size, name="y")


def check_shared_tiles_all(dtypes=DTYPES, shapes=((70, 130), (9, 5), (33, 257), (150, 1100), (64, 64), (1, 1))):
    for dtype in dtypes:
        for shape in shapes:
            check_shared_tiles(shape, dtype)


def check_linear_all(dtypes=DTYPES, shapes=((70, 130), (9, 5), (33, 257), (40, 1100)), inners=(1, 4, 9)):
    """Groups of 1 to 27 rows: on both sides of where codes are decoded into a panel."""
    for dtype in dtypes:
        for shape in shapes:
            for inner in inners:
                check_masks(shape, dtype, inner)
                for algorithm in ("auto", "split", "blend"):
                    check_linear(shape, dtype, inner, algorithm)


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_among_the_deltas(dtype):
    check_linear_all((dtype,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks_of_shared_tiles(dtype):
    check_shared_tiles_all((dtype,))


@pytest.mark.parametrize(("isa", "flag"), [("generic", ""), ("avx2", "avx2"), ("avx512", "avx512dq")])
def test_other_instruction_sets(isa, flag):
    """In a process of its own, since the choice is made once."""
    if flag not in Path("/proc/cpuinfo").read_text():
        pytest.skip(f"this CPU has no {isa}")
    code = f"import torch, test_cpu_coded as t\nassert t.OPS.cpu_isa() == {isa!r}\nt.check_all(inners=(3,))"
    code += "\nt.check_linear_all(inners=(4,))\nt.check_shared_tiles_all()"
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


@pytest.mark.parametrize("algorithm", ["auto", "blend", "split"])
def test_no_inputs_leave_the_bias(algorithm):
    """Sums over no inputs are 0, whatever a delta is: bits, int8, a mask, numbers."""
    x, base, bits, bias = torch.randn(8, 0), torch.randn(9, 0), pack_bits(torch.ones(9, 0) > 0), torch.randn(9)
    deltas, coeffs = [bits, base.to(torch.int8), bits, base], torch.eye(5, 4)
    index = (*TaskBatch.from_ids(torch.tensor(IDS), 5).tensors, 1)
    rest = (algorithm, [torch.ones(())] * 4, [base], [-1, -1, 0, -1])
    found = OPS.linear_coded(x, base, deltas, coeffs, None, bias, *index, *rest)
    assert torch.equal(found, bias.expand(8, 9))


@pytest.mark.parametrize("format", FORMATS)
def test_operators_are_well_formed(format):
    x, y, dy, rest = arguments(format, (9, 70), torch.float32, True, 1)
    torch.library.opcheck(OPS.coded_fwd.default, (y, x, *rest))
    torch.library.opcheck(OPS.coded_dx.default, (dy, *rest, 70))


def linear_arguments():
    """Of linear_coded: one delta of bits."""
    codes = pack_bits(torch.rand(9, 70) < 0.5)
    rest = (None, None, None, None, None, 1, "auto", [torch.ones(())], [], [-1])
    return [torch.randn(4, 70), torch.randn(9, 70), [codes], torch.ones(1), *rest]


@pytest.mark.parametrize(
    ("place", "value", "text"),
    [
        (
            2,
            [torch.zeros(9, 8, dtype=torch.uint8)],
            r"linear_coded: codes must have shape \[9, 16\], or one more axis in front, got \[9, 8\]",
        ),
        (
            2,
            [torch.zeros(1, 9, 8, dtype=torch.uint8)],
            r"codes must have shape \[9, 16\], or one more axis in front, got",
        ),
        (2, [torch.zeros(2, 9, 16, dtype=torch.uint8)], r"scales must be one number or 9 a delta, got \[\]"),
        (11, [torch.ones(9, 1)], r"linear_coded: scales must be one number or 9 a delta, got \[9, 1\]"),
        (11, [], "linear_coded: scales and tile_of must have an entry for each of 1 deltas, got 0 and 1"),
        (11, [torch.ones(4)], r"linear_coded: scales must have 9 elements, got \[4\]"),
        (13, [0], "linear_coded: tile_of must be below 0 and name a tile for bits alone, got 0"),
        (10, "merge", "linear_coded: algorithm must be auto, blend or split on CPU, got 'merge'"),
    ],
)
def test_linear_coded_checks_what_it_is_given(place, value, text):
    arguments = linear_arguments()
    torch.library.opcheck(OPS.linear_coded.default, arguments)
    arguments[place] = value
    with pytest.raises(RuntimeError, match=text):
        OPS.linear_coded(*arguments)


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [SignBits, Int8])
def test_many_codes_are_rounded_once(kind, dtype):
    """Not once a delta, in the result's 16 bits."""
    torch.manual_seed(0)
    x, base = torch.randn(4, 512).to(dtype), torch.randn(256, 512).to(dtype)
    deltas = [kind.from_dense(0.5 * torch.randn(256, 512).to(dtype)) for _ in range(8)]
    coeffs = torch.rand(8)
    dense = [delta.dense(torch.float64) for delta in deltas]
    truth = x.double() @ (base.double() + sum(c * d for c, d in zip(coeffs.double(), dense, strict=True))).t()
    merged = base.float() + sum(c * d.float() for c, d in zip(coeffs, dense, strict=True))
    plain = torch.nn.functional.linear(x, merged.to(dtype))
    with torch.no_grad():
        ours = delta_linear(x, base, deltas, coeffs, algorithm="split")
    assert_no_worse_than_torch(ours, truth, plain)
