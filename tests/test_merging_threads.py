"""Merged models that threads share: each forward has its own coefficients, shares and weights, however they cross."""

from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from taps_fast.merging import Experts, MergedModel, TaskVectors, TwinModel


class Between(nn.Module):
    """Something happens in the middle of a forward. Its parameter belongs to no layer or norm."""

    def __init__(self, happens):
        super().__init__()
        self.scale, self.happens = nn.Parameter(torch.ones(6)), [happens]

    def forward(self, x):
        self.happens[0]()
        return x * self.scale


def nothing():
    pass


def made(kind, happens=nothing):
    """A model, and a call of it by each of two threads."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), Between(happens), nn.Linear(6, 2))
    tuned = {t: {n: p + torch.randn_like(p) for n, p in net.state_dict().items()} for t in "ab"}
    vectors = TaskVectors.from_checkpoints(net.state_dict(), tuned)
    x, y = torch.randn(2, 4), torch.randn(3, 4)
    if kind == "experts":
        experts = Experts(net, vectors)
        assert not experts.mixed
        return experts, (lambda m: m({"a": x})["a"], lambda m: m({"b": x})["b"])
    model = TwinModel(net, vectors, nn.Linear(4, 2)) if kind == "twin" else MergedModel(net, vectors, route=kind)
    return model, (lambda m: m(x), lambda m: m(y))


@pytest.mark.parametrize("kind", ["twin", "layer", "whole", "experts"])
def test_forwards_that_cross(kind):
    """The second begins in the middle of the first, and ends after it: at once, or in its turn."""
    number = threading.local()
    begun = [threading.Event(), threading.Event()]
    over = threading.Event()

    def happens():
        mine = getattr(number, "mine", None)
        if mine is not None:
            begun[mine].set()
            (begun[1], over)[mine].wait(0.2)

    model, calls = made(kind, happens)
    wanted = [call(model) for call in calls]

    def first():
        number.mine = 0
        try:
            return calls[0](model)
        finally:
            over.set()

    def second():
        number.mine = 1
        begun[0].wait(10)
        return calls[1](model)

    with ThreadPoolExecutor(2) as pool:
        found = [future.result() for future in (pool.submit(first), pool.submit(second))]
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    torch.testing.assert_close([call(model) for call in calls], wanted, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["twin", "layer", "whole", "experts"])
def test_copies_have_forwards_of_their_own(kind):
    model, calls = made(kind)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for call in calls:
            torch.testing.assert_close(call(twin), call(model))


@pytest.mark.parametrize("kind", ["twin", "layer", "whole"])
def test_compiled_as_one_graph(kind):
    model, calls = made(kind)
    torch.testing.assert_close(calls[0](torch.compile(model, backend="eager", fullgraph=True)), calls[0](model))
