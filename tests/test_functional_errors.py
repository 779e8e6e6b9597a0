"""What the public functions and their dispatch refuse, and what they say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from taps_fast import TaskBatch, delta_conv2d, delta_linear
from taps_fast._dispatch import BackendError, explain, select
from taps_fast._problem import Problem


def call_linear(**changes: Any) -> Tensor:
    kwargs: dict[str, Any] = dict(
        x=torch.randn(6, 3),
        base=torch.randn(4, 3),
        deltas=[torch.randn(4, 3)],
        coeffs=torch.ones(2, 1),
        tasks=[0, 1, -1],
    )
    return delta_linear(**(kwargs | changes))


@pytest.mark.parametrize(
    "changes, kind, text",
    [
        (
            dict(x=torch.randn(6, 5)),
            ValueError,
            r"delta_linear: x must be \[\.\.\., 3\] for base \(4, 3\), got \(6, 5\)",
        ),
        (dict(x=torch.randn(6, 3).int()), TypeError, r"delta_linear: x must be one of torch.float32"),
        (
            dict(base=torch.randn(4, 3, 1)),
            ValueError,
            r"delta_linear: base must have 2 dimensions, got shape \(4, 3, 1\)",
        ),
        (dict(base=torch.randn(4, 3).double()), TypeError, r"base must be torch.float32 like x, got torch.float64$"),
        (
            dict(base=torch.randn(4, 3).double(), deltas=[torch.randn(4, 3).double()]),
            TypeError,
            r"base must be .* like x, got torch.float64 \(all weights are: convert the input, or the model with .to\(",
        ),
        (dict(base=torch.randn(4, 3, device="meta")), ValueError, r"base must be on cpu like x, got meta"),
        (dict(deltas=[torch.randn(3, 3)]), ValueError, r"deltas\[0\] must be \(4, 3\) like base, got \(3, 3\)"),
        (dict(deltas=[None]), TypeError, r"deltas\[0\] must be a Tensor or a format, got NoneType"),
        (dict(coeffs=torch.ones(2, 3)), ValueError, r"coeffs must be \[T, 1\], one row a task, got \(2, 3\)"),
        (dict(coeffs=torch.ones(1)), ValueError, r"coeffs must be \[T, 1\], one row a task, got \(1,\)"),
        (dict(coeffs=torch.ones(2, 1), tasks=None), ValueError, r"coeffs must be \[1\], one number a delta"),
        (dict(coeffs=torch.ones(2, 1).int()), TypeError, r"coeffs must be a floating-point tensor, got torch.int32"),
        (dict(coeffs=[1.0]), TypeError, r"coeffs must be a Tensor, got list"),
        (dict(bias=torch.randn(5)), ValueError, r"bias must be \(4,\) or \(2, 4\) or \(3, 4\), got \(5,\)"),
        (dict(bias=torch.randn(4).half()), TypeError, r"bias must be torch.float32 like x, got torch.float16"),
        (dict(base_coeffs=torch.ones(3)), ValueError, r"base_coeffs must be \[2\], got \(3,\)"),
        (dict(base_coeffs=torch.ones(2, requires_grad=True)), ValueError, r"base_coeffs must not require a gradient"),
        (dict(tasks=[0, 1, 2]), ValueError, r"tasks must be ids in \[-1, 2\), -1 being the base, got 2 \(1 of 3"),
        (dict(tasks=[0, -2, 1]), ValueError, r"tasks must be ids in \[-1, 2\), -1 being the base, got -2"),
        (dict(tasks=[0, 1, 1, 0]), ValueError, r"tasks must divide the batch: rows % ids == 0, got 4 ids \(x \(6, 3\)"),
        (dict(tasks=[]), ValueError, r"tasks must divide the batch: rows % ids == 0, got 0 ids"),
        (dict(tasks=0), TypeError, "tasks must be integers, one a sample, got 0"),
        (dict(tasks=[[0], [0, 1]]), TypeError, r"tasks must be integers, one a sample, got \[\[0\], \[0, 1\]\]"),
        (dict(tasks=torch.zeros(3)), TypeError, r"tasks must be integers, got torch.float32"),
        (
            dict(tasks=torch.zeros(3, 1).long()),
            ValueError,
            r"tasks must have 1 dimension, one id a sample, got shape \(3, 1\)",
        ),
        (dict(tasks=["cubs"] * 3), TypeError, r"tasks must be integer ids, got \['cubs'"),
        (dict(tasks=TaskBatch.from_ids([0, 1, 2], 3)), ValueError, r"tasks must be a TaskBatch of 2 tasks"),
        (dict(pairs=[(0, 1)]), ValueError, r"pairs must be \(task, delta\) in \[0, 2\) x \[0, 1\), got \(0, 1\)"),
        (dict(batch_dim=1), ValueError, r"batch_dim must be one of the 1 axes of x before its features, got 1 \(x"),
        (dict(batch_dim=-1), ValueError, r"batch_dim must be one of the 1 axes of x before its features, got -1 \(x"),
        (
            dict(backend="cudnn"),
            ValueError,
            r"^delta_linear: backend must be one of cpu, cuda, triton, reference, got 'cudnn'",
        ),
        (
            dict(algorithm="fast"),
            ValueError,
            r"^delta_linear: algorithm must be auto, blend, split, stream, merge, got 'fast'",
        ),
    ],
)
def test_linear_errors(changes: dict[str, Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        call_linear(**changes)


def call_conv2d(**changes: Any) -> Tensor:
    kwargs: dict[str, Any] = dict(
        x=torch.randn(2, 4, 6, 6), base=torch.randn(6, 4, 3, 3), deltas=[torch.randn(6, 4, 3, 3)], coeffs=torch.ones(1)
    )
    return delta_conv2d(**(kwargs | changes))


@pytest.mark.parametrize(
    "changes, kind, text",
    [
        (
            dict(backend="cude"),
            ValueError,
            "^delta_conv2d: backend must be one of cpu, triton, linear, aten, reference, got 'cude'",
        ),
        (
            dict(algorithm="fast"),
            ValueError,
            "^delta_conv2d: algorithm must be auto, blend, split, merge, rows, got 'fast'",
        ),
        (dict(x=torch.randn(4, 6)), ValueError, r"delta_conv2d: x must be \[N, C, H, W\] or \[C, H, W\], got \(4, 6\)"),
        (
            dict(x=torch.randn(2, 3, 6, 6)),
            ValueError,
            r"^delta_conv2d: x must have 4 channels, got 3 \(x .*, base \(6, 4, 3, 3\), groups=1\)$",
        ),
        (dict(groups=4), ValueError, r"groups must split x's 4 channels into base's 4 and divide its 6 outputs, got 4"),
        (dict(stride=0), ValueError, r"stride must be one or two integers >= 1, got 0"),
        (dict(padding=-1), ValueError, r"padding must be one or two integers >= 0, got -1"),
        (dict(padding="full"), ValueError, r"padding must be integers, 'same' or 'valid', got 'full'"),
        (dict(padding="same", stride=2), ValueError, r"padding 'same' must go with stride 1, got stride \[2, 2\]"),
        (dict(dilation=(1, 2, 3)), ValueError, r"dilation must be one or two integers >= 1, got \(1, 2, 3\)"),
        (dict(tasks=[0, 0, 0], coeffs=torch.ones(1, 1)), ValueError, r"tasks must divide the batch: .*got 3 ids"),
    ],
)
def test_conv2d_errors(changes: dict[str, Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        call_conv2d(**changes)


def _problem(**changes: Any) -> Problem:
    kwargs: dict[str, Any] = dict(
        op="linear", device="cpu", dtype=torch.float32, shape=(8, 8), rows=4, num_deltas=1, num_tasks=None, grad=False
    )
    return Problem(**(kwargs | changes))


@pytest.mark.parametrize(
    "backend, algorithm, reason",
    [
        ("triton", "auto", "runs on CUDA devices, the tensors are on cpu"),
        ("aten", "auto", "serves convolutions only"),
        ("reference", "merge", "^delta_linear: backend='reference', algorithm='merge' cannot run this problem"),
    ],
)
def test_an_explicit_backend_that_cannot_run_says_why(backend: str, algorithm: str, reason: str) -> None:
    with pytest.raises(BackendError, match=reason):
        delta_linear(torch.randn(2, 3), torch.randn(4, 3), [], torch.ones(0), backend=backend, algorithm=algorithm)


def test_explain_lists_every_choice_and_marks_the_one_taken() -> None:
    text = explain(_problem())
    taken = [line for line in text.splitlines() if "->" in line]
    assert len(taken) == 1
    assert select(_problem()).backend in taken[0] and select(_problem()).algorithm in taken[0]
    for backend in ("cpu", "triton", "aten", "reference"):
        assert backend in text
