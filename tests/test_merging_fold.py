"""`fold` against the formula in float64 and against PyTorch's own error, by the rule of `taps_fast.testing`."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from folds import SHAPES, double, draw, plain, run

from taps_fast import _ext, _fold
from taps_fast.merging import fold
from taps_fast.testing import assert_no_worse_than_torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OPS = torch.ops.taps_fast


def ours(bases, deltas, coeffs, parts, masks):
    table = coeffs if parts else coeffs[:, 0]
    return fold(bases, deltas, table, parts=parts or None, masks=masks or None)


CASES = [(dtype, k, 1, None) for dtype in DTYPES for k in (0, 1, 2, 5, 9)]
CASES += [(dtype, 3, p, mask) for dtype in DTYPES for p, mask in ((7, None), (1, "bool"), (1, "soft"), (5, "soft"))]


@pytest.mark.parametrize(("dtype", "num_deltas", "num_parts", "mask"), CASES, ids=str)
def test_fold_is_no_worse_than_torch(dtype, num_deltas, num_parts, mask):
    inputs = draw(dtype, num_deltas, num_parts, mask)
    before = torch.cat([t.flatten().float() for each in inputs[1] for t in each]) if num_deltas else None
    out, again = run(ours, *inputs), run(ours, *inputs)
    low, ref = run(plain, *inputs), run(plain, *double(inputs))
    for l in range(len(SHAPES)):
        assert torch.equal(out[0][l], again[0][l])
        assert_no_worse_than_torch(out[0][l], ref[0][l], low[0][l], name=f"weight {l}")
    assert torch.equal(out[1], again[1]), "dcoeffs differ from run to run"
    scale = max((float(d.double().norm() * g.double().norm()) for d, g in
                 zip((d for each in inputs[1] for d in each[:1]), inputs[5], strict=False)), default=0.0)  # fmt: skip
    assert_no_worse_than_torch(out[1], ref[1], low[1], scale=scale, name="dcoeffs")
    for a, b, c in zip(out[2], ref[2], low[2], strict=True):
        assert_no_worse_than_torch(a, b, c, scale=float(b.abs().max()) if b.numel() else 0, name="dbase, dmask")
    if before is not None:
        assert torch.equal(before, torch.cat([t.flatten().float() for each in inputs[1] for t in each]))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_large_tensors_are_the_sum_of_their_pieces(threads):
    """Several items a tensor, and the same bits with any number of threads."""
    inputs = draw(torch.float32, 9, shapes=((300, 257), (1,), (70001,)))
    previous = torch.get_num_threads()
    try:
        one = run(ours, *inputs)
        torch.set_num_threads(threads)
        many = run(ours, *inputs)
    finally:
        torch.set_num_threads(previous)
    assert all(torch.equal(a, b) for a, b in zip([*one[0], one[1]], [*many[0], many[1]], strict=True))
    assert_no_worse_than_torch(many[1], run(plain, *double(inputs))[1], run(plain, *inputs)[1])


@pytest.mark.parametrize(("num_parts", "mask"), [(1, None), (6, None), (1, "bool"), (4, "soft")])
def test_plain_torch_and_the_kernel_agree(num_parts, mask):
    """`_fold` serves the devices without a kernel; on CPU the compiled kernel runs."""
    assert _ext.CPU_ERROR is None
    bases, deltas, coeffs, parts, masks, dweights = draw(torch.float64, 4, num_parts, mask)
    flat = [d for each in deltas for d in each]
    torch.testing.assert_close(
        OPS.fold(bases, flat, coeffs, parts, masks), _fold.fold(bases, flat, coeffs, parts, masks)
    )
    soft = mask == "soft"
    ours = OPS.fold_grad(dweights, flat, coeffs, parts, masks, True, soft)
    torch.testing.assert_close(ours, _fold.fold_grad(dweights, flat, coeffs, parts, masks, True, soft))
    assert OPS.fold_grad(dweights, flat, coeffs, parts, masks, False, False)[0].numel() == 0


@pytest.mark.parametrize("num_parts", [1, 3])
@pytest.mark.parametrize("module", [OPS, _fold], ids=("kernel", "plain"))
def test_a_delta_of_coefficient_0_adds_nothing(module, num_parts):
    """Not even where it holds infinity or NaN."""
    bases, deltas, coeffs, parts, _, dweights = draw(torch.float32, 2, num_parts)
    for each in deltas:
        each[1].fill_(torch.nan)
    coeffs[:, :, 1] = 0
    flat, masks = [d for each in deltas for d in each], [torch.ones_like(base) for base in bases]
    _, dmasks = module.fold_grad(dweights, flat, coeffs, parts, masks, False, True)
    assert all(t.isfinite().all() for t in (*module.fold(bases, flat, coeffs, parts, []), *dmasks))


@pytest.mark.parametrize("function", [OPS.fold_grad, _fold.fold_grad])
def test_gradients_of_no_deltas(function):
    dcoeffs, dmasks = function([torch.ones(3)], [], torch.ones(1, 1, 0), [], [torch.ones(3)], False, True)
    assert dcoeffs.shape == (0,) and torch.equal(dmasks[0], torch.zeros(3))


@pytest.mark.parametrize("isa", ["generic", "avx2"])
def test_instruction_sets(isa):
    """Other kernels than this machine's best, in a process of their own."""
    flags = open("/proc/cpuinfo").read() if sys.platform == "linux" else ""
    if isa == "avx2" and "avx2" not in flags:
        pytest.skip("no AVX2")
    code = f"""
import sys; sys.path.insert(0, {str(__file__.rsplit("/", 1)[0])!r})
import torch, test_merging_fold as t
assert torch.ops.taps_fast.cpu_isa() == {isa!r}
for dtype in t.DTYPES:
    for case in ((9, 1, None), (3, 7, "soft"), (2, 1, "bool")):
        t.test_fold_is_no_worse_than_torch(dtype, *case)
"""
    import os

    env = {**os.environ, "TAPS_FAST_CPU_ISA": isa}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_zero_coefficients_have_gradients_and_do_not_read():
    """A delta behind a coefficient of 0 is not read in the forward, and still gets its coefficient's gradient."""
    bases, deltas, coeffs, *_, dweights = draw(torch.float32, 3)
    coeffs[:, :, 1] = 0.0
    clean = run(ours, bases, deltas, coeffs, [], [], dweights)
    assert float(clean[1][0, 0, 1]) != 0.0
    poisoned = [[each[0], torch.full_like(each[1], torch.nan), each[2]] for each in deltas]
    assert all(torch.equal(a, b) for a, b in zip(ours(bases, poisoned, coeffs, [], []), clean[0], strict=True))


