"""Inputs that are objects, which forwards change: caches of keys and values."""

from __future__ import annotations

import pytest
import torch
from nets import perturb
from torch import nn

from taps_fast import TapsModel


class Cache:
    """As DynamicCache of transformers: grows along axis 1 with each forward."""

    def __init__(self):
        self.keys = None

    def update(self, keys):
        self.keys = keys if self.keys is None else torch.cat([self.keys, keys], 1)
        return self.keys


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.keys, self.out = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, cache):
        return self.out(x + cache.update(self.keys(x)).mean(1, keepdim=True))


@pytest.mark.parametrize("slice", [None, 1])
def test_a_cache_holds_what_the_callers_forwards_put_into_it(slice):
    torch.manual_seed(0)
    model = perturb(TapsModel(Decoder().double().eval(), ["cubs", "cars"], slice=slice), closed=())
    for layer in model.conversion.layers.values():
        for score in layer.scores.values():
            score.data.fill_(0.2)
    rows, cache = ["cars", "cubs", None, "cars", "cubs"], Cache()
    alone = [Cache() for _ in rows]
    for length in (3, 1):
        x = torch.randn(5, length, 4).double()
        y = model(x, cache, tasks=rows)
        for i, task in enumerate(rows):
            torch.testing.assert_close(y[i : i + 1], model.merge(task or "base")(x[i : i + 1], alone[i]))
    torch.testing.assert_close(cache.keys, torch.cat([own.keys for own in alone]))
