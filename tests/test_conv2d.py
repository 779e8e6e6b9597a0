"""Convolutions beyond their formula: the routes by which they run, what a call may keep, and their errors."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from taps_fast import BackendError, TaskBatch, _aten, _autograd, _pointwise, _scratch, delta_conv2d, testing
from taps_fast._dispatch import PATCH_ROWS, ROWS_WEIGHTS, explain, select
from taps_fast._problem import Problem
from taps_fast.functional import is_plain_conv2d

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
VENDOR = [
    case
    for shape, conv in (((6, 4, 3, 3), dict(padding=1)), ((6, 1, 3, 3), dict(groups=6)), ((6, 4, 1, 1), {}))
    for case in testing.channels_last_cases(shape, conv, FLOATS)
]


def channels_last(*shape: int) -> torch.Tensor:
    return torch.randn(shape).to(memory_format=torch.channels_last)


class Plain:
    """The operators, the forward convolution as it runs without the compiled one."""

    class conv2d_merge:
        default = torch.ops.taps_fast.conv2d_merge.uncompiled

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.ops.taps_fast, name)


@pytest.fixture(params=["compiled", "plain"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "plain":
        monkeypatch.setattr(_autograd, "ops", Plain())
    return str(request.param)


def convolved(call: Callable[[], object]) -> list[int]:
    """Images of each of PyTorch's convolutions in a call, whoever asks for them."""
    with torch.profiler.profile(record_shapes=True) as found:
        call()
    return [event.input_shapes[0][0] for event in found.events() if event.name == "aten::conv2d"]


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


BY_CHANNEL = [
    replace(case, channels_last=False)
    for shape, conv in (((6, 1, 3, 3), dict(groups=6, padding=1)), ((6, 1, 2, 3), dict(groups=3, stride=2)))
    for case in testing.channels_last_cases(shape, conv, FLOATS)
]


