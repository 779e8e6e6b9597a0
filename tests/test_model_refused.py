"""What the probe refused runs in no mixed batch, whatever the type of the layer says of its input."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from taps_fast import TapsModel


class Turned(nn.Module):
    """Images in the opposite order."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.flip(0)).flip(0)


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.GroupNorm(2, 4)])
def test_what_the_probe_refused_does_not_go_by_its_type(layer):
    model = TapsModel(Turned(layer).eval(), ["cubs", "cars"])
    x = torch.randn(4, 4, 3, 3)
    model.probe(x)
    with pytest.raises(ValueError, match="layer: the batch axis .* must be known .*the probe could not tell"):
        model(x, tasks=["cubs", "cars", "cubs", None])


class Sorts(nn.Module):
    """Works on its rows in an order that depends on what they hold, as by their length, and puts them back."""

    def __init__(self, descending, each):
        super().__init__()
        self.first, self.layer, self.descending, self.each = nn.Linear(4, 4), nn.Linear(4, 4), descending, each

    def forward(self, x):
        order = x.sum((1, 2)).argsort(descending=self.descending)
        y = self.first(x)[order]
        y = self.layer(y.flatten(0, 1)).view_as(y) if self.each else self.layer(y)
        return y[order.argsort()]


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("descending", [False, True])
def test_rows_in_an_order_that_depends_on_the_samples_are_refused(descending, each):
    torch.manual_seed(0)
    model = TapsModel(Sorts(descending, each).eval(), ["cubs", "cars"])
    x = torch.randn(5, 3, 4)
    with pytest.raises(ValueError, match="layer: the batch axis .*the samples' rows in an order that depends on them"):
        model(x, tasks=["cubs", "cars", "cubs", None, "cars"])
    assert not model.conversion.layers["first"].refusal
    torch.testing.assert_close(model(x, tasks="cubs"), model.merge("cubs")(x))
    apart = TapsModel(Sorts(descending, each).eval(), ["cubs", "cars"], exclude="layer")
    assert apart(x, tasks=["cubs", "cars", "cubs", None, "cars"]).shape == x.shape


def test_the_probe_runs_the_base_six_times():
    """As its docstring says."""
    layer = nn.Linear(4, 4)
    model, calls = TapsModel(nn.Sequential(layer)), []
    model.model[0].register_forward_hook(lambda *_: calls.append(1))
    model.probe(torch.randn(5, 4))
    assert len(calls) == 6 and "base six times" in TapsModel.probe.__doc__
