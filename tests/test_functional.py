"""The public functions beyond their numbers: what they accept and trace, and how they sit in PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor

from taps_fast import TaskBatch, delta_conv2d, delta_linear, testing

IDS = (1, 3, -1, 1, 0)
LINEAR = [choice for choice in testing.available("linear")]
CONV2D = [choice for choice in testing.available("conv2d")]


def linear_inputs(dtype: torch.dtype = torch.float64, **changes: Any) -> testing.Inputs:
    kwargs: dict[str, Any] = dict(
        rows=10, shape=(4, 3), num_deltas=2, tasks=IDS, num_tasks=4, bias="base", zeros=(2, 3)
    )
    return testing.make_inputs(testing.Case(dtype, **(kwargs | changes)))


def conv_inputs(dtype: torch.dtype = torch.float64, **changes: Any) -> testing.Inputs:
    conv = dict(stride=2, padding=1)
    return linear_inputs(dtype, **(dict(rows=5, shape=(4, 2, 3, 3), conv=conv) | changes))


# --- gradients in float64 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs, choice", [(linear_inputs, c) for c in LINEAR] + [(conv_inputs, c) for c in CONV2D])
@pytest.mark.parametrize("mixed", [True, False])
def test_gradcheck(inputs: Any, choice: tuple[str, str], mixed: bool) -> None:
    n = inputs() if mixed else inputs(tasks=None, bias="shared", zeros=(1,))
    call = testing.ours(*choice)

    def f(x: Tensor, base: Tensor, coeffs: Tensor, bias: Tensor, *deltas: Tensor) -> Tensor:
        return call(testing.Inputs(n.case, x, base, list(deltas), coeffs, None, bias, n.dy))

    assert torch.autograd.gradcheck(f, (n.x, n.base, n.coeffs, n.bias, *n.deltas), fast_mode=True)


# --- operators ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixed", [True, False])
def test_opcheck_linear(mixed: bool) -> None:
    choices = {c.algorithm for c in LINEAR if c.backend != "reference"}
    assert choices, "no compiled kernels to check"
    n = linear_inputs(torch.float32) if mixed else linear_inputs(torch.float32, tasks=None, bias="shared", zeros=())
    n, index = detached(n), testing.task_batch(n.case).tensors if mixed else (None, None, None)
    weight = (n.base, n.deltas, n.coeffs, n.base_coeffs)
    ops = torch.ops.taps_fast
    for algorithm in sorted(choices):
        torch.library.opcheck(ops.linear_fwd, (n.x, *weight, n.bias, *index, 2, algorithm))
        torch.library.opcheck(ops.linear_dx, (n.dy, *weight, *index, 2, algorithm))
    for wanted in (([], [0, 1], True, True, True), ([1], [1], True, False, False), ([], [], False, False, True)):
        torch.library.opcheck(ops.linear_dw, (n.dy, n.x, *weight, *index, 2, *wanted))
        for need_dx in (False, True):
            torch.library.opcheck(ops.linear_grad, (n.dy, n.x, *weight, *index, 2, "blend", need_dx, *wanted))


@pytest.mark.parametrize("mixed", [True, False])
def test_opcheck_conv2d(mixed: bool) -> None:
    n = conv_inputs(torch.float32) if mixed else conv_inputs(torch.float32, tasks=None, bias="shared", zeros=())
    n, index = detached(n), testing.task_batch(n.case).tensors if mixed else (None, None, None)
    weight, conv = (n.base, n.deltas, n.coeffs, n.base_coeffs), ([2, 2], [1, 1], [1, 1], 1)
    ops = torch.ops.taps_fast
    for algorithm in ("merge", "split"):
        torch.library.opcheck(ops.conv2d_fwd, (n.x, *weight, n.bias, *conv, *index, 1, algorithm))
    torch.library.opcheck(ops.conv2d_merge.default, (n.x, *weight, n.bias, *conv, *index, 1))
    asked = (n.dy, n.x, *weight, *conv, *index, 1)
    for split, need_dx, *wanted in (
        (False, True, [], [0, 1], True, True),
        (True, True, [1], [1], True, False),
        (False, True, [], [], False, False),
        (False, False, [], [0], False, True),
    ):
        torch.library.opcheck(ops.conv2d_grad.default, (*asked, split, need_dx, *wanted))


def detached(n: testing.Inputs) -> testing.Inputs:
    bias = None if n.bias is None else n.bias.detach()
    deltas = [d.detach() for d in n.deltas]
    return testing.Inputs(n.case, n.x.detach(), n.base.detach(), deltas, n.coeffs.detach(), n.base_coeffs, bias, n.dy)


# --- inputs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3,), (5, 3), (2, 5, 3), (2, 0, 3), (2, 2, 5, 3)])
def test_linear_takes_what_f_linear_takes(shape: tuple[int, ...]) -> None:
    x, base, bias = torch.randn(shape), torch.randn(4, 3), torch.randn(4)
    y = delta_linear(x, base, [], torch.ones(0), bias)
    torch.testing.assert_close(y, F.linear(x, base, bias))


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        dict(stride=2, padding=(1, 0)),
        dict(padding="same"),
        dict(padding="valid"),
        dict(padding="same", dilation=2),
        dict(groups=2),
    ],
)
@pytest.mark.parametrize("batched", [True, False])
def test_conv2d_takes_what_f_conv2d_takes(kwargs: dict[str, Any], batched: bool) -> None:
    x, delta = torch.randn(*((2,) if batched else ()), 4, 6, 7), torch.randn(4, 4 // kwargs.get("groups", 1), 3, 2)
    base, bias = torch.randn_like(delta), torch.randn(4)
    y = delta_conv2d(x, base, [delta], torch.ones(1), bias, **kwargs)
    torch.testing.assert_close(y, F.conv2d(x, base + delta, bias, **kwargs))


@pytest.mark.parametrize("backend, algorithm", CONV2D)
@pytest.mark.parametrize("bias", [None, "shared", "task"])
def test_channels_last_is_kept(backend: str, algorithm: str, bias: str | None) -> None:
    x = torch.randn(4, 8, 6, 6).to(memory_format=torch.channels_last).requires_grad_()
    base, delta = (torch.randn(16, 8, 3, 3).to(memory_format=torch.channels_last) for _ in range(2))
    for tasks in (None, [0, -1, 0, -1]):
        coeffs = torch.ones(1) if tasks is None else torch.ones(1, 1)
        shape = (1, 16) if bias == "task" and tasks else (16,)
        b = None if bias is None else torch.randn(shape)
        y = delta_conv2d(x, base, [delta], coeffs, b, tasks=tasks, backend=backend, algorithm=algorithm)
        assert y.is_contiguous(memory_format=torch.channels_last)
        (dx,) = torch.autograd.grad(y.square().sum(), x)
        assert dx.is_contiguous(memory_format=torch.channels_last)


def test_deltas_in_one_tensor() -> None:
    n = linear_inputs()
    stacked = torch.stack([d.detach() for d in n.deltas]).requires_grad_()
    y = delta_linear(n.x, n.base, stacked, n.coeffs, n.bias, tasks=IDS)
    torch.testing.assert_close(y, testing.ours()(n))
    y.sum().backward()
    testing.ours()(n).sum().backward()
    torch.testing.assert_close(stacked.grad, torch.stack([d.grad for d in n.deltas]))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_ids_of_any_integer_type(dtype: torch.dtype) -> None:
    n = linear_inputs()
    ids = torch.tensor([1, 3, 0, 1, 0])
    expected = delta_linear(n.x, n.base, n.deltas, n.coeffs, n.bias, tasks=ids)
    torch.testing.assert_close(delta_linear(n.x, n.base, n.deltas, n.coeffs, n.bias, tasks=ids.to(dtype)), expected)
    torch.testing.assert_close(delta_linear(n.x, n.base, n.deltas, n.coeffs, n.bias, tasks=ids.tolist()), expected)
    batch = TaskBatch.from_ids(ids, 4)
    torch.testing.assert_close(delta_linear(n.x, n.base, n.deltas, n.coeffs, n.bias, tasks=batch), expected)


@pytest.mark.parametrize("choice", LINEAR)
def test_the_batch_may_lie_on_any_axis(choice: tuple[str, str]) -> None:
    n = linear_inputs(bias="base")
    x = torch.randn(5, 2, 3, 3, dtype=torch.float64)
    expected = delta_linear(x, n.base, n.deltas, n.coeffs, n.bias, tasks=IDS, backend="reference")
    for axis in (1, 2, -2, -3, -4):
        moved = x.movedim(0, axis)
        y = delta_linear(
            moved, n.base, n.deltas, n.coeffs, n.bias, tasks=IDS, batch_dim=axis, backend=choice[0], algorithm=choice[1]
        )
        torch.testing.assert_close(y.movedim(axis, 0), expected)


def test_pairs_limit_the_coefficient_gradient_to_what_is_wanted() -> None:
    n = linear_inputs(num_deltas=4)
    own = [(t, t) for t in range(4)]
    for choice in LINEAR:
        y = delta_linear(
            n.x,
            n.base,
            n.deltas,
            n.coeffs * torch.eye(4),
            n.bias,
            tasks=IDS,
            pairs=own,
            backend=choice[0],
            algorithm=choice[1],
        )
        full = delta_linear(n.x, n.base, n.deltas, n.coeffs * torch.eye(4), n.bias, tasks=IDS, backend="reference")
        torch.testing.assert_close(y, full)
        grads = [torch.autograd.grad(v.square().sum(), [n.coeffs, n.x, *n.deltas]) for v in (y, full)]
        torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("pairs", [[], [(0, 1), (2, 0)]])
@pytest.mark.parametrize("conv", [False, True])
def test_coefficients_of_other_pairs_get_zeros(conv: bool, pairs: list[tuple[int, int]]) -> None:
    n: Any = conv_inputs() if conv else linear_inputs()
    function: Any = delta_conv2d if conv else delta_linear
    wanted = torch.zeros_like(n.coeffs, dtype=torch.bool)
    for pair in pairs:
        wanted[pair] = True
    every = [n.coeffs, n.x, *n.deltas]
    for backend, algorithm in CONV2D if conv else LINEAR:
        how = {"tasks": IDS, "backend": backend, "algorithm": algorithm}
        full, some = (
            torch.autograd.grad(function(n.x, n.base, n.deltas, n.coeffs, n.bias, **how, **only).sum(), every)
            for only in ({}, {"pairs": pairs})
        )
        torch.testing.assert_close(some, (torch.where(wanted, full[0], 0.0), *full[1:]))


# --- PyTorch around it ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_f_linear(dtype: torch.dtype) -> None:
    x, base, delta, bias = torch.randn(6, 8), torch.randn(4, 8), torch.randn(4, 8), torch.randn(4)
    coeffs = torch.tensor([0.3], requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        y = delta_linear(x, base, [delta], coeffs, bias)
        z = delta_conv2d(torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3), [torch.randn(4, 3, 3, 3)], coeffs)
        assert y.dtype == F.linear(x, base).dtype == dtype
        assert z.dtype == dtype
    y.float().sum().backward()
    assert coeffs.grad is not None and coeffs.grad.dtype == torch.float32
    plain = delta_linear(x.to(dtype), base.to(dtype), [delta.to(dtype)], coeffs, bias.to(dtype))
    assert torch.equal(y, plain)


@pytest.mark.parametrize("inputs", [linear_inputs, conv_inputs])
def test_compiles_whole_and_never_again_for_another_mix(inputs: Any) -> None:
    n = inputs(torch.float32)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    op = delta_conv2d if n.case.is_conv else delta_linear

    def f(x: Tensor, ids: Tensor) -> Tensor:
        return op(x, n.base, n.deltas, n.coeffs, n.bias, **n.case.conv, tasks=ids)

    torch._dynamo.reset()
    compiled = torch.compile(f, backend=counter, fullgraph=True)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        ids = torch.randint(-1, 4, (5,), generator=generator)
        x = n.x.detach().requires_grad_()
        y, expected = compiled(x, ids), f(x, ids)
        torch.testing.assert_close(y, expected)
        got, want = (torch.autograd.grad(v.square().sum(), [x, n.base, n.coeffs, *n.deltas]) for v in (y, expected))
        torch.testing.assert_close(got, want)
    assert counter.frame_count == 1


def test_inductor_runs_it() -> None:
    n = linear_inputs(torch.float32)
    torch._dynamo.reset()
    f = lambda x, ids: delta_linear(x.relu(), n.base, n.deltas, n.coeffs, n.bias, tasks=ids).relu()  # noqa: E731
    ids = torch.tensor(IDS)
    torch.testing.assert_close(torch.compile(f, fullgraph=True)(n.x, ids), f(n.x, ids))


@pytest.mark.parametrize("inputs, choice", [(linear_inputs, c) for c in LINEAR] + [(conv_inputs, c) for c in CONV2D])
def test_second_derivatives_are_right_or_refused(inputs: Any, choice: tuple[str, str]) -> None:
    n = inputs()
    y = testing.ours(*choice)(n).square().sum()
    if choice[0] == "reference":
        (dx,) = torch.autograd.grad(y, n.x, create_graph=True)
        assert torch.autograd.grad(dx.sum(), n.base)[0].abs().sum() > 0
    else:
        text = r"second derivatives need backend='reference', or of a TapsModel the network that merge\(task\) gives"
        with pytest.raises(RuntimeError, match=text):
            torch.autograd.grad(y, n.x, create_graph=True)


# --- TaskBatch ------------------------------------------------------------------------------------------------------


def test_task_batch_groups_samples_and_keeps_their_order() -> None:
    batch = TaskBatch.from_ids([2, -1, 0, 2, -1, 2], 4)
    groups = [batch.order[a:b].tolist() for a, b in zip(batch.offsets, batch.offsets[1:], strict=False)]
    assert groups == [[1, 4], [2], [], [0, 3, 5], []]
    assert batch.size == 6


def test_an_empty_batch() -> None:
    batch = TaskBatch.from_ids([], 3)
    assert batch.offsets.tolist() == [0] * 5
    y = delta_linear(torch.randn(0, 3), torch.randn(4, 3), [], torch.ones(2, 0), tasks=TaskBatch.from_ids([], 2))
    assert y.shape == (0, 4)


@pytest.mark.parametrize("diverged", (torch.nan, torch.inf))
@pytest.mark.parametrize("conv", (False, True))
def test_a_gradient_that_diverged_spoils_the_bias_of_its_own_task(conv: bool, diverged: float) -> None:
    pixels = (3, 3) if conv else ()
    x, base = torch.randn(4, 8, *pixels), torch.randn(6, 8, *pixels)
    bias = torch.zeros(3, 6, requires_grad=True)
    y = (delta_conv2d if conv else delta_linear)(x, base, [], torch.ones(2, 0), bias, tasks=torch.tensor([0, 1, -1, 0]))
    dy = torch.ones_like(y)
    dy[1] = diverged
    y.backward(dy)
    assert bias.grad is not None
    assert bias.grad.isfinite().all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("tasks", (None, [0, 1]))
def test_an_axis_of_no_tokens(tasks: list[int] | None) -> None:
    coeffs = torch.ones(1) if tasks is None else torch.ones(2, 1)
    x = torch.randn(2, 0, 3, requires_grad=True)
    y = delta_linear(x, torch.randn(4, 3), [torch.randn(4, 3)], coeffs, tasks=tasks)
    y.sum().backward()
    assert y.shape == (2, 0, 4) and x.grad is not None
