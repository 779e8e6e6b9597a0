"""`prepare_inference` while other threads run models."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from taps_fast import TapsModel, _regions


class Meanwhile(nn.Module):
    """Another thread does something while this runs, or is traced."""

    def __init__(self, other):
        super().__init__()
        self.conv, self.norm, self.other = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), [other]

    def forward(self, x):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(self.other[0]).result()
        return self.norm(self.conv(x)).relu()


def prepared(other):
    model = TapsModel(Meanwhile(other), ["cubs", "cars"]).eval()
    report = model.prepare_inference(torch.randn(2, 3, 4, 4))
    assert [row.path for row in report.of("folded")] == ["conv"]


def test_models_of_other_threads_run_while_one_is_traced():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    net.register_parameter("scale", nn.Parameter(torch.tensor(2.0)))
    x = torch.randn(2, 3)
    want = net(x) * net.scale

    def run():
        y = net(x) * net.scale
        assert type(y) is torch.Tensor and torch.equal(y, want)

    prepared(run)


def test_models_are_traced_one_after_the_other():
    call = nn.Module.__call__
    models = [TapsModel(Meanwhile(lambda: None), ["cubs"]).eval() for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        reports = list(pool.map(lambda model: model.prepare_inference(torch.randn(2, 3, 4, 4)), models))
    assert nn.Module.__call__ is call and all(len(report.of("folded")) == 1 for report in reports)


@pytest.mark.parametrize("same", [True, False])
def test_no_thread_runs_a_graph_that_has_not_been_compared(same, monkeypatch):
    model = TapsModel(Meanwhile(lambda: None), ["cubs"]).eval()
    report, seen = model.prepare_inference(), []

    def agree(want, found):
        seen.extend(region.verified for region in report.regions)
        return same

    monkeypatch.setattr(_regions, "_agree", agree)
    with torch.no_grad(), ThreadPoolExecutor(1) if same else pytest.warns(UserWarning, match="is left as it is"):
        model(torch.randn(2, 3, 4, 4))
    assert seen == [False] and report.regions[0].verified and (report.regions[0].gave_up is None) == same
