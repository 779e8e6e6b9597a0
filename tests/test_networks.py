"""Whole networks with the published gate patterns: a mixed batch is what separate models are, also in training."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

CHECKOUT = Path(__file__).parents[1]
if str(CHECKOUT) not in sys.path:
    sys.path.insert(0, str(CHECKOUT))

from nets import assert_rows_as_separate  # noqa: E402

from benchmarks.networks import NETWORKS, ViT, build  # noqa: E402
from benchmarks.workloads import open_layers  # noqa: E402
from taps_fast import TapsModel  # noqa: E402

CONVOLUTIONAL = ("resnet34", "resnet50", "densenet121", "efficientnet_lite0")
ALL = (*CONVOLUTIONAL, "vit_s16")
SIZE = {name: (32, 32) for name in CONVOLUTIONAL} | {"vit_s16": (64, 64)}


def network(name: str, tasks: int, dtype=torch.float64, *, channels_last=False, closed_deltas=False) -> TapsModel:
    """The network with ``tasks`` tasks, even ones with the open layers of CUBS, odd ones with those of Cars."""
    torch.manual_seed(0)
    plain = ViT(384, 12, 6, image=64) if name == "vit_s16" else build(name)
    plain = plain.to(dtype).eval()
    if channels_last:
        plain = plain.to(memory_format=torch.channels_last)
    model = TapsModel(plain, head=NETWORKS[name][1])
    for task in range(tasks):
        adapt(model, task, closed_deltas)
    return model


@torch.no_grad()
def adapt(model: TapsModel, number: int, closed_deltas: bool) -> None:
    task, layers = f"task{number}", list(model.conversion.layers.values())
    model.add_task(task, classes=3 + number)
    opened = open_layers(number, len(layers))
    for i, layer in enumerate(layers):
        if i not in opened:
            layer.scores[task].fill_(0.0)
        if i in opened or closed_deltas:
            layer.deltas[task].normal_(std=0.2 * float(layer.base.std()))
        else:
            del layer.deltas[task]
            if task in layer.bias_deltas:
                del layer.bias_deltas[task]
    for module in model.modules_of(task).values():
        for value in (*module.parameters(), *module.buffers()):
            if value.is_floating_point():
                value.add_(0.2 * torch.rand_like(value))


@pytest.mark.parametrize("tasks", [1, 2, 8])
@pytest.mark.parametrize("name", ALL)
def test_mixed_batch_is_separate_models(name, tasks):
    wide = tasks < 8  # eight in float64 take gigabytes
    model = network(name, tasks, torch.float64 if wide else torch.float32)
    names = [f"task{i % tasks}" for i in range(tasks + 1)][::-1] + ["base"]
    x = torch.randn(len(names), 3, *SIZE[name], dtype=torch.float64 if wide else torch.float32)
    with torch.no_grad():
        mixed = assert_rows_as_separate(model, x, names)
    assert not torch.allclose(mixed[-1, :3], mixed[-2, :3])


@pytest.mark.parametrize("name", ["resnet50", "efficientnet_lite0"])
def test_channels_last_and_prepared(name):
    model = network(name, 2, channels_last=True)
    names = ["task1", "task0", "base", "task1"]
    x = torch.randn(len(names), 3, 32, 32, dtype=torch.float64).to(memory_format=torch.channels_last)
    with torch.no_grad():
        y = assert_rows_as_separate(model, x, names)
        torch.testing.assert_close(model(x.contiguous(), tasks=names), y)
        report = model.prepare_inference(x)
        assert len(report.of("folded")) == len(model.conversion.layers) and not report.of("left")
        torch.testing.assert_close(model(x, tasks=names), y)


@pytest.mark.parametrize("name", ALL)
def test_a_mixed_training_step_is_a_step_of_each_task(name):
    """Gradients of weights, norms, heads and scores, and running statistics."""
    model = network(name, 2, closed_deltas=True).train()
    ids = torch.tensor([0, 1, 1, 0])
    x, labels = torch.randn(len(ids), 3, 64, 64, dtype=torch.float64), torch.tensor([0, 3, 1, 2])
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def own(task: str) -> dict[str, nn.Parameter]:
        return {path: p for path, p in model.named_parameters() if path.endswith("." + task) or f".{task}." in path}

    mixed = model(x, tasks=ids)
    sum(F.cross_entropy(mixed[ids == t], labels[ids == t]) for t in (0, 1)).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == {**own("task0"), **own("task1")}.keys()
    after = {name: buffer.clone() for name, buffer in model.named_buffers()}

    model.load_state_dict(before, strict=False)
    model.zero_grad()
    for t in (0, 1):
        alone = model(x[ids == t], tasks=f"task{t}")
        torch.testing.assert_close(mixed[ids == t][:, : alone.shape[1]], alone)
        F.cross_entropy(alone, labels[ids == t]).backward()
    for path, buffer in model.named_buffers():
        torch.testing.assert_close(after[path], buffer, msg=lambda text, path=path: f"{path}: {text}")
    largest = max(float(g.abs().max()) for g in gradients.values())
    for path, p in model.named_parameters():
        if path in gradients:
            # Some are 0 but for rounding: a shift before another norm.
            torch.testing.assert_close(
                gradients[path], p.grad, atol=1e-10 * largest, rtol=1e-6, msg=lambda text, path=path: f"{path}: {text}"
            )
