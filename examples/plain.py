"""TAPS in a plain PyTorch loop: two tasks, one after the other, then one batch of both.

    python examples/plain.py --help

The data are made up: coloured noise, whose class is its brightest channel. Put your own loader in place of `loader`.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from taps_fast import TapsModel
from taps_fast.train import GateLog, accumulate, penalty_weight


def backbone() -> nn.Module:
    """Any network; yours is pretrained."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, 2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip


def loader(classes: int, batch: int, count: int = 192) -> DataLoader:
    labels = torch.arange(count) % classes
    images = torch.rand(count, 3, 16, 16)
    images[torch.arange(count), labels] += 0.5
    return DataLoader(TensorDataset(images, labels), batch, shuffle=True)


def train(model: TapsModel, task: str, data: DataLoader, options: argparse.Namespace) -> float:
    """Sequential TAPS: only this task's deltas, scores, norms and head move. The mean loss of the last epoch."""
    weights, scores = model.task_parameters(task)
    optimizer = torch.optim.AdamW([weights, {**scores, "lr": options.score_lr, "weight_decay": 0.0}], lr=options.lr)
    gates = GateLog(model, task)
    for epoch in range(options.epochs):
        model.train()
        lam = penalty_weight(options.lam, epoch, options.warmup_epochs)  # λ: 0 in the first epochs
        losses = []
        for micro_batches in accumulate(data, options.accumulate):
            total = 0.0
            for share, (images, labels) in micro_batches:
                loss = share * F.cross_entropy(model(images, tasks=task), labels)
                loss.backward()
                total += loss.item()
            model.penalty(task, lam).backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total)
        gates()
        print(f"{task}, epoch {epoch + 1}: loss {sum(losses) / len(losses):.3f}; {gates}")
    return sum(losses) / len(losses)


def main(argv: list[str] | None = None) -> tuple[TapsModel, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=16, help="images per micro-batch")
    parser.add_argument("--accumulate", type=int, default=2, help="micro-batches per step")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--score-lr", type=float, default=6e-3, help="Adam closes a gate in 9 steps that nothing holds")
    parser.add_argument("--lam", type=float, default=0.3, help="more closes more gates")
    parser.add_argument("--warmup-epochs", type=int, default=2, help="without the penalty")
    parser.add_argument("--out", help="a folder for the tasks")
    options = parser.parse_args(argv)

    model = TapsModel(backbone(), head="7")
    losses = {}
    for task, classes in (("two", 2), ("three", 3)):
        model.add_task(task, classes=classes)
        losses[task] = train(model, task, loader(classes, options.batch), options)
        if options.out:
            model.save_task(task, f"{options.out}/{task}")

    model.eval()
    images, labels = next(iter(loader(2, 8)))
    with torch.no_grad():
        logits = model(images, tasks=["two", "three"] * 4)  # one forward for both
    print(f"one mixed batch: {int((logits.argmax(1) == labels).sum())} of 8 right\n\n{model.sharing()}")
    return model, losses


if __name__ == "__main__":
    main()