def test_untouched_weights_get_no_gradient():
    bases, deltas, coeffs, *_ = draw(torch.float32, 2)
    table = coeffs[:, 0].clone().requires_grad_()
    fold(bases, deltas, table)[4].sum().backward()
    assert table.grad[4].all() and not table.grad[[0, 1, 2, 3, 5]].any()


def test_coefficients_of_all_tensors_at_once():
    bases, deltas, *_ = draw(torch.float32, 2)
    c = torch.tensor([0.5, -1.0], requires_grad=True)
    out = fold(bases, deltas, c)
    torch.testing.assert_close(out[0], bases[0] + 0.5 * deltas[0][0] - deltas[0][1])
    sum(t.sum() for t in out).backward()
    torch.testing.assert_close(c.grad, torch.stack([sum(each[k].sum() for each in deltas) for k in (0, 1)]))
    assert fold([], [], torch.zeros(0, 2)) == []


def test_strided_inputs_and_tracing():
    bases, deltas, coeffs, *_ = draw(torch.float32, 2, shapes=((8, 6), (6, 8)))
    strided = [b.t().contiguous().t() for b in bases]
    assert not strided[0].is_contiguous()
    wanted = fold(bases, deltas, coeffs[:, 0])
    assert all(torch.equal(a, b) for a, b in zip(fold(strided, deltas, coeffs[:, 0]), wanted, strict=True))
    flat = [d for each in deltas for d in each]
    torch.library.opcheck(OPS.fold.default, (bases, flat, coeffs, [], []))
    torch.library.opcheck(OPS.fold_grad.default, (bases, flat, coeffs, [], bases, True, True))


def test_second_derivatives_are_refused():
    bases, deltas, coeffs, *_ = draw(torch.float32, 2)
    c = coeffs[:, 0].clone().requires_grad_()
    out = fold(bases, deltas, c)[0].square().sum()
    with pytest.raises(RuntimeError, match="fold: create_graph must be False, got True; the kernels have no second"):
        torch.autograd.grad(out, c, create_graph=True)


ONE = torch.ones(2)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (([ONE], [[ONE]], torch.ones(2)), ValueError, r"fold: coeffs must be \[1\] or \[1, 1\], got \(2,\)"),
        (([ONE], [[ONE]], torch.ones(1), [ONE]), ValueError, r"fold: coeffs must be \[1, P, 1\], got \(1,\)"),
        (([ONE], [], torch.ones(1)), ValueError, "fold: deltas must be one for each of 1 bases, got 0"),
        (([ONE, ONE], [[ONE], []], torch.ones(1)), ValueError,
         r"fold: deltas\[1\] must be 1 tensors as deltas\[0\] is, got 0"),
        (([ONE], [[torch.ones(3)]], torch.ones(1)), ValueError,
         r"fold: deltas\[0\] must be \(2,\) as its base is, got \(3,\)"),
        (([ONE], [[ONE.double()]], torch.ones(1)), TypeError,
         r"fold: deltas\[0\] must be torch.float32, got torch.float64 \(bases\[0\] torch.float32\)"),
        (([ONE.long()], [[ONE.long()]], torch.ones(1)), TypeError,
         "fold: bases must be one of torch.float32, torch.bfloat16, torch.float16, torch.float64, got torch.int64"),
        (([ONE], [[ONE.to("meta")]], torch.ones(1)), ValueError,
         r"fold: deltas\[0\] must be on cpu as bases\[0\] is, got meta"),
        (([ONE, ONE.to("meta")], [[ONE], [ONE]], torch.ones(1)), ValueError,
         r"fold: bases\[1\] must be on cpu as bases\[0\] is, got meta"),
        (([ONE], [[ONE.clone().requires_grad_()]], torch.ones(1)), ValueError,
         r"fold: deltas\[0\] must be frozen, got tensors that require a gradient"),
        (([ONE], [[ONE]], torch.ones(1, 2, 1), [torch.tensor([0, 2], dtype=torch.uint8)]), ValueError,
         r"fold: parts\[0\] must be below 2, got 2"),
        (([ONE], [[ONE]], torch.ones(1, 257, 1), [torch.zeros(2, dtype=torch.uint8)]), ValueError,
         "fold: coeffs must have at most 256 parts, got 257"),
        (([ONE], [[ONE]], torch.ones(1), None, [ONE.half()]), TypeError,
         r"fold: masks must be torch.bool or torch.float32 \(bases\), got torch.float16"),
    ],
)  # fmt: skip
def test_errors(arguments, error, text):
    bases, deltas, coeffs, *rest = arguments
    parts, masks = (*rest, None, None)[:2]
    with pytest.raises(error, match=text):
        fold(bases, deltas, coeffs, parts=parts, masks=masks)
