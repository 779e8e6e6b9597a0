"""What a network does in training mode alone: it neither moves the base nor gives a sample another's task."""

from __future__ import annotations

import copy
import pickle
import random
import warnings

import pytest
import torch
from nets import ConvNet, images, three_tasks
from torch import nn
from torch.nn import functional as F

from taps_fast import TapsModel

MIXED = ["cubs", "cars", "cubs", None]


class Centre(nn.Module):
    """Moves a buffer by what it sees in training, as codebooks and observers do."""

    def __init__(self, how="in place"):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4), persistent=how != "lost")
        self.drop, self.how = nn.Dropout(), how

    def forward(self, x):
        if self.training or self.how == "always":
            mean = self.mean.lerp(x.detach().mean(0), 0.1)
            if self.how == "replaced":
                self.mean = mean
            else:
                self.mean.data.copy_(mean)
        return self.drop(x - self.mean)


def centred(how="in place", head="2"):
    return nn.Sequential(nn.Linear(5, 4), Centre(how), nn.Linear(4, 3)), {"head": head}


@pytest.mark.parametrize("tasks", ["cubs", MIXED])
@pytest.mark.parametrize("how", ["in place", "replaced", "lost"])
def test_training_moves_no_buffer_of_the_base(how, tasks, tmp_path):
    net, options = centred(how)
    model = TapsModel(net, ["cubs", "cars"], **options)
    x, fingerprint = torch.randn(4, 5), model.fingerprint()
    before = model.eval()(x, tasks="cars")
    model.train()
    with pytest.warns(UserWarning, match=r"1 \(Centre\) must leave .* moves mean in training; from now on it runs in"):
        model(x, tasks=tasks)
    assert model.meeting_in_training is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.train()
        for _ in range(2):
            model(x, tasks=tasks).sum().backward()
        assert model.model[1].drop.training and not model.model[1].training
        assert torch.equal(model.eval()(x, tasks="cars"), before) and model.fingerprint() == fingerprint
        model.save_task("cubs", tmp_path / "cubs")
    TapsModel(net, **options).load_task(tmp_path / "cubs")
    reason = next(row.reason for row in model.conversion.rows if row.path == "1")
    assert reason == "Centre is not adapted: shared and frozen, in eval mode: training would move mean"
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not twin.train().model[1].training
    assert model.train().merge("cubs")[1].training


def test_a_buffer_that_moves_in_every_mode_is_said(tmp_path):
    net, options = centred("always")
    model = TapsModel(net, ["cubs"], **options).train()
    with pytest.warns(UserWarning, match=r"1 \(Centre\) .* moves mean in each forward, in eval mode too"):
        model(torch.randn(4, 5))
    with pytest.warns(UserWarning, match=r"save_task: the base must be as it was given .* moved since: 1.mean \("):
        model.save_task("cubs", tmp_path)
    with pytest.raises(ValueError, match="must be of this model's base"):
        TapsModel(net, **options).load_task(tmp_path)
    twin = TapsModel(net, ["cubs"], **options)
    twin.load_state_dict(model.state_dict())
    twin.load_task(tmp_path, name="again")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twin.save_task("cubs", tmp_path)  # over what it was given last
        twin.half().save_task("cubs", tmp_path)


def test_a_network_without_such_buffers_runs_once():
    model, calls = three_tasks(ConvNet()).train(), []
    model.model.fc.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    model(images(4), tasks="cubs")
    assert calls == [True]


def test_the_first_forward_in_training_draws_its_own_random_numbers():
    net = nn.Sequential(nn.Linear(5, 4), Centre(), nn.Dropout())
    model, x = TapsModel(net, ["cubs"]).train(), torch.randn(4, 5)
    model(x)
    torch.manual_seed(0)
    want = model(x)
    model = TapsModel(net, ["cubs"]).train()
    torch.manual_seed(0)
    assert torch.equal(model(x), want)


class Shuffles(nn.Module):
    """MoCo's: samples go through a part in another order, and come back in their own."""

    def __init__(self, how):
        super().__init__()
        self.first, self.second, self.how = nn.Linear(5, 4), nn.Linear(4, 4), how

    def forward(self, x):
        y = self.first(x)
        if not self.training:
            return self.second(y)
        order = {"random": torch.randperm, "turned": lambda n: torch.arange(n).flip(0)}.get(self.how)
        if order is not None:
            order = order(len(y))
            return self.second(y[order])[order.argsort()]
        if self.how == "apart":
            return self.second(F.dropout(y)) * torch.rand(len(y), 1)
        if self.how == "foreign numbers":
            return self.second(y * random.random())
        return self.second(y - y.mean(0)) if self.how == "mean" else self.second(y)[torch.randperm(len(y))]


@pytest.mark.parametrize(
    ("how", "where"), [("random", "second"), ("turned", "second"), ("mean", "second"), ("at the end", "its output")]
)
def test_samples_that_change_places_in_training_are_refused_there(how, where):
    x = torch.randn(4, 5)
    model = TapsModel(Shuffles(how), ["cubs", "cars"])
    model.eval()(x, tasks=MIXED)
    with pytest.raises(ValueError, match=f"or take each other's places, in training mode: {where} shows it"):
        model.train()(x, tasks=MIXED)
    model(x, tasks="cubs")
    model(x, tasks=["cars"] * 4)
    model.eval()(x, tasks=MIXED)


@pytest.mark.parametrize("how", ["apart", "foreign numbers"])
def test_random_numbers_of_training_are_no_reason(how):
    model = TapsModel(Shuffles(how), ["cubs", "cars"]).train()
    model(torch.randn(4, 5), tasks=MIXED)
    assert model.looked and model.meeting_in_training is None


def test_a_network_that_cannot_be_looked_at_in_training():
    class Fours(nn.Linear):
        def forward(self, x):
            assert not self.training or len(x) == 4
            return super().forward(x)

    model = TapsModel(nn.Sequential(Fours(5, 4)), ["cubs", "cars"]).train()
    with pytest.warns(UserWarning, match="cannot be run on 8 samples to see it: AssertionError"):
        model(torch.randn(4, 5), tasks=MIXED)