@pytest.mark.parametrize("case", BY_CHANNEL, ids=str)
def test_depthwise_by_channel(case: testing.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mixed batch is one convolution of as many groups, forwards and backwards."""
    calls = collections.Counter[str]()
    monkeypatch.setattr(_aten, "_gradient", _counted(_aten._gradient, calls, "_gradient"))
    testing.assert_close_to_oracle(case, "aten", "merge")
    inputs = testing.make_inputs(case)
    calls.clear()
    images = convolved(lambda: testing.run(inputs, testing.ours("aten", "merge")))
    assert images == [1 if case.tasks else case.rows] and calls == {"_gradient": 2}


def _counted(function: Callable[..., Any], calls: collections.Counter[str], name: str) -> Callable[..., Any]:
    def counting(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        return function(*args, **kwargs)

    return counting


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


# --- the vendor's convolution by groups of images -------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["merge", "split"])
@pytest.mark.parametrize("case", VENDOR, ids=str)
def test_channels_last(case: testing.Case, algorithm: str, way: str) -> None:
    testing.assert_close_to_oracle(case, "aten", algorithm)


@pytest.mark.parametrize("case", list(testing.conv2d_cases(FLOATS)), ids=str)
def test_without_the_compiled_operator(case: testing.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_autograd, "ops", Plain())
    testing.assert_close_to_oracle(case, "aten", "merge")


@pytest.mark.parametrize("x_last", [False, True])
@pytest.mark.parametrize("weights_last", [False, True, None])
@pytest.mark.parametrize("size", [1, 6])
def test_layouts_are_those_of_one_convolution(x_last: bool, weights_last: bool | None, size: int) -> None:
    """Whatever lies as channels last: images, weights (None: the base alone), pixels of which there is one."""

    def laid(last: bool | None, *shape: int) -> torch.Tensor:
        return channels_last(*shape) if last else torch.randn(shape)

    x = laid(x_last, 7, 4, size, size)
    base, *deltas = laid(weights_last is not False, 3, 4, 3, 3), *(laid(weights_last, 3, 4, 3, 3) for _ in range(2))
    coeffs, ids = torch.tensor([[0.5, 0.0], [0.0, 0.0], [0.25, -2.0]]), torch.tensor([2, -1, 0, 1, 0, 2, 2])
    y = delta_conv2d(x, base, deltas, coeffs, padding=1, tasks=ids, backend="aten")
    whole = F.conv2d(x, base, padding=1)
    assert [s for s, n in zip(y.stride(), y.shape, strict=True) if n > 1] == [
        s for s, n in zip(whole.stride(), whole.shape, strict=True) if n > 1
    ]
    for i, task in enumerate(ids.tolist()):
        weight = base if task < 0 else base + coeffs[task, 0] * deltas[0] + coeffs[task, 1] * deltas[1]
        torch.testing.assert_close(y[i], F.conv2d(x[i : i + 1], weight, padding=1)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (dict(coeffs=torch.ones(2, 2)), "coeffs must have 2 elements of scalar type 6, got 4"),
        (dict(coeffs=torch.ones(2, 1).double()), "coeffs must have 2 elements of scalar type 6, got 2 of 7"),
        (dict(deltas=[torch.randn(4, 2, 3)]), "deltas must have 72 elements"),
        (dict(base_coeffs=torch.ones(3)), "base_coeffs must have 2 elements"),
        (dict(order=torch.tensor([0, 1, 3])), r"order must be in \[0, 3\), got 3"),
        (dict(order=torch.tensor([0, 1])), "batch times inner images, got 3"),
        (dict(ids=None), "must come together"),
        (dict(x=torch.randn(3, 2, 2, 2)), "Kernel size can't be greater|has printed why"),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_the_compiled_operator_checks_what_it_reads(changes: dict[str, Any], text: str) -> None:
    ids, order, offsets = TaskBatch.from_ids([0, 1, -1], 2).tensors
    base = torch.randn(4, 2, 3, 3)
    call = dict(
        x=torch.randn(3, 2, 5, 5), base=base, deltas=[base], coeffs=torch.ones(2, 1), base_coeffs=None, bias=None
    )
    call |= dict(
        stride=[1, 1], padding=[0, 0], dilation=[1, 1], groups=1, ids=ids, order=order, offsets=offsets, inner=1
    )
    with pytest.raises(RuntimeError, match=text):
        torch.ops.taps_fast.conv2d_merge.default(*(call | changes).values())


def test_weights_of_nan_stay_with_their_tasks() -> None:
    """NaN is unlike itself, but not another weight; and no image of another task sees it."""
    x, base, delta = torch.randn(5, 2, 4, 4), torch.randn(3, 2, 3, 3), torch.randn(3, 2, 3, 3)
    coeffs = torch.tensor([[float("nan")], [1.0], [float("nan")], [0.0]])
    y = delta_conv2d(x, base, [delta], coeffs, tasks=[0, 1, 2, 3, -1], backend="aten")
    assert y.isnan().flatten(1).all(1).tolist() == [True, False, True, False, False]
    torch.testing.assert_close(y[1], F.conv2d(x[1], base + delta))


def test_closed_gates_share_one_convolution_and_adjacent_images_are_not_copied(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups of one weight are joined; adjacent ones are views of x; a baked weight is read where it lies."""
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []
    convolve = F.conv2d

    def spy(images: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        calls.append((images, weight))
        return convolve(images, weight, *rest)

    monkeypatch.setattr(_aten.F, "conv2d", spy)
    x, base, deltas = channels_last(6, 4, 5, 5), torch.randn(3, 4, 3, 3), [torch.randn(3, 4, 3, 3) for _ in range(3)]
    coeffs, base_coeffs = torch.diag(torch.tensor([0.0, 1.0, 1.0])), torch.tensor([1.0, 1.0, 0.0])
    images = convolved(
        lambda: delta_conv2d(x, base, deltas, coeffs, tasks=[0, -1, 1, 1, 2, 2], base_coeffs=base_coeffs)
    )
    assert images == [2, 2, 2]
    if way == "compiled":  # out of the spy's sight
        return
    assert [images.data_ptr() for images, _ in calls] == [x[i].data_ptr() for i in (0, 2, 4)]
    assert calls[0][1] is base and calls[2][1] is deltas[2]


def test_a_merged_weight_goes_into_one_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is as large as the largest layer yet, and no call after that makes another."""
    monkeypatch.setattr(_autograd, "ops", Plain())
    weights = [torch.randn(8, 4, k, k) for k in (3, 5, 1)]
    kept = None
    for _ in range(2):
        for base in weights:
            delta_conv2d(torch.randn(2, 4, 6, 6), base, [base], torch.ones(1))
        buffer = _scratch._scratch.weights[torch.float32]
        assert buffer.numel() >= max(w.numel() for w in weights)
        assert kept in (None, buffer.data_ptr())
        kept = buffer.data_ptr()


@pytest.mark.parametrize("mixed", [False, True])
def test_gradients_have_the_layout_of_the_weight(mixed: bool) -> None:
    """So that autograd keeps them instead of copying; and no two gradients share memory."""
    x, base, *deltas = (channels_last(6, 4, 3, 3).requires_grad_() for _ in range(4))
    coeffs = torch.ones(2, 2) if mixed else torch.ones(2)
    y = delta_conv2d(x, base, deltas, coeffs, padding=1, tasks=[0, 1, 1, -1, 0, 1] if mixed else None)
    found = torch.autograd.grad(y, (x, base, *deltas), torch.randn_like(y))
    assert all(g.is_contiguous(memory_format=torch.channels_last) for g in found)
    assert len({g.data_ptr() for g in found}) == len(found)


def test_training_follows_inference(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The buffer that inference mode made serves training, and the other way round."""
    x, base = torch.randn(2, 4, 6, 6), torch.randn(8, 4, 3, 3)
    delta = torch.randn_like(base).requires_grad_()
    for first, second in ((True, False), (False, True)):
        monkeypatch.setattr(_scratch, "_scratch", _scratch._Scratch())
        for inference in (first, second):
            with torch.inference_mode(inference):
                y = delta_conv2d(x, base, [delta], torch.ones(1))
            assert torch.equal(y.detach(), F.conv2d(x, base + delta.detach()))
            if not inference:
                y.sum().backward()


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("mixed", [False, True])
def test_nothing_but_inputs_is_saved_for_the_backward(kernel: int, mixed: bool) -> None:
    """No merged weight: every saved tensor is an input, a view of one, or the index of the batch."""
    x = channels_last(4, 64, 6, 6).requires_grad_()
    base, *deltas = torch.randn(3, 256, 64, kernel, kernel)
    deltas = [delta.clone().requires_grad_() for delta in deltas]
    coeffs = (torch.eye(2) if mixed else torch.ones(2)).requires_grad_()
    batch = TaskBatch.from_ids([1, 0, 1, -1], 2) if mixed else None
    known = {t.untyped_storage().data_ptr() for t in (x, base, *deltas, coeffs, *(batch.tensors if batch else ()))}
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        y = delta_conv2d(x, base, deltas, coeffs, tasks=batch)
    assert saved and {t.untyped_storage().data_ptr() for t in saved} <= known
    y.sum().backward()
    assert all(t.grad is not None for t in (x, coeffs, *deltas))


def test_the_base_alone_is_the_vendors_convolution() -> None:
    """Bit for bit, with its gradients, an epilogue behind it, and the ids of a batch without a delta."""
    x, base, bias = (
        channels_last(4, 4, 6, 6).requires_grad_(),
        torch.randn(8, 4, 3, 3, requires_grad=True),
        torch.randn(8),
    )
    y = delta_conv2d(x, base, [], torch.ones(2, 0), bias, padding=1, tasks=[0, -1, 1, 1], activation="relu")
    want = F.conv2d(x, base, bias, padding=1).relu()
    assert torch.equal(y, want)
    for got, expected in zip(
        torch.autograd.grad(y.sum(), (x, base)), torch.autograd.grad(want.sum(), (x, base)), strict=True
    ):
        assert torch.equal(got, expected)


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
        monkeypatch.setattr(_aten, "_data_driven", lambda x, index: index[0] is not None)
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
