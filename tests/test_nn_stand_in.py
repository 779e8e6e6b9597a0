"""Adapted layers where code takes them for ordinary ones: types, attributes, and what is written to them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from nets import PadConv2d, assert_rows_as_separate, perturb
from torch import nn

from taps_fast import FastTapsConv2d, FastTapsLinear, TapsModel
from taps_fast.formats import SignBits


class Asks(nn.Module):
    """Does something else with each layer that it does not know by its type, as transformers' Parakeet."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 4, 3), PadConv2d(4, 4, 3), nn.Conv2d(4, 4, 1)])
        self.attention, self.fc = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 4)

    def forward(self, x):
        for conv in self.convs:
            x = conv(x) if isinstance(conv, nn.Conv2d) and conv.transposed is False else x
            x = x * (sum(conv.kernel_size) + conv.stride[0] + conv.dilation[1])
        x = x.flatten(2).transpose(1, 2)
        if isinstance(self.attention, nn.MultiheadAttention) and self.attention.head_dim == 2:
            x = self.attention(x, x, x, need_weights=False)[0]
        return self.fc(x) if isinstance(self.fc, nn.Linear) and self.fc.in_features == 4 else x


def test_a_network_that_asks_for_types_is_the_original():
    torch.manual_seed(0)
    net = Asks().double().eval()
    model, x = perturb(TapsModel(net, ["cubs", "cars"])), torch.randn(3, 3, 6, 6).double()
    torch.testing.assert_close(model(x, tasks="base"), net(x))
    assert_rows_as_separate(model, x, ["cubs", None, "cars"])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x, tasks="cubs"), model(x, tasks="cubs"))
        twin.load_state_dict(model.state_dict())
    assert [type(m) for m in model.merge("cubs").modules()] == [type(m) for m in net.modules()]
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, tasks="cubs"), model(x, tasks="cubs"))
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert [type(m) for m in model.float().model.convs] == [type(m) for m in twin.model.convs]


class Extras(nn.Module):
    """Layers with more than theirs: attributes, one of which refers to the network, a buffer, a child, a parameter."""

    def __init__(self):
        super().__init__()
        self.said, self.masked, self.conv = nn.Linear(4, 4), nn.Linear(4, 4), nn.Conv2d(1, 4, (1, 4))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.factor = 2.0
        self.said.scale, self.said.of, self.attention.scale = 3.0, [self], 5.0
        self.masked.register_buffer("mask", torch.tensor([1.0, 0.0, 2.0, 0.5]))
        self.conv.after, self.conv.gain = nn.Linear(4, 4), nn.Parameter(torch.full((4,), 2.0))

    def forward(self, x):
        x = self.said(x) * getattr(self.said, "scale", 1.0)
        x = self.masked(x) * getattr(self.masked, "mask", 1.0)
        x = self.conv(x[:, None, None])[..., 0, 0] * getattr(self.conv, "gain", 1.0)
        x = self.conv.after(x) if hasattr(self.conv, "after") else x
        x = self.attention(x[:, None], x[:, None], x[:, None])[0][:, 0] * getattr(self.attention, "scale", 1.0)
        return x * self.said.of[0].factor


def test_what_was_set_on_a_layer_stays():
    torch.manual_seed(0)
    net = Extras().eval()
    with torch.no_grad():
        net.said.last = net.said(torch.ones(4)).requires_grad_() * 2  # has a graph, which deepcopy refuses
    model, x = perturb(TapsModel(net, ["cubs", "cars"])), torch.randn(3, 4)
    model.model.factor = 6.0
    torch.testing.assert_close(model(x, tasks="base"), net(x) * 3)
    assert type(model.model.said) is FastTapsLinear and model.model.said.of[0] is model.model
    assert {row.verdict for row in model.conversion.rows} == {"converted"}
    assert_rows_as_separate(model, x, ["cubs", None, "cars"])
    plain = model.merge("cubs")
    assert [type(m) for m in plain.modules()] == [type(m) for m in net.modules()]
    assert plain.said.of[0] is plain and plain.said.scale == 3.0 and plain.attention.scale == 5.0
    torch.testing.assert_close(model(x, tasks="cubs"), plain(x))
    fingerprint = model.fingerprint()
    model.model.masked.mask[0] = 7.0
    assert model.fingerprint() != fingerprint and model.model.masked.module.mask[0] == 7.0


