"""Convolutions beyond their formula: the routes by which they run, what a call may keep, and their errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from taps_fast import BackendError, _images, _pointwise, delta_conv2d, testing
from taps_fast._call import is_plain_conv2d
from taps_fast._dispatch import PATCH_ROWS, ROWS_WEIGHTS, explain, select
from taps_fast._problem import Problem

FLOATS = (torch.float32, torch.bfloat16, torch.float64)
ROWS = [
    case
    for shape, conv in (
        ((6, 4, 1, 1), {}),
        ((35, 19, 1, 1), dict(stride=(2, 3))),
        ((6, 4, 3, 3), dict(padding=1)),
        ((35, 5, 2, 3), dict(stride=(2, 1), padding=(0, 2))),
    )
    for case in testing.channels_last_cases(shape, conv, FLOATS)
]


def channels_last(*shape: int) -> torch.Tensor:
    return torch.randn(shape).to(memory_format=torch.channels_last)


# --- pixels and patches as rows of delta_linear ----------------------------------------------------------------------


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_pixels_as_rows(case: testing.Case) -> None:
    testing.assert_close_to_oracle(case, "linear")


def test_rows_keep_the_layout_and_carry_the_epilogue() -> None:
    x, base, delta = channels_last(6, 5, 4, 3), torch.randn(7, 5, 1, 1), torch.randn(7, 5, 1, 1)
    bias, scale, shift = torch.randn(3, 7), torch.randn(2, 7), torch.randn(7)
    options: dict[str, Any] = dict(tasks=[1, 0, 0, -1, 1, 0], scale=scale, shift=shift, activation="silu")
    coeffs = torch.tensor([[1.0], [0.0]])
    y, want = (delta_conv2d(x, base, [delta], coeffs, bias, backend=b, **options) for b in ("linear", "aten"))
    assert y.is_contiguous(memory_format=torch.channels_last) and y.shape == (6, 7, 4, 3)
    torch.testing.assert_close(y, want)


@pytest.mark.parametrize(
    ("x", "shape", "options"),
    [
        (torch.randn(2, 4, 5, 5), (3, 4, 1, 1), {}),
        (channels_last(2, 4, 5, 5), (3, 4, 3, 3), {}),
        (channels_last(2, 4, 9, 9), (3, 4, 3, 3), dict(dilation=2)),
        (channels_last(2, 4, 5, 5), (4, 2, 1, 1), dict(groups=2)),
        (channels_last(2, 4, 5, 5), (3, 4, 1, 1), dict(padding=1)),
    ],
    ids=["contiguous", "contiguous weights", "dilation", "groups", "padding"],
)
def test_rows_are_refused_where_pixels_are_none(x: torch.Tensor, shape: tuple[int, ...], options: Any) -> None:
    with pytest.raises(BackendError, match="needs a convolution whose pixels or patches are rows"):
        delta_conv2d(x, torch.randn(shape), [], torch.ones(0), backend="linear", **options)


@pytest.mark.parametrize("tasks", [None, 4])
def test_rows_are_chosen_by_the_number_of_weights(tasks: int | None) -> None:
    least = ROWS_WEIGHTS[0 if tasks else 1]
    for out, backend in ((least // 64 - 1, "aten"), (least // 64, "linear")):
        problem = Problem("conv2d", "cpu", torch.float32, (out, 64, 1, 1), 8, 1, tasks, False, row_taps=1)
        assert select(problem).backend == backend and f"->  {backend}" in explain(problem)


@pytest.mark.parametrize(
    ("changes", "backend"),
    [
        ({}, "linear"),
        (dict(rows=PATCH_ROWS * 3 // 49 + 1), "aten"),
        (dict(shape=(56, 512, 3, 3)), "aten"),
        (dict(num_tasks=None), "aten"),
        (dict(num_deltas=0), "aten"),
        (dict(grad=True), "aten"),
        (dict(rows=400, num_deltas=300), "aten"),
        (dict(num_tasks=1, num_deltas=1, rows=5), "linear"),
        (dict(num_tasks=1, num_deltas=1, rows=6), "aten"),
    ],
    ids=["few", "many rows", "few weights", "one weight", "closed", "training", "large copy", "one task", "more of it"],
)
def test_patches_are_rows_where_a_weight_has_few_pixels(changes: dict[str, Any], backend: str) -> None:
    problem = Problem("conv2d", "cpu", torch.float32, (512, 512, 3, 3), 8, 2, 4, False, row_taps=9, pixels=49)
    problem = problem._replace(channels_last=True, **changes)
    assert select(problem).backend == backend and f"->  {backend}" in explain(problem)


@pytest.mark.parametrize("shape", [(64, 64, 1, 1), (512, 1024, 1, 1), (512, 512, 3, 3), (512, 1023, 1, 1)])
def test_layers_know_when_a_base_alone_is_the_vendors(shape: tuple[int, ...]) -> None:
    """Whatever the images: a layer that is sure asks no more."""
    problem = Problem("conv2d", "cpu", torch.float32, shape, 8, 0, None, False)
    chosen = {
        select(problem._replace(row_taps=taps, pixels=pixels, channels_last=taps > 0, rows=rows)).backend
        for taps in (0, math.prod(shape[2:]))
        for pixels, rows in ((1, 1), (3136, 8))
    }
    assert is_plain_conv2d(torch.empty(8, shape[1], 7, 7), torch.empty(shape), 1) == (chosen == {"aten"})


# --- depthwise --------------------------------------------------------------------------------------------------------

DEPTHWISE = [
    case
    for shape, conv in (
        ((6, 1, 3, 3), dict(groups=6, padding=1)),
        ((35, 1, 5, 5), dict(groups=35, padding=2, stride=2)),
        ((67, 1, 3, 2), dict(groups=67, padding=(3, 4), dilation=(2, 3), stride=(1, 2))),
        ((16, 1, 9, 8), dict(groups=16)),
    )
    for case in testing.channels_last_cases(shape, conv, FLOATS)
]


@pytest.mark.parametrize("case", DEPTHWISE, ids=str)
def test_depthwise(case: testing.Case) -> None:
    testing.assert_close_to_oracle(case, "cpu")


def test_depthwise_is_chosen_where_weights_differ() -> None:
    for tasks, deltas, backend in ((4, 1, "cpu"), (None, 1, "aten"), (4, 0, "aten")):
        problem = Problem("conv2d", "cpu", torch.float32, (8, 1, 3, 3), 8, deltas, tasks, False, 8, depthwise=True)
        assert select(problem).backend == backend


def test_depthwise_operator() -> None:
    x, weight, table = torch.randn(3, 6, 5, 7), torch.randn(2, 6, 7), torch.tensor([1, 0, 1])
    sizes = ([3, 2], [1, 2], [2, 1], [1, 1])
    torch.library.opcheck(torch.ops.taps_fast.depthwise, (x, weight, table, *sizes))
    torch.testing.assert_close(
        torch.ops.taps_fast.depthwise(x, weight, table, *sizes), _pointwise.depthwise(x, weight, table, *sizes)
    )
    with pytest.raises(RuntimeError, match=r"depthwise: table must be in \[0, 2\), got 2"):
        torch.ops.taps_fast.depthwise(x, weight, table + 1, *sizes)


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        (([3, 2], [1], [2, 1], [1, 1]), "kernel, stride, padding and dilation must be 2 integers each, got 1"),
        (([3, 2], [1, 0], [2, 1], [1, 1]), "must be at least 1 and padding at least 0, got 2, 0, 1 and 1"),
        (([3, 2], [9, 9], [0, 0], [3, 1]), "at least as large as the kernel, got 0 .x 6, kernel 3, dilation 3."),
    ],
)
def test_depthwise_operator_checks_its_sizes(sizes: tuple[list[int], ...], text: str) -> None:
    x, weight, table = torch.randn(3, 6, 5, 7), torch.randn(2, 6, 7), torch.tensor([1, 0, 1])
    with pytest.raises(RuntimeError, match=f"depthwise: .*{text}"):
        torch.ops.taps_fast.depthwise(x, weight, table, *sizes)


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(padding=-1), "padding must be one or two integers >= 0, got -1"),
        (dict(stride=0), "stride must be one or two integers >= 1, got 0"),
        (dict(dilation=(1, 2, 3)), r"dilation must be one or two integers >= 1, got \(1, 2, 3\)"),
        (dict(groups=3), "groups must split x's 4 channels into base's 4"),
        (dict(dilation=3), r"padding must make x at least as large as the kernel, got 0 .*dilation 3"),
        (dict(padding="same", stride=2), "padding 'same' must go with stride 1"),
        (dict(tasks=[0, 1, 0]), r"tasks must divide the batch: rows % ids == 0, got 3 ids \(x .* has 4 rows"),
        (dict(tasks=[0, 1, 2, 0]), r"tasks must be ids in \[-1, 2\)"),
    ],
)
def test_errors_name_the_argument(options: dict[str, Any], text: str) -> None:
    coeffs = torch.ones(2, 0) if "tasks" in options else torch.ones(0)
    with pytest.raises(ValueError, match=text):
        delta_conv2d(torch.randn(4, 4, 5, 5), torch.randn(6, 4, 3, 3), [], coeffs, **options)


@pytest.mark.parametrize("where", ("on a CPU", "as on a GPU"))
def test_a_delta_that_diverged_spoils_the_images_of_its_own_task(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if where == "as on a GPU":
        monkeypatch.setattr(_images, "at_hand", lambda x: False)
    w = torch.randn(4, 4, 3, 3, requires_grad=True)
    deltas = [torch.full((4, 4, 3, 3), torch.nan, requires_grad=True), torch.randn(4, 4, 3, 3, requires_grad=True)]
    coeffs = torch.eye(2, requires_grad=True)
    x = torch.randn(3, 4, 8, 8, requires_grad=True)
    pairs = [(0, 0), (1, 1)]
    y = delta_conv2d(x, w, deltas, coeffs, tasks=[0, 1, -1], pairs=pairs, backend="aten")
    assert y.isnan().flatten(1).any(1).tolist() == [True, False, False]
    dy = torch.where(y.isnan(), torch.nan, torch.ones_like(y))
    dx, *ddeltas, dcoeffs = torch.autograd.grad(y, (x, *deltas, coeffs), dy)
    assert dx.isnan().flatten(1).any(1).tolist() == [True, False, False]
    assert ddeltas[0].isnan().any() and ddeltas[1].isfinite().all()
    assert dcoeffs.diagonal().isnan().tolist() == [True, False]


@pytest.mark.parametrize("case", ("a part of the channels", "a depthwise weight in channels last"))
def test_the_layout_of_a_result_is_the_same_in_every_mix(case: str) -> None:
    """What is compiled relies on it."""
    groups = 1
    x, w, d = torch.randn(16, 8, 6, 6), torch.randn(4, 4, 3, 3), torch.randn(4, 4, 3, 3)
    if case == "a part of the channels":
        x = x.to(memory_format=torch.channels_last)[:, :4]
    else:
        x, groups = x[:, :4].contiguous(), 4
        w, d = (t[:, :1].contiguous(memory_format=torch.channels_last) for t in (w, d))
    options = dict(padding=1, groups=groups)
    wanted = F.conv2d(x, w, **options).stride()  # type: ignore[arg-type]
    for ids in ([0, 1] * 8, [0] * 8 + [1] * 8, [0] * 16):
        y = delta_conv2d(x, w, [d], torch.tensor([[1.0], [0.0]]), tasks=ids, **options)  # type: ignore[arg-type]
        assert y.stride() == wanted, ids


@pytest.mark.parametrize("images", (0, 2))
def test_a_base_that_is_of_no_memory_format(images: int) -> None:
    torch.manual_seed(0)
    x, base, delta = torch.randn(images, 2, 3, 3), torch.randn(3, 2, 3, 3).transpose(2, 3), torch.randn(3, 2, 3, 3)
    given = [t.requires_grad_() for t in (x, base, delta, torch.randn(1))]

    def gradients(base: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(delta_conv2d(x, base, [delta], given[3]).square().sum(), given)

    torch.testing.assert_close(gradients(base), gradients(base.contiguous()))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_base_whose_side_of_one_lies_anyhow(dtype: torch.dtype) -> None:
    """As of a permuted weight; a task of one image has a product of its own in PyTorch, which refuses the strides."""
    base = torch.randn(5, 5, 1, 2, dtype=dtype).permute(0, 3, 1, 2)
    x = torch.randn(5, 2, 12, 11, dtype=dtype).contiguous(memory_format=torch.channels_last)
    deltas = [torch.randn(5, 2, 5, 1, dtype=dtype, requires_grad=True) for _ in range(2)]
    y = delta_conv2d(x, base, deltas, torch.eye(2), None, 1, 1, tasks=[0, 0, 0, 0, 1])
    found = torch.autograd.grad(y.sum(), deltas)
    for delta, images, got in zip(deltas, (x[:4], x[4:]), found, strict=True):
        w = (base + delta).float().contiguous().detach().requires_grad_()
        (want,) = torch.autograd.grad(F.conv2d(images.float().contiguous(), w, None, 1, 1).sum(), w)
        torch.testing.assert_close(got.float(), want, rtol=2e-2, atol=0.5 if dtype == torch.bfloat16 else 1e-3)
