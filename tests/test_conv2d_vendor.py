"""PyTorch's convolution by groups of images, as the compiled operator runs it and as plain PyTorch does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from taps_fast import TaskBatch, _aten, _autograd, _scratch, delta_conv2d, testing

FLOATS = (torch.float32, torch.bfloat16, torch.float64)
VENDOR = [
    case
    for shape, conv in (((6, 4, 3, 3), dict(padding=1)), ((6, 1, 3, 3), dict(groups=6)), ((6, 4, 1, 1), {}))
    for case in testing.channels_last_cases(shape, conv, FLOATS)
]


def channels_last(*shape: int) -> torch.Tensor:
    return torch.randn(shape).to(memory_format=torch.channels_last)


class Plain:
    """The operators, convolutions as they run without the compiled ones."""

    class conv2d_merge:
        default = torch.ops.taps_fast.conv2d_merge.uncompiled

    class conv2d_grad:
        default = torch.ops.taps_fast.conv2d_grad.uncompiled

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.ops.taps_fast, name)


@pytest.fixture(params=["compiled", "plain"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "plain":
        monkeypatch.setattr(_autograd, "ops", Plain())
    return str(request.param)


def convolved(call: Callable[[], object], backward: bool = False) -> list[int]:
    """Images of each of PyTorch's convolutions (or of their gradients) in a call, whoever asks for them."""
    with torch.profiler.profile(record_shapes=True) as found:
        call()
    name = "aten::convolution_backward" if backward else "aten::conv2d"
    return [event.input_shapes[0][0] for event in found.events() if event.name == name]


BY_CHANNEL = [
    replace(case, channels_last=False)
    for shape, conv in (((6, 1, 3, 3), dict(groups=6, padding=1)), ((6, 1, 2, 3), dict(groups=3, stride=2)))
    for case in testing.channels_last_cases(shape, conv, FLOATS)
]


@pytest.mark.parametrize("case", BY_CHANNEL, ids=str)
def test_depthwise_by_channel(case: testing.Case) -> None:
    """A mixed batch is one convolution of as many groups, forwards and backwards; of one weight, whose sums have its
    own type, both gradients are one call."""
    testing.assert_close_to_oracle(case, "aten", "merge")
    inputs, count = testing.make_inputs(case), 1 if case.tasks else case.rows
    assert convolved(lambda: testing.run(inputs, testing.ours("aten", "merge"))) == [count]
    found = convolved(lambda: testing.run(inputs, testing.ours("aten", "merge")), backward=True)
    assert found == [count] * (2 if case.tasks or case.dtype == torch.bfloat16 else 1)


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


def test_gradients_are_one_call_for_each_task(way: str) -> None:
    """With a weight of its own; images that share one are joined for dx alone, and rows that nobody asks for left."""
    x, base, deltas = channels_last(6, 4, 5, 5), torch.randn(3, 4, 3, 3), list(torch.randn(3, 3, 4, 3, 3))
    coeffs = torch.diag(torch.tensor([1.0, 0.0, 0.0]))
    leaves = [t.requires_grad_() for t in (x, coeffs, *deltas)]
    y = delta_conv2d(x, base, deltas, coeffs, tasks=[0, -1, 1, 1, 2, 0], backend="aten")
    found = convolved(lambda: torch.autograd.grad(y.sum(), leaves), backward=True)
    # Plain PyTorch: dx of both weights, P of each task.
    assert found == ([4, 2, 1, 2] if way == "compiled" else [4, 2, 2, 2, 1])


@pytest.mark.parametrize("algorithm", ["merge", "split"])
@pytest.mark.parametrize("case", list(testing.conv2d_cases((torch.bfloat16, torch.float16))), ids=str)
def test_weight_gradients_in_16_bits_as_on_a_gpu(
    case: testing.Case, algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P of one weight rounded as PyTorch rounds it; of a mixed batch no less exact than before."""
    monkeypatch.setattr(_autograd, "ops", Plain())
    monkeypatch.setattr(_aten, "gradient_dtype", lambda x: x.dtype)
    n = testing.make_inputs(case)
    out, low = testing.run(n, testing.ours("aten", algorithm)), testing.run(n, testing.plain_torch)
    exact = n.to(torch.float64)
    ref = testing.run(exact, testing.oracle)
    scales = testing.sum_scales(exact, ref, None if case.tasks else case.dtype)
    for name in out:
        testing.assert_no_worse_than_torch(out[name], ref[name], low[name], scale=scales.get(name), name=name)