def test_a_name_that_adapted_layers_use_is_refused():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[0].path = "somewhere"
    model = TapsModel(net, ["cubs"])
    assert list(model.conversion.layers) == ["1"] and model.model[0].path == "somewhere"
    assert "given the attribute 'path', a name that adapted layers use" in model.conversion.of("refused")[0].reason


def test_attention_with_more_than_its_own_is_refused():
    for holder in ("attention", "out_proj"):
        attention = nn.MultiheadAttention(4, 2)
        (attention if holder == "attention" else attention.out_proj).register_buffer("mask", torch.ones(4))
        rows = TapsModel(nn.Sequential(attention), ["cubs"]).conversion.rows
        assert [row.verdict for row in rows] == ["refused"] and "cannot be rewritten: it" in rows[0].reason


def test_methods_of_a_subclass_are_not_the_wrapped_layers():
    """They would use the base's weight."""

    class Own(nn.Linear):
        def doubled(self, x):
            return F.linear(x, self.weight * 2)

    model = TapsModel(nn.Sequential(Own(4, 4)), ["cubs"])
    assert model.model[0].out_features == 4
    with pytest.raises(AttributeError, match="doubled"):
        model.model[0].doubled(torch.ones(4))


LAYERS = {
    "linear": lambda: FastTapsLinear(4, 6, tasks=["cubs"]),
    "conv": lambda: FastTapsConv2d(4, 6, 3, tasks=["cubs"]),
    "wrapped": lambda: TapsModel(nn.Sequential(PadConv2d(4, 6, 3)), ["cubs"]).model[0],
    "no bias": lambda: FastTapsLinear(4, 6, bias=False, tasks=["cubs"]),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_weight_is_not_assigned(name):
    layer = LAYERS[name]()
    state = copy.deepcopy(layer.state_dict())
    for value in (nn.Parameter(torch.zeros(6, 4)), torch.zeros(6, 4), None):
        with pytest.raises(AttributeError, match=r"weight must not be assigned.*it is base plus a task's delta"):
            layer.weight = value
        with pytest.raises(AttributeError, match=r"bias must not be assigned.*write to base_bias with"):
            layer.bias = value
    with pytest.raises(AttributeError, match="weight must not be assigned"):
        layer.register_parameter("weight", None)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), layer.state_dict().values(), strict=True))
    with torch.no_grad():
        layer.base.zero_()
    assert not layer.merged(None).weight.any()


@pytest.mark.parametrize("name", LAYERS)
def test_reset_parameters_starts_anew(name):
    """As the ordinary layer would from the same random numbers, and not in the storage of the one that was adapted."""
    layer = LAYERS[name]()
    ordinary = layer.merged(None)
    before = layer.base.detach()
    kept = before.clone()
    layer.add_tasks(["bits"]) if layer.context.alone else layer.add_task("bits")
    for task in ("cubs", "bits"):
        layer.deltas[task].data.normal_()
        layer.scores[task].data.fill_(-1.0)
    layer.set_delta("bits", SignBits.from_dense(layer.delta("bits")))
    held = layer.deltas["cubs"]
    torch.manual_seed(3)
    ordinary.reset_parameters()
    torch.manual_seed(3)
    layer.reset_parameters()
    assert torch.equal(layer.base, ordinary.weight) and torch.equal(before, kept) and not layer.base.requires_grad
    assert layer.base_bias is None or torch.equal(layer.base_bias, ordinary.bias)
    assert layer.deltas["cubs"] is held and all(not delta.any() for delta in layer.deltas.values())
    assert all(layer.is_open(task) for task in ("cubs", "bits"))


def test_layers_show_scores_and_gates():
    layer = FastTapsLinear(4, 2, tasks=["cubs", "cars"])
    layer.scores["cars"].data.fill_(0.025)
    text = repr(layer)
    assert "4, 2, bias=True, tasks=[cubs open, cars closed]" in text
    assert "(cubs): 0.15\n" in text and "(cars): 0.025\n" in text
    text = repr(layer.to("meta"))
    assert "tasks=[cubs, cars]" in text and "(cubs): ?\n" in text
