"""`FlopCounterMode` on models with tasks: what it counts is what it counts on their merged networks."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from taps_fast import TapsModel, _ext, delta_linear, formats


def model(layout=torch.contiguous_format):
    """Without biases of convolutions: a mixed batch sums their gradients by a small product, which is counted too."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 1, bias=False),
        nn.Conv2d(12, 12, 3, groups=4, bias=False),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(48, 20),
        nn.Linear(20, 5),
    )
    taps = TapsModel(net, ["a", "b"], head="8")
    for layer in taps.conversion.layers.values():
        for delta in layer.deltas.values():
            delta.data.normal_()
    taps.eval().to(memory_format=layout)
    taps.probe(images(2, layout))  # which the first mixed batch would begin with
    return taps


def images(count, layout=torch.contiguous_format):
    return torch.randn(count, 3, 10, 10).contiguous(memory_format=layout)


def flops(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_forward(layout):
    taps = model(layout)
    x = images(6, layout)
    merged = taps.merge("a")
    with torch.no_grad():
        wanted = flops(lambda: merged(x))
        assert wanted > 100_000
        for tasks in ("base", "a", ["a"] * 6, ["b", "a", "a", "b", "base", "a"]):
            assert flops(lambda tasks=tasks: taps(x, tasks=tasks)) == wanted
    assert flops(lambda: taps(x, tasks=["a", "b"] * 3)) == wanted


def test_backward():
    taps = model()
    x = images(6)
    merged = taps.merge("a").requires_grad_()
    # PyTorch counts the gradient of a grouped weight, here of 4 groups, as that of an ungrouped one.
    grouped = 2 * 6 * (12 * 3 * 3) * (3 * 3 * 3)
    wanted = flops(lambda: merged(x).sum().backward()) - (4 - 1) * grouped
    for tasks in ("a", ["b", "a", "a", "b", "a", "a"]):
        assert flops(lambda tasks=tasks: taps(x, tasks=tasks).sum().backward()) == wanted
    for frozen in (taps, merged):
        frozen.requires_grad_(False)
    x.requires_grad_()
    assert flops(lambda: taps(x, tasks="a").sum().backward()) == flops(lambda: merged(x).sum().backward())


@pytest.mark.parametrize("format", ["bits", "int8", "lowrank"])
@pytest.mark.parametrize("training", [False, True])
def test_compressed_deltas(format, training):
    """Codes are part of the product without gradients. Elsewhere a delta has a product of its own, low rank two."""
    rows, out, into, rank = 5, 6, 70, 2
    delta = formats.compress(torch.randn(out, into), format, rank=rank if format == "lowrank" else None)
    x = torch.randn(rows, into, requires_grad=training)
    arguments = (x, torch.randn(out, into), [delta], torch.ones(1, 1))

    def call():
        y = delta_linear(*arguments, tasks=torch.zeros(rows, dtype=torch.int64), algorithm="split")
        if training:
            y.sum().backward()

    own = rank * (out + into) if format == "lowrank" else out * into * training
    assert flops(call) == 2 * rows * (out * into + own) * (1 + training)


def test_operators_of_a_gpu():
    """Counted by shapes alone."""
    x, base, image, kernel = (torch.ones(*n, device="meta") for n in ((5, 7), (6, 7), (2, 4, 9, 9), (6, 4, 3, 3)))
    rest = ([], torch.ones(0, device="meta"), None, None)
    assert flops(lambda: torch.ops.taps_fast.linear_stream(x, base, *rest, None, 1)) == 2 * 5 * 7 * 6
    conv = ([1, 1], [0, 0], [1, 1], None, 1)
    found = flops(lambda: torch.ops.taps_fast.conv2d_implicit(image, kernel, *rest, *conv))
    assert found == 2 * 2 * (7 * 7) * 6 * (4 * 3 * 3)


@pytest.mark.skipif(_ext.CPU_ERROR is not None, reason="the kernels are not compiled")
def test_low_rank_in_place():
    y, x, a, b = torch.zeros(5, 6), torch.ones(5, 70), torch.ones(3, 2, 70), torch.ones(3, 2, 6)
    rest = (torch.ones(3), torch.ones(3), None, None, None, 1)
    assert flops(lambda: torch.ops.taps_fast.linear_low_rank_(y, x, a, b, *rest)) == 2 * 5 * 2 * (6 + 70)


@pytest.mark.parametrize("first", ["taps_fast", "torch.utils.flop_counter"])
def test_whatever_is_imported_first(first):
    """The counter imports Triton, so taps_fast alone does not import it."""
    code = f"""
import sys, torch
import {first}
assert {first != "taps_fast"} == ("torch.utils.flop_counter" in sys.modules)
import taps_fast
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    taps_fast.delta_linear(torch.ones(2, 3), torch.ones(4, 3), [], torch.ones(0))
assert counter.get_total_flops() == 2 * 2 * 3 * 4, counter.get_total_flops()
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
