"""Functions that hold modules of a network run the adapted ones in its copy, and a merged task's in that."""

from __future__ import annotations

import copy
import functools
import types
import warnings

import pytest
import torch
from nets import perturb
from torch import nn

from taps_fast import TapsModel


def attribute():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.f = lambda x: self.fc(x)

        def forward(self, x):
            return self.f(x)

    return Net()


def replaced():
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 4)))
    inner = net[0]

    def forward(z, *, twice=2.0):
        return inner[0](z).tanh() * twice

    inner.forward = forward
    return net


def wrapped():
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    inner = net[0]
    old = inner.forward  # a method, whose module deepcopy copies

    @functools.wraps(old)
    def doubled(x):
        return old(x) * 2

    def forward(x):
        return doubled(x) + doubled(x)

    inner.forward = forward
    return net


def hook():
    net = nn.Sequential(nn.Identity(), nn.Linear(4, 4))
    layers = [net[1]]
    net[0].register_forward_hook(lambda module, args, y: layers[0](y).relu())
    return net


def default():
    net = nn.Sequential(nn.Linear(4, 4), nn.Identity())
    net[1].forward = lambda x, layer=net[0]: layer(x)
    return net


def recursive():
    net = nn.Sequential(nn.Linear(4, 4))

    def forward(x, left=2):
        return x if left == 0 else forward(net[0](x), left - 1)

    net.forward = forward
    return net


def partial():
    net = nn.Sequential(nn.Linear(4, 4), nn.Identity())

    def run(scale, x):
        return net[0](x) * scale

    net[1].steps = [functools.partial(run, 2.0)]
    net[1].forward = lambda x: net[1].steps[0](x)
    return net


NETS = [attribute, replaced, wrapped, hook, default, recursive, partial]


@pytest.mark.parametrize("make", NETS)
def test_the_copy_runs_its_own_modules(make):
    torch.manual_seed(0)
    net = make().double().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = perturb(TapsModel(net, ["cubs", "cars"]), closed=())
    for layer in model.conversion.layers.values():
        layer.scores["cubs"].data.fill_(0.2)
    x, called = torch.randn(3, 4).double(), []
    handles = [m.register_forward_hook(lambda *_: called.append(1)) for m in net.modules() if type(m) is nn.Linear]
    torch.testing.assert_close(model(x, tasks="base"), net(x))
    ours, called[:] = list(called), []
    y = model(x, tasks="cubs")
    assert ours and not called and not torch.allclose(y, net(x))
    y.sum().backward()
    assert all(layer.deltas["cubs"].grad is not None for layer in model.conversion.layers.values())
    for handle in handles:
        handle.remove()
    plain = model.merge("cubs")
    torch.testing.assert_close(plain(x), y)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    assert not plain(x).any() and torch.equal(model(x, tasks="cubs"), y)


def test_what_else_a_function_holds_stays_the_users():
    net, seen = nn.Sequential(nn.Linear(4, 4)), []
    stranger = nn.Linear(4, 4)
    net[0].register_forward_hook(lambda module, args, y: seen.append((net, stranger)))
    TapsModel(net, ["cubs"])(torch.randn(2, 4))
    assert seen[0][0] is not net and seen[0][1] is stranger


GLOBAL = nn.Sequential(nn.Sequential(nn.Linear(4, 4)))


def test_functions_that_cannot_follow_are_named():
    net = copy.deepcopy(GLOBAL)
    net[0].forward = lambda x: GLOBAL[0][0](x)
    TapsModel(net)  # another network
    GLOBAL[0].forward = lambda x: (lambda z: GLOBAL[0][0](z))(x)
    with pytest.warns(UserWarning, match="0.forward reaches the network that was given by the global name 'GLOBAL'"):
        TapsModel(GLOBAL)
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 4)))
    net[0].forward = types.MethodType(lambda self, x: net[0][0](x), net[0])
    with pytest.warns(UserWarning, match="0.forward reaches the network that was given from within a method"):
        TapsModel(net)
