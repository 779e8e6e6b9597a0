"""torch.func and forward-mode AD: the reference has their rules; what runs kernels refuses them, and says who has."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from nets import ConvNet, images, three_tasks
from torch.autograd import forward_ad
from torch.func import functional_call, functionalize, grad, jvp, vmap

from taps_fast import TapsModel, delta_conv2d, delta_linear, scale_shift
from taps_fast.formats import Int8

BASE, DELTA, X = (torch.randn(*shape, dtype=torch.float64) for shape in ((4, 2, 3, 3), (4, 2, 3, 3), (3, 2, 6, 6)))
COEFFS = torch.tensor([0.5], dtype=torch.float64)
KERNELS = "torch.func and forward-mode AD need .*the network that TapsModel.merge"


def linear(x, delta, **how):
    return delta_linear(x, BASE.flatten(1), [delta], COEFFS, **how)


def conv(x, delta, **how):
    return delta_conv2d(x, BASE, [delta], COEFFS, **how)


def forward_ad_by_hand(run, x, delta):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(run(x, forward_ad.make_dual(delta, torch.ones_like(delta)))).tangent


TRANSFORMS = {
    "grad": lambda run, x, delta: grad(lambda d: run(x, d).square().sum())(delta),
    "vmap": lambda run, x, delta: vmap(lambda one: run(one[None], delta))(x),
    "no graph": lambda run, x, delta: torch.no_grad()(vmap(lambda one: run(one[None], delta)))(x),
    "both": lambda run, x, delta: vmap(grad(lambda d, one: run(one[None], d).square().sum()), (None, 0))(delta, x),
    "jvp": lambda run, x, delta: jvp(lambda d: run(x, d), (delta,), (torch.ones_like(delta),)),
    "by hand": forward_ad_by_hand,
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("name", ["delta_linear", "delta_conv2d"])
def test_operations_refuse_them_but_for_the_reference(name, transform):
    run, x, delta = (conv, X, DELTA) if name == "delta_conv2d" else (linear, X.flatten(1)[:, :18], DELTA.flatten(1))
    with pytest.raises(RuntimeError, match=f"{name}: {KERNELS}"):
        transform(run, x, delta)

    def plain(x, delta):
        weight = (BASE if name == "delta_conv2d" else BASE.flatten(1)) + 0.5 * delta
        return F.conv2d(x, weight) if name == "delta_conv2d" else F.linear(x, weight)

    torch.testing.assert_close(transform(partial(run, backend="reference"), x, delta), transform(plain, x, delta))


def test_compressed_deltas_and_what_follows():
    x, delta = X.flatten(1)[:, :18], Int8.from_dense(DELTA.flatten(1))
    with pytest.raises(RuntimeError, match=f"delta_linear: {KERNELS}"):
        jvp(lambda x: linear(x, delta), (x,), (x,))
    with pytest.raises(RuntimeError, match=f"scale_shift: {KERNELS}"):
        jvp(lambda x: scale_shift(x, torch.ones(18), None), (x,), (x,))


@pytest.mark.parametrize("tasks", ["cubs", [0, 1, -1]])
def test_models(tasks):
    model, x = three_tasks(ConvNet()), images(3)
    parameters = dict(model.named_parameters())
    for run in (
        lambda: grad(lambda p: functional_call(model, p, (x,), {"tasks": tasks}).sum())(parameters),
        lambda: vmap(lambda one: model(one[None], tasks="cubs"))(x),
        lambda: jvp(lambda x: model(x, tasks=tasks), (x,), (x,)),
    ):
        with pytest.raises(RuntimeError, match=f"TapsModel: {KERNELS}"):
            run()
    assert isinstance(model, TapsModel) and not model.probed
    plain = model.merge("cubs")
    grad(lambda p: functional_call(plain, p, (x,)).sum())(dict(plain.named_parameters()))


def test_functionalize_is_no_such_transform():
    x, delta = X.flatten(1)[:, :18], DELTA.flatten(1)
    torch.testing.assert_close(functionalize(linear)(x, delta), linear(x, delta))
