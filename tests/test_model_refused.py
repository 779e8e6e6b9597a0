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
