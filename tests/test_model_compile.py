"""torch.compile of a whole model: no graph break, and no recompilation on a new mix of tasks."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from nets import ConvNet, StdConv2d, Transformer, images, three_tasks
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from taps_fast import FastTapsLinear, TapsModel


def attention():
    return nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0))


def compiled(model, backend="aot_eager"):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, fullgraph=True, backend=counter), counter


def inputs(net):
    return torch.randn(6, 5, 8, dtype=torch.float64) if net is attention else images(6)


@pytest.mark.parametrize("net", [ConvNet, Transformer, attention])
@torch.no_grad()
def test_twenty_mixes_one_compilation(net):
    model = three_tasks(net(), head=None if net is attention else "fc")
    x = inputs(net)
    model.probe(x)
    fast, counter = compiled(model)
    for seed in range(20):
        ids = torch.randint(-1, 3, (6,), generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(fast(x, tasks=ids), model(x, tasks=ids))
    assert counter.frame_count == 1 and model.context.active is None
    for task in ("cubs", "cars"):
        torch.testing.assert_close(fast(x, tasks=task), model(x, tasks=task))
    assert counter.frame_count == 3


@pytest.mark.parametrize("net", [ConvNet, Transformer])
def test_training(net):
    """Gradients and running statistics of a compiled mixed training step."""
    model, other = three_tasks(net()), three_tasks(net())
    other.load_state_dict(model.state_dict())
    x = images(8)
    for m in (model, other):
        m.probe(x)
        m.train()
    fast, counter = compiled(model)
    for seed in range(3):
        ids = torch.tensor([0, 0, 1, 1, 2, 2, -1, -1])[torch.randperm(8, generator=torch.Generator().manual_seed(seed))]
        for m in (fast, other):
            m(x, tasks=ids).nan_to_num(neginf=0).square().sum().backward()
    assert counter.frame_count == 1
    for name, p in other.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(model.get_parameter(name).grad, p.grad)
    for name, buffer in other.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), buffer)


@torch.no_grad()
def test_inductor():
    model = three_tasks(nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 7)), head="2")
    x = torch.randn(4, 4, dtype=torch.float64)
    model.probe(x)
    fast, _ = compiled(model, "inductor")
    for ids in (torch.tensor([0, 1, 2, -1]), torch.tensor([2, 2, 0, 1])):
        torch.testing.assert_close(fast(x, tasks=ids), model(x, tasks=ids))


def test_a_layer_alone():
    layer = FastTapsLinear(4, 3, tasks=["cubs", "cars"])
    torch.nn.init.normal_(layer.deltas["cubs"])
    fast, counter = compiled(layer)
    x = torch.randn(5, 4)
    for ids in ([0, 1, -1, 0, 0], [1, 1, 1, 0, -1]):
        torch.testing.assert_close(fast(x, tasks=torch.tensor(ids)), layer(x, tasks=ids))
    assert counter.frame_count == 1


@pytest.mark.parametrize("way", ["bits", "int8", "lowrank"])
@pytest.mark.parametrize("grad", [False, True])
def test_compressed_deltas(way, grad):
    torch.manual_seed(0)
    model = TapsModel(nn.Sequential(nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 3)), ["cubs", "cars"])
    for task, layer in product(model.tasks, model.conversion.layers.values()):
        torch.nn.init.normal_(layer.deltas[task])
    model.compress("cubs", way, rank=1 if way == "lowrank" else None)
    x, ids = torch.randn(6, 36), torch.tensor([0, 1, -1, 0, 0, 1])
    model.probe(x)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(compiled(model)[0](x, tasks=ids), model(x, tasks=ids))
        torch.testing.assert_close(compiled(model)[0](x, tasks="cubs"), model(x, tasks="cubs"))
        layer = model.conversion.layers["0"]
        torch.testing.assert_close(compiled(layer)[0](x, tasks=ids), layer(x, tasks=ids))


def test_without_a_probe_the_error_says_what_to_do():
    fast, _ = compiled(three_tasks(Transformer()))
    with pytest.raises(Exception, match=r"call model.probe\(...\) once with an input like this one"):
        fast(images(3), tasks=torch.tensor([0, 1, 0]))


def test_what_runs_task_by_task_says_so():
    model = three_tasks(ConvNet(StdConv2d))
    x = images(3)
    model.probe(x)
    fast, _ = compiled(model)
    torch.testing.assert_close(fast(x, tasks="cubs"), model(x, tasks="cubs"))
    with pytest.raises(
        Exception, match="conv3: runs a mixed batch task by task, whose sizes torch.compile cannot know"
    ):
        fast(x, tasks=torch.tensor([0, 1, 0]))


def test_ids_out_of_range_are_found_on_the_device():
    model = TapsModel(nn.Conv2d(3, 4, 1), ["cubs"])
    fast, _ = compiled(model)
    with pytest.raises(RuntimeError, match=r"tasks must be ids in \[-1, 1\)"):
        fast(torch.randn(2, 3, 4, 4), tasks=torch.tensor([0, 1]))
