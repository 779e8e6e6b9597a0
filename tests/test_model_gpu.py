"""A TapsModel on a CUDA device: what it gives, learns and prepares is what it does on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from nets import TASKS, ConvNet, Transformer, images, three_tasks

from taps_fast import TapsModel

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
NETS = {"conv": ConvNet, "transformer": Transformer}
ROWS = ["cars", "cubs", None, "dogs", "cars", "cubs"]


def pair(name: str, compressed: str | None = None) -> tuple[TapsModel, TapsModel]:
    """The same model on both devices."""
    model = three_tasks(NETS[name](), dtype=torch.float32)
    model.probe(images(2, dtype=torch.float32))
    if compressed:
        for task in TASKS:
            model.compress(task, compressed)
    return model, copy.deepcopy(model).to(DEVICE)


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-3, atol=1e-4)


@pytest.fixture(autouse=True)
def exact():
    """The vendor's convolutions in float32, not in tf32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("training", (False, True))
@pytest.mark.parametrize("name", NETS)
def test_a_mixed_step(name, training):
    """Logits, every gradient, and in training the statistics of the tasks' batch norms."""
    results = []
    x = images(len(ROWS), dtype=torch.float32)
    for model in pair(name):
        model.train(training)
        y = model(x.to(next(model.parameters()).device), tasks=ROWS)
        y.masked_fill(y.isinf(), 0).square().sum().backward()
        results.append((y, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, model.state_dict()))
    (expected, gradients, state), (y, found, moved) = results
    close(y, expected)
    assert found.keys() == gradients.keys() and len(found) > 10
    for n, gradient in gradients.items():
        close(found[n], gradient)
    for n, value in state.items():
        close(moved[n], value)


@pytest.mark.parametrize("name", NETS)
def test_one_task_merged_and_prepared(name):
    here, there = pair(name)
    x = images(len(ROWS), dtype=torch.float32)
    with torch.no_grad():
        for task in TASKS:
            close(there(x.to(DEVICE), tasks=task), here(x, tasks=task))
            close(there.merge(task)(x.to(DEVICE)), here.merge(task)(x))
        there.prepare_inference()
        close(there(x.to(DEVICE), tasks=ROWS), here(x, tasks=ROWS))


@pytest.mark.parametrize("format", ("bits", "int8"))
def test_compressed(format):
    here, there = pair("transformer", format)
    x = images(len(ROWS), dtype=torch.float32)
    with torch.no_grad():
        close(there(x.to(DEVICE), tasks=ROWS), here(x, tasks=ROWS))


@pytest.mark.parametrize("prepared", (False, True))
@pytest.mark.parametrize("name", NETS)
def test_captured_by_hand(name, prepared):
    """A graph of the whole model, replayed with other ids of as many samples."""
    torch.use_deterministic_algorithms(False)
    here, there = pair(name)
    if prepared:
        there.prepare_inference()
    x = images(len(ROWS), dtype=torch.float32)
    on_device, ids = x.to(DEVICE), torch.zeros(len(ROWS), dtype=torch.int64, device=DEVICE)
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                there(on_device, tasks=ids)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = there(on_device, tasks=ids)
        for mix in ([0, 1, -1, 2, 0, 1], [2, 2, 1, 0, -1, 0]):
            ids.copy_(torch.tensor(mix))
            graph.replay()
            close(y, here(x, tasks=torch.tensor(mix)))


@pytest.mark.parametrize("name", NETS)
def test_compiled_into_cuda_graphs(name):
    """The compiler's own graphs, replayed with other mixes of the same size."""
    here, there = pair(name)
    compiled = torch.compile(there, mode="reduce-overhead")
    x = images(len(ROWS), dtype=torch.float32)
    with torch.no_grad():
        for mix in ([0, 1, -1, 2, 0, 1], [2, 2, 1, 0, -1, 0], [0, 0, 0, 0, 0, 0]):
            ids = torch.tensor(mix)
            for _ in range(3):  # it warms up, records, and replays
                y = compiled(x.to(DEVICE), tasks=ids.to(DEVICE))
            close(y, here(x, tasks=ids))


def test_trained_in_cuda_graphs():
    """Mixed batches through the compiler's own graphs, forward and backward, with other mixes of the same size."""
    torch.use_deterministic_algorithms(False)
    here, there = pair("transformer")
    compiled = torch.compile(there.train(), mode="reduce-overhead")
    here.train()
    x = images(len(ROWS), dtype=torch.float32)
    for mix in ([0, 1, -1, 2, 0, 1], [2, 2, 1, 0, -1, 0], [0, 0, 0, 0, 0, 0], [0, 1, 2, -1, 1, 0]):
        ids = torch.tensor(mix)
        for model, run in ((here, here), (there, compiled)):
            model.zero_grad()
            torch.compiler.cudagraph_mark_step_begin()
            device = next(model.parameters()).device
            run(x.to(device), tasks=ids.to(device)).nan_to_num(neginf=0).square().sum().backward()
        for (name, p), q in zip(here.named_parameters(), there.parameters(), strict=True):
            if p.grad is not None:
                assert q.grad is not None, name
                close(q.grad, p.grad)
