"""TAPS with HuggingFace Accelerate: mixed precision, averaged micro-batches, one process or several.

    python examples/accelerated.py --help
    accelerate launch --cpu --num_processes 2 examples/accelerated.py

The data are made up, as in plain.py.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from taps_fast import TapsModel
from taps_fast.train import GateLog, accumulate, penalty_weight


def backbone() -> nn.Module:
    """Any network; yours is pretrained. Several processes must start from the same one."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 16, 3, 2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip


def dataset(classes: int, count: int = 192) -> TensorDataset:
    labels = torch.arange(count) % classes
    images = torch.rand(count, 3, 16, 16)
    images[torch.arange(count), labels] += 0.5
    return TensorDataset(images, labels)


def train(accelerator: Accelerator, model: TapsModel, task: str, data: TensorDataset, options) -> list[float]:
    """The loss of each step, mean over its samples in all processes."""
    groups = model.task_parameters(task)
    optimizer = torch.optim.AdamW(
        [groups[0], {**groups[1], "lr": options.score_lr, "weight_decay": 0.0}], lr=options.lr
    )
    loader = DataLoader(data, options.batch, shuffle=True)
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    gates, losses = GateLog(model, task), []
    for epoch in range(options.epochs):
        model.train()
        lam = penalty_weight(options.lam, epoch, options.warmup_epochs)
        for parts in accumulate(loader, options.accumulate):
            mean = torch.zeros((), device=accelerator.device)
            for i, (share, (images, labels)) in enumerate(parts):
                last = i == len(parts) - 1
                # Only the last backward of a step talks to the other processes. Its mean over them is right where all
                # have as many samples, as Accelerate sees to.
                with torch.enable_grad() if last else accelerator.no_sync(wrapped):
                    loss = share * F.cross_entropy(wrapped(images, tasks=task), labels)
                    # The penalty once a step, in the graph of the last backward, since DDP reduces there.
                    total = loss + model.penalty(task, lam) if last else loss
                    accelerator.backward(total)
                mean += loss.detach()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(accelerator.reduce(mean, "mean").item())
        gates()
        accelerator.print(f"{task}, epoch {epoch + 1}: loss {losses[-1]:.3f}; {gates}")
    return losses


def main(argv: list[str] | None = None) -> tuple[TapsModel, list[float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=16, help="images a micro-batch and process")
    parser.add_argument("--accumulate", type=int, default=2, help="micro-batches a step")
    parser.add_argument("--precision", default="no", choices=("no", "bf16", "fp16"))
    parser.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--score-lr", type=float, default=6e-3)
    parser.add_argument("--lam", type=float, default=0.3, help="more closes more gates")
    parser.add_argument("--warmup-epochs", type=int, default=2, help="without the penalty")
    parser.add_argument("--out", help="a folder for the task")
    options = parser.parse_args(argv)

    # Not gradient_accumulation_steps: that divides by the number of micro-batches, also where one is shorter.
    # Not broadcast_buffers: running statistics are each process's own until they are shared.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
    accelerator = Accelerator(mixed_precision=options.precision, cpu=options.cpu, kwargs_handlers=[ddp])
    set_seed(0)
    model = TapsModel(backbone(), head="7")
    model.add_task("three", classes=3)
    losses = train(accelerator, model, "three", dataset(3), options)
    model.share_statistics()  # of batch norms, where the network has some
    if options.out and accelerator.is_main_process:
        model.save_task("three", options.out)
    accelerator.end_training()
    return model, losses


if __name__ == "__main__":
    main()
