"""Layers that store their weight as [in, out], and networks that ask a weight for its type."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from nets import perturb
from safetensors.torch import save_file
from torch import nn

from taps_fast import TapsModel
from taps_fast.formats import LowRank
from taps_fast.nn import TransposedLinear


class Conv1D(nn.Module):
    """What transformers has under this name, which is all that it is known by."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(nf, dtype=torch.float64))

    def forward(self, x):
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], self.nf)


@pytest.fixture(autouse=True)
def of_transformers(monkeypatch):
    monkeypatch.setattr(Conv1D, "__module__", "transformers.pytorch_utils")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = Conv1D(6, 7)
        self.proj = nn.Linear(6, 3).double()

    def forward(self, x):
        # As vision transformers do before their first convolution.
        return self.proj(torch.relu(self.fc(x)).to(self.proj.weight.dtype))


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.register_forward_hook(lambda module, args, y: y * 2),
        lambda layer: layer.register_buffer("mask", torch.ones(3)),
    ],
)
def test_one_with_hooks_or_buffers_is_refused(change):
    net = nn.Sequential(Conv1D(6, 4))
    change(net[0])
    (row,) = TapsModel(net, ["cubs"]).conversion.rows
    assert row.verdict == "refused" and "a Conv1D with hooks, buffers or children cannot be adapted" in row.reason


def test_what_was_set_on_one_stays():
    net = nn.Sequential(Conv1D(6, 4))
    net[0].scale = 3.0
    model = TapsModel(net, ["cubs"])
    assert type(model.model[0]) is TransposedLinear and (model.model[0].scale, model.model[0].nf) == (3.0, 6)
    assert model.merge("cubs")[0].scale == 3.0


def adapted():
    torch.manual_seed(0)
    model = perturb(TapsModel(Block(), ["cubs", "cars"]))
    model.conversion.layers["fc"].scores["cubs"].data.fill_(0.2)
    return model


def test_each_sample_gets_its_tasks_weight():
    model, x = adapted(), torch.randn(4, 5, 7, dtype=torch.float64)
    assert isinstance(model.conversion.layers["fc"], TransposedLinear)
    assert model.conversion.layers["fc"].deltas["cubs"].shape == (7, 6)
    ids = ["cars", "base", "cubs", "cars"]
    mixed = model(x, tasks=ids)
    for i, task in enumerate(ids):
        torch.testing.assert_close(mixed[i : i + 1], model(x[i : i + 1], tasks=task))
        torch.testing.assert_close(mixed[i : i + 1], model.merge(task)(x[i : i + 1]))


def test_gradients_are_those_of_the_merged_weight():
    model, x = adapted(), torch.randn(3, 7, dtype=torch.float64)
    layer = model.conversion.layers["fc"]
    model(x, tasks="cubs").square().sum().backward()
    plain = model.merge("cubs")
    plain(x).square().sum().backward()
    torch.testing.assert_close(layer.deltas["cubs"].grad, plain.fc.weight.grad)
    torch.testing.assert_close(layer.bias_deltas["cubs"].grad, plain.fc.bias.grad)
    score = (plain.fc.weight.grad * layer.deltas["cubs"]).sum() + (plain.fc.bias.grad * layer.bias_deltas["cubs"]).sum()
    torch.testing.assert_close(layer.scores["cubs"].grad.double(), score.detach())


def test_prepared_and_compressed():
    model, x = adapted().eval(), torch.randn(4, 5, 7, dtype=torch.float64)
    ids = ["cars", "base", "cubs", "cars"]
    before = model(x, tasks=ids)
    model.prepare_inference()
    assert model.conversion.layers["fc"].baked.keys() == {"cubs"}
    torch.testing.assert_close(model(x, tasks=ids), before)
    torch.testing.assert_close(model(x[:1], tasks="cars"), before[:1])
    model.unprepare()
    assert torch.equal(model(x, tasks=ids), before)
    model.compress("cubs", "bits")
    torch.testing.assert_close(model(x, tasks=ids)[2:3], model.merge("cubs")(x[2:3]))
    report = model.prepare_inference()
    assert [row.reason for row in report.of("left") if row.path == "fc"] == ["not baked for cubs: compressed"]
    torch.testing.assert_close(model(x, tasks=ids)[2:3], model.merge("cubs")(x[2:3]))
    torch.testing.assert_close(model(x, tasks=ids)[3:], before[3:])


def test_merge_gives_the_original_type_and_the_model_can_be_copied(tmp_path):
    model, x = adapted(), torch.randn(3, 7, dtype=torch.float64)
    assert type(model.merge("cubs").fc) is Conv1D
    assert torch.equal(copy.deepcopy(model)(x, tasks="cubs"), model(x, tasks="cubs"))
    model.save_task("cubs", tmp_path / "cubs")
    model.load_task(tmp_path / "cubs", name="birds")
    assert torch.equal(model(x, tasks="birds"), model(x, tasks="cubs"))


@pytest.mark.parametrize("into", [6, 7])
def test_an_adapter_of_peft_is_turned_round(tmp_path, into):
    torch.manual_seed(0)
    a, b = torch.randn(2, into, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    tensors = {"base_model.model.0.lora_A.weight": a, "base_model.model.0.lora_B.weight": b}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    net = nn.Sequential(Conv1D(6, into))
    model = TapsModel(net)
    model.load_lora(tmp_path, "cubs")
    x = torch.randn(3, into, dtype=torch.float64)
    torch.testing.assert_close(model(x, tasks="cubs"), net(x) + 2 * x @ a.t() @ b.t())


def test_multiply_adds_are_counted_by_inputs():
    model = adapted()
    model.probe(torch.randn(2, 7, dtype=torch.float64))
    assert model.conversion.layers["fc"].macs == 7 * 6
    assert model.conversion.layers["proj"].macs == 6 * 3


def test_a_weight_in_a_mixed_batch_tells_its_type_to_the_compiler_too():
    model, x = adapted().eval(), torch.randn(3, 7, dtype=torch.float64)
    model.probe(x)
    ids = torch.tensor([1, -1, 0])
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x, tasks=ids), model(x, tasks=ids))


@pytest.mark.parametrize("prepared", [False, True])
def test_low_rank_is_never_made_dense(prepared, monkeypatch):
    torch.manual_seed(0)
    model = perturb(TapsModel(nn.Sequential(Conv1D(80, 64)), ["cubs", "cars"])).eval()
    x, ids = torch.randn(4, 5, 64, dtype=torch.float64), ["cars", "base", "cubs", "cars"]
    for task in ("cubs", "cars"):
        model.conversion.layers["0"].scores[task].data.fill_(0.2)
        model.compress(task, "lowrank", rank=2)
    wanted = torch.cat([model.merge(task)(x[i : i + 1]) for i, task in enumerate(ids)])
    if prepared:
        model.prepare_inference()
    monkeypatch.setattr(LowRank, "dense", lambda *_: pytest.fail("made dense"))
    with torch.no_grad():
        torch.testing.assert_close(model(x, tasks=ids), wanted)
        torch.testing.assert_close(model(x[2:3], tasks="cubs"), wanted[2:3])
    if not prepared:
        y = model(x.requires_grad_(), tasks=ids)
        torch.testing.assert_close(y, wanted)
        y.sum().backward()
