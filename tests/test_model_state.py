"""State dicts, copies and wrapped parts of a model: what belongs to the network that was adapted stays as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from nets import ConvNet, Transformer, images, three_tasks
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils.parametrizations import orthogonal
from torch.optim.swa_utils import AveragedModel

from taps_fast import TapsModel


@pytest.mark.parametrize("wrap", [torch.compile, checkpoint_wrapper])
def test_tasks_of_a_model_with_a_wrapped_part_load_elsewhere(wrap, tmp_path):
    net = Transformer()
    model, other = three_tasks(net), TapsModel(net, head="fc")
    model.model.block = wrap(model.model.block)
    model.model.norm = wrap(model.model.norm)
    assert model.fingerprint() == other.fingerprint()
    model.save_task("cubs", tmp_path)
    other.load_task(tmp_path)
    if wrap is checkpoint_wrapper:
        x = images(2)
        assert torch.equal(other(x, tasks="cubs"), model(x, tasks="cubs"))


def test_a_model_whose_head_is_parametrized_can_be_copied():
    net = nn.Sequential(nn.Linear(4, 4), orthogonal(nn.Linear(4, 4)))
    model = TapsModel(net, ["cubs", "cars"], head="1")
    twin = copy.deepcopy(model)
    assert type(twin.model[1]) is type(model.model[1])
    x = torch.randn(3, 4)
    assert torch.equal(twin(x, tasks=[0, 1, None]), model(x, tasks=[0, 1, None]))
    AveragedModel(model).update_parameters(model)


def tied():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4), ScaledLinear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    return net.eval()


class ScaledLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("ordinary", [False, True])
def test_a_state_dict_changes_this_model_alone(assign, ordinary):
    net = tied()
    before = copy.deepcopy(net.state_dict())
    model, other = TapsModel(net, ["cubs"], head="4"), TapsModel(net, ["cars"], head="4")
    x = torch.randn(3, 4)
    want = other(x, tasks="cars")
    torch.manual_seed(1)
    source = TapsModel(tied(), ["cubs"], head="4")
    state = source.state_dict()
    if ordinary:
        state["model.3.weight"], state["model.3.bias"] = (
            state.pop("model.3.module.weight"),
            state["model.3.module.bias"],
        )
    nn.ModuleDict({"inner": model}).load_state_dict({f"inner.{k}": v for k, v in state.items()}, assign=assign)
    assert torch.equal(model(x), source(x)) and torch.equal(model(x, tasks="base"), source(x, tasks="base"))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert torch.equal(other(x, tasks="cars"), want)
    if not assign:
        assert model.model[0].weight is model.model[1].weight


def test_a_state_dict_of_the_same_base_costs_no_memory():
    net = tied()
    model = TapsModel(net, ["cubs"], head="4")
    model.load_state_dict(copy.deepcopy(TapsModel(net, ["cubs"], head="4").state_dict()))
    assert model.model[0].weight.data_ptr() == net[0].weight.data_ptr()
    assert model.model[3].base.data_ptr() == net[3].weight.data_ptr()
    model.load_state_dict({**model.state_dict(), "model.3.module.weight": torch.ones(4, 4)})
    assert model.model[3].base.data_ptr() != net[3].weight.data_ptr() and (model.model[3].base == 1).all()
    assert model.model[0].weight.data_ptr() == net[0].weight.data_ptr()


def test_a_base_that_trains_is_in_storage_of_its_own():
    net = ConvNet()
    before, given = copy.deepcopy(net.state_dict()), TapsModel(net, head="fc").fingerprint()
    model = TapsModel(net, ["cubs"], head="fc").requires_grad_(True)
    assert model.fingerprint() == given and all(p.requires_grad for p in model.parameters())
    held = [p.data_ptr() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.requires_grad_().parameters(), lr=0.1)
    assert [p.data_ptr() for p in model.parameters()] == held
    model(images(4, dtype=torch.float32)).sum().backward()
    optimizer.step()
    assert model.fingerprint() != given
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
    assert not any(p.requires_grad for p in model.requires_grad_(False).parameters())
