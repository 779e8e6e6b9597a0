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
from taps_fast.formats import MaskBits


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


def test_a_state_dict_of_the_network_within_changes_it_alone():
    net = tied()
    before = copy.deepcopy(net.state_dict())
    model = TapsModel(net, ["cubs"], head="4")
    for loaded in (model, copy.deepcopy(model)):
        loaded.model.load_state_dict(TapsModel(tied(), ["cubs"], head="4").model.state_dict())
        assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
        assert not torch.equal(loaded.model[3].base, net[3].weight)
        assert not loaded.merge("cubs")._load_state_dict_pre_hooks  # nothing of taps_fast


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


def varied(net, compressed=True):
    """Tasks with dense deltas, without storage behind some gates, and with compressed ones."""
    model = three_tasks(net)
    paths = list(model.conversion.layers)
    layers = model.conversion.layers
    layers[paths[0]].close("cubs")
    layers[paths[1]].close("cars")
    if compressed:
        for score in (layer.scores["cars"] for layer in layers.values()):
            score.data.fill_(0.2)
        model.compress("cars", "bits")
        model.compress("dogs", "lowrank", rank=1)
        layer = layers[paths[2]]
        mask, tile = layer.base > 0, torch.randn_like(layer.base)
        for task in ("cubs", "cars"):
            layer.set_delta(task, MaskBits.from_mask(mask, tile))
    return model


@pytest.mark.parametrize("there", ["new", "varied", "compressed"])
@pytest.mark.parametrize("kind", ["dense", "compressed"])
def test_a_state_dict_restores_whatever_storage_tasks_have(kind, there):
    net = Transformer()
    model = varied(net, kind == "compressed")
    state = model.state_dict()
    other = three_tasks(net) if there == "new" else varied(net, there == "compressed")
    held = dict(other.named_parameters())
    for parameter in other.parameters():
        parameter.data = parameter.data + parameter.requires_grad
    other.load_state_dict(state)
    x, rows = images(4), ["cubs", "cars", None, "dogs"]
    assert torch.equal(other(x, tasks=rows), model(x, tasks=rows)) and other.sharing() == model.sharing()
    assert {k: v.dtype for k, v in other.state_dict().items()} == {k: v.dtype for k, v in state.items()}
    assert all(
        p.requires_grad == dict(model.named_parameters())[name].requires_grad for name, p in other.named_parameters()
    )
    if (kind, there) in (("dense", "new"), ("dense", "varied"), ("compressed", "compressed")):  # kept where it fits
        assert all(p is held[name] for name, p in other.named_parameters())
    own = {p.data_ptr() for p in model.parameters() if p.requires_grad}
    assert not own & {p.data_ptr() for p in other.parameters()}
    masks = [
        d
        for d in (
            layer.deltas[t] for layer in other.conversion.layers.values() for t in ("cubs", "cars") if t in layer.deltas
        )
        if getattr(d, "kind", None) is MaskBits
    ]
    assert len(masks) == 2 * (kind == "compressed") and len({id(d.tile) for d in masks}) == (kind == "compressed")
    assert all(d.tile.data_ptr() != e.data_ptr() for d in masks for e in state.values())
    other.half().load_state_dict(state)
    other.load_state_dict(varied(net, False).state_dict())


@pytest.mark.parametrize("lacks", [".deltas.cubs", ".bias_deltas.cubs", ".scores.cubs"])
def test_a_state_dict_that_lacks_a_task_or_a_part_of_it_is_refused(lacks):
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    model, other = TapsModel(net, ["cubs"]), TapsModel(net, ["cars"])
    with pytest.raises(RuntimeError, match=r'Missing key\(s\).*"model.0.deltas.cubs"'):
        model.load_state_dict({k: v for k, v in other.state_dict().items() if "cars" not in k})
    state = {k: v for k, v in model.state_dict().items() if not k.endswith(lacks)}
    with pytest.raises(RuntimeError, match=f'Missing key.*"model.0{lacks}"'):
        model.load_state_dict(state)
    layer = model.conversion.layers["1"]
    with pytest.raises(RuntimeError, match="Unexpected key.*model.1.deltas.cubs.codes"):
        model.load_state_dict(
            {**other.state_dict(), "model.1.scores.cubs": layer.scores["cubs"], "model.1.deltas.cubs.codes": layer.base}
        )


def test_a_state_dict_before_its_tasks_says_what_to_call():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    state = TapsModel(net, ["cubs", "cars"], head="1").state_dict()
    model = TapsModel(net, ["cars"], head="1")
    text = r"got cubs \(call add_task for each task first; tasks: cars\).*Unexpected key"
    with pytest.raises(RuntimeError, match=f"(?s)^TapsModel.load_state_dict: state_dict must hold no task .*{text}"):
        model.load_state_dict(state)
    assert model.load_state_dict(state, strict=False).unexpected_keys
    model.add_task("cubs")
    model.load_state_dict(state)


def test_scores_alone_leave_deltas_as_they_are():
    model = three_tasks(Transformer())
    before = copy.deepcopy(model.state_dict())
    model.load_state_dict({name: value for name, value in before.items() if ".scores." in name}, strict=False)
    assert list(model.state_dict()) == list(before)
