"""A prepared model outside its forwards: what it saves, what it refuses, and a preparation that fails."""

from __future__ import annotations

import pytest
import torch
from nets import perturb
from torch import nn

from taps_fast import TapsModel


class Twice(nn.Module):
    """One layer under two names."""

    def __init__(self):
        super().__init__()
        self.a = self.b = nn.Linear(4, 4)

    def forward(self, x):
        return self.b(self.a(x).relu())


@pytest.mark.parametrize("net", [Twice(), nn.Linear(4, 4)], ids=["a layer under two names", "a layer as the model"])
def test_state_dict(net):
    model = perturb(TapsModel(net, ["dogs", "cubs"])).eval()
    model.reopen("cubs")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    part = {key: value.clone() for key, value in model.model.state_dict().items()}
    model.prepare_inference()
    assert model.conversion.layers[next(iter(model.conversion.layers))].baked
    for state, want in ((model.state_dict(), before), (model.model.state_dict(), part)):
        assert state.keys() == want.keys() and all(torch.equal(state[key], want[key]) for key in want)
