"""Samples that change each other, and inputs that the probe cannot tell: refused in a mixed batch, with their place."""

from __future__ import annotations

import pytest
import torch
from nets import assert_rows_as_separate
from test_model_probe import ROWS, Mixes, adapt
from torch import nn
from torch.utils._pytree import tree_map


class Spectral(nn.Module):
    """The norm of one channel gives its bias alone, so that no input is felt: only its tasks tell samples apart."""

    def __init__(self, meets):
        super().__init__()
        self.norm, self.layer, self.out, self.meets = nn.LayerNorm(1), nn.Linear(1, 1), nn.Linear(1, 2), meets

    def forward(self, x):
        y = self.layer(self.norm(x[..., None]))[..., 0]
        return self.out((y @ y.T @ x if self.meets else y * x)[..., None])


class Scales(nn.Module):
    """By the largest element of the batch: only the sample that has it is felt."""

    def __init__(self, axes):
        super().__init__()
        self.layer, self.out, self.axes = nn.Linear(4, 4), nn.Linear(4, 2), axes

    def forward(self, x):
        y = self.layer(x)
        return self.out(y / y.abs().amax(self.axes, keepdim=True))


class MixesAtTheEnd(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        y = self.layer(x)
        return y, y.mean(), y @ y.T, y - y.mean(0)


@pytest.mark.parametrize(
    "net, x, where",
    [
        (Mixes(), torch.randn(4, 3, 4), "layer"),
        (Spectral(meets=True), torch.randn(4, 3), "out"),
        (Scales((0, 1)), torch.randn(4, 4) * torch.tensor([1.0, 1e-3, 1.0, 1.0])[:, None], "out"),
        (Scales((0, 1)), torch.randn(4, 4) * torch.tensor([1e-3, 1.0, 1.0, 1.0])[:, None], "out"),
        (MixesAtTheEnd(), torch.randn(5, 4)[:4], "its output"),
    ],
)
def test_samples_that_change_each_other_are_refused_in_a_mixed_batch(net, x, where):
    model = adapt(net)
    with pytest.raises(
        ValueError,
        match=f"samples must not change each other in a mixed batch, .* one task's samples change another's: {where} ",
    ):
        model.probe(x.double(), batch_dim=0)
        model(x.double(), tasks=ROWS)
    tree_map(torch.testing.assert_close, model(x.double(), tasks="cubs"), model.merge("cubs")(x.double()))
    tree_map(torch.testing.assert_close, model(x.double(), tasks=["cubs"] * 4), model.merge("cubs")(x.double()))


def test_samples_apart_are_not_refused():
    x = torch.randn(4, 3).double()
    assert_rows_as_separate(adapt(Spectral(meets=False)), x, ROWS)

    class Reduces(MixesAtTheEnd):
        def forward(self, x):
            return super().forward(x)[:3]

    model = adapt(Reduces())
    model.probe(torch.randn(3, 4).double())
    model(torch.randn(4, 4).double(), tasks=ROWS)  # a loss, and similarities: they are of the batch
    assert model.slicing.output_axes is None


def by_their_batch(in_head):
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU(), nn.Conv2d(8, 8, 3)]
    norm = nn.BatchNorm1d(8, affine=False, track_running_stats=False)
    last = [nn.Sequential(norm, nn.Linear(8, 4))] if in_head else [norm, nn.Linear(8, 4)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *last)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("in_head", [False, True])
def test_norms_by_their_batch_have_each_tasks_own_rows(in_head, training):
    x, rows = torch.randn(7, 3, 9, 9).double(), [*ROWS, "cubs", None, "cubs"]
    for slice in ("auto", 2):
        model = adapt(by_their_batch(in_head), head="6" if in_head else "7", slice=slice).train(training)
        assert_rows_as_separate(model, x, rows)
    if not training:
        model.prepare_inference(x)
        assert_rows_as_separate(model, x, rows)
    assert "forward" not in vars(model.model[1].base)


def test_norms_by_their_batch_that_all_share_are_refused():
    model = adapt(by_their_batch(in_head=False), exclude="1")
    with pytest.raises(ValueError, match="samples must not change each other .* another's: 3 shows it"):
        model(torch.randn(4, 3, 9, 9).double(), tasks=ROWS)


def test_random_numbers_are_no_influence():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x + torch.randn_like(x)) * torch.rand(())

    model = adapt(Noisy())
    model.probe(torch.randn(4, 3, 4).double())
    assert model.meeting is None and model.slicing.output_axes == [0]


def test_inputs_whose_batch_axis_cannot_be_told():
    model = adapt(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match=r"got \(4, 4\) with 2 axes of size 4 \(call model.probe\(..., batch_dim"):
        model(torch.randn(4, 4, dtype=torch.float64), tasks=ROWS)
    with pytest.raises(ValueError, match="one id a sample, got 3 ids and no input with an axis of this size"):
        model(torch.randn(5, 4, dtype=torch.float64), tasks=["cubs"] * 3)
    with pytest.raises(ValueError, match="the input must hold a tensor, got none"):
        model.probe(3)
    x = torch.randn(4, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"the input must hold a sample, got \(0, 4\)"):
        model.probe(x[:0])
    model.probe(x)
    assert_rows_as_separate(model, x, ROWS)


def test_a_model_that_cannot_take_one_sample():
    class Pairs(nn.Linear):
        def forward(self, x):
            return super().forward(x.view(-1, 2, 4))

    with pytest.raises(ValueError, match="must run on one and on two samples of its input, got RuntimeError"):
        adapt(nn.Sequential(Pairs(4, 4))).probe(torch.randn(6, 4).double())
