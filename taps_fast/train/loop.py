"""The plain recipe: one task, one device, a log a person can read, and a checkpoint to go on from as if nothing was."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR
from torch.utils.data import DataLoader

from ..model import TapsModel
from ..store import write_whole
from .backbone import logits_of
from .data import Images, TrainError, batches, count
from .pieces import GateLog, Point, accumulate, penalty_weight

CHECKPOINT, LOG, CLASSES, BEST, LAST = "checkpoint.pt", "log.csv", "classes.txt", "best", "last"
WARMUP = 0.1
"""The part of the steps in which the learning rate rises."""
SETTLED = 0.5
"""The part of the penalty's steps after which scores rest; weights and norms train on for the gates left open."""

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Recipe:
    """How to train. Everything here changes the result, and a checkpoint of another recipe is refused.

    Raises:
        TrainError: a warm-up that leaves the penalty no epoch.
    """

    epochs: int = 5
    batch: int = 32
    micro_batches: int = 1
    lr: float = 2.5e-3
    score_lr: float | None = None
    lam: float = 0.5
    penalty_by: str = "layer"
    warmup_epochs: int = 1
    seed: int = 0
    augment: bool = False
    bf16: bool = False

    def __post_init__(self) -> None:
        if self.lam and self.warmup_epochs >= self.epochs:
            raise TrainError(
                f"train: warmup-epochs must leave the penalty an epoch, got {self.warmup_epochs} of {self.epochs} "
                "(--warmup-epochs 0 begins with it, --lam 0 trains without)"
            )


def schedules(
    groups: list[dict[str, Any]],
    scores: dict[str, Any] | None,
    *,
    steps: int,
    lr: float,
    score_lr: float,
    begin: int = 0,
) -> list[LRScheduler]:
    """AdamW under one cycle for weights; for scores plain SGD, whose rate falls from step ``begin`` (`score_factor`).

    SGD keeps the size of a score's gradient: layers that help hold out against the penalty.

    >>> weight = nn.Parameter(torch.zeros(2))
    >>> (schedule,) = schedules([{"params": [weight]}], None, steps=10, lr=1e-3, score_lr=0.1)
    >>> type(schedule.optimizer).__name__
    'AdamW'
    """
    adam = torch.optim.AdamW(groups, lr=lr, weight_decay=0.0, fused=True)
    peaks = [group["lr"] for group in adam.param_groups]
    rise = max(WARMUP, 2 / (steps + 1))  # one step at least: OneCycleLR divides by it
    found: list[LRScheduler] = [OneCycleLR(adam, peaks, total_steps=steps + 1, pct_start=rise)]
    if scores is not None:
        sgd = torch.optim.SGD(scores["params"], lr=score_lr)
        found.append(LambdaLR(sgd, lambda step: score_factor(step, steps, begin)))
    return found


def score_factor(step: int, steps: int, begin: int) -> float:
    """What multiplies the scores' rate: 1 until the penalty begins, 0 from `SETTLED` of the steps with it on.

    >>> [score_factor(step, 10, begin=2) for step in range(10)]
    [1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0, 0.0]
    """
    return min(1.0, max(0.0, 1 - (step - begin) / (SETTLED * (steps - begin))))


def score_rate(layers: int, steps: int, begin: int) -> float:
    """The rate with which the penalty alone moves scores by λ/4 in all in the mean, whatever network and length.

    Its gradient is λ/layers in the mean, and the factors of its steps sum to a quarter of their number or a little
    more.

    >>> score_rate(4, 10, begin=2) * sum(score_factor(step, 10, 2) for step in range(2, 10)) / 4
    0.25
    """
    return layers / (4 * sum(score_factor(step, steps, begin) for step in range(begin, steps)))


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device, **tasks: str) -> float:
    """The fraction of labels that the model gets right; ``tasks=`` is for a `TapsModel`."""
    model.eval()
    right = total = 0
    for images, labels in batches:
        right += int((logits_of(model(images.to(device), **tasks)).argmax(-1).cpu() == labels).sum())
        total += len(labels)
    return right / max(total, 1)


class Training:
    """One run of a recipe on one task.

    Args:
        model: with ``task`` in it, on ``device``.
        images, test: what trains and what is tested after every epoch.
        out: the folder of the run. A checkpoint in it is gone on from, bit for bit.
        workers, checkpoint_every: processes that load images; steps between checkpoints besides one an epoch.
        tensorboard: also write its logs.

    Raises:
        TrainError: a checkpoint of another run.
    """

    def __init__(
        self,
        model: TapsModel,
        task: str,
        images: Images,
        test: Images,
        recipe: Recipe,
        out: Path,
        *,
        device: torch.device,
        workers: int = 0,
        checkpoint_every: int = 0,
        tensorboard: bool = False,
    ) -> None:
        self.model, self.task, self.images, self.test, self.recipe, self.out = model, task, images, test, recipe, out
        self.device, self.workers, self.checkpoint_every = device, workers, checkpoint_every
        images.augmented = recipe.augment
        self.per_epoch = count(images, recipe.batch)
        steps = recipe.epochs * self.per_epoch
        begin = recipe.warmup_epochs * self.per_epoch if recipe.warmup_epochs < recipe.epochs else 0
        weights, scores = model.task_parameters(task)
        rate = score_rate(len(model.conversion.layers), steps, begin) if recipe.score_lr is None else recipe.score_lr
        self.schedules = schedules([weights], scores, steps=steps, lr=recipe.lr, score_lr=rate, begin=begin)
        self.gates = GateLog(model, task)
        self.step = 0
        self.losses: list[Tensor] = []
        self.history: list[dict[str, Any]] = []
        self.identity = {
            **asdict(recipe),
            "task": task,
            "threshold": model.threshold,
            "gate": model.gate,
            "base": model.fingerprint(),
            "images": images.identity(),
            "test": test.identity(),
            "size": images.size,
        }
        self.saved: int | None = None
        if (out / CHECKPOINT).exists():
            self._resume()
        self.writer = _writer(out, self.step) if tensorboard else None

    def run(self, progress: Progress) -> Point:
        """Trains to the end. ``progress`` gets a line an epoch.

        Returns:
            λ, parameters and accuracy of the best epoch.

        Raises:
            TrainError: a loss or weight that is not finite.
        """
        recipe, model = self.recipe, self.model
        names = "".join(f"{name}\n" for name in self.images.names)
        write_whole(self.out / CLASSES, lambda path: path.write_text(names, encoding="utf-8"))
        for epoch in range(self.step // self.per_epoch, recipe.epochs):
            model.train()
            lam = penalty_weight(recipe.lam, epoch, recipe.warmup_epochs)
            start = self.step - epoch * self.per_epoch
            loader = batches(self.images, recipe.batch, recipe.micro_batches, epoch, recipe.seed, self.workers, start)
            for parts in accumulate(loader, recipe.micro_batches):
                self._step(parts, lam)
                if self.checkpoint_every and self.step % self.checkpoint_every == 0 and self.step % self.per_epoch:
                    self._save()
            self._end(epoch, progress)
        if not self.history:
            raise TrainError("train: epochs must be at least 1, got none")
        model.save_task(self.task, self.out / LAST)
        best = self._best()
        return Point(f"λ={recipe.lam:g}", best["fraction"], best["accuracy"])

    def _step(self, parts: list[tuple[float, tuple[Tensor, Tensor]]], lam: float) -> None:
        total = torch.zeros((), device=self.device)
        for share, (x, labels) in parts:
            with self._precision():
                logits = logits_of(self.model(x.to(self.device, non_blocking=True), tasks=self.task))
                loss = share * F.cross_entropy(logits.float(), labels.to(self.device, non_blocking=True))
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        if not total.isfinite():
            self._not_finite(f"the loss must be finite, got {total.item()}")
        if lam:
            self.model.penalty(self.task, lam, by=self.recipe.penalty_by).backward()  # type: ignore[no-untyped-call]
        for schedule in self.schedules:
            schedule.optimizer.step()
            schedule.optimizer.zero_grad()
            schedule.step()
        self.losses.append(total)
        self.step += 1

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.recipe.bf16 else contextlib.nullcontext()

    def _end(self, epoch: int, progress: Progress) -> None:
        """Tests, logs, keeps the best, and writes a checkpoint."""
        loader = DataLoader(self.test, 128, num_workers=self.workers, generator=torch.Generator())
        with self._precision():
            right = accuracy(self.model, loader, self.device, tasks=self.task)
        row = {
            "epoch": epoch + 1,
            "step": self.step,
            "loss": torch.stack(self.losses).mean().item(),
            "accuracy": right,
            **self.gates(),
        }
        self.history.append(row)
        self.losses = []
        self._check_finite()
        if row is self._best():
            self.model.save_task(self.task, self.out / BEST)
        text = io.StringIO()
        table = csv.DictWriter(text, list(row), lineterminator="\n")
        table.writeheader()
        table.writerows(self.history)
        write_whole(self.out / LOG, lambda path: path.write_text(text.getvalue(), encoding="utf-8"))
        if self.writer is not None:
            for name in ("loss", "accuracy", "open_layers", "fraction"):
                self.writer.add_scalar(name, row[name], self.step)
            self.writer.flush()
        self._save()
        progress(f"epoch {epoch + 1}/{self.recipe.epochs}: loss {row['loss']:.3f}, accuracy {right:.1%}; {self.gates}")

    def _best(self) -> dict[str, Any]:
        """The most accurate of the epochs with the penalty, of two the later; or the last where none has it yet."""
        rows = [row for row in self.history if row["epoch"] > self.recipe.warmup_epochs] or self.history[-1:]
        return max(rows, key=lambda row: (row["accuracy"], row["epoch"]))

    def _save(self) -> None:
        self._check_finite()
        state = {
            "identity": self.identity,
            "step": self.step,
            "losses": self.losses,
            "history": self.history,
            "task": {name: t.detach() for name, t in self._owned().items()},
            "optimizers": [schedule.optimizer.state_dict() for schedule in self.schedules],
            "schedules": [_plain(schedule.state_dict()) for schedule in self.schedules],
            "random": torch.get_rng_state(),
            "random_device": torch.cuda.get_rng_state() if self.device.type == "cuda" else None,
        }
        write_whole(self.out / CHECKPOINT, lambda path: torch.save(state, path))
        self.saved = self.step

    def _owned(self) -> dict[str, Tensor]:
        """All that training changes: the task's parameters and the buffers of its norms and head."""
        mine = {id(p) for group in self.model.task_parameters(self.task) for p in group["params"]}
        mine |= {id(b) for module in self.model.modules_of(self.task).values() for b in module.buffers()}
        named = (*self.model.named_parameters(), *self.model.named_buffers())
        return {name: t for name, t in named if id(t) in mine}

    def _resume(self) -> None:
        path = self.out / CHECKPOINT
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            theirs = state["identity"]
        except Exception as error:  # a broken file, or one of another program
            raise TrainError(
                f"train: {path} must be a checkpoint of this command, got another file ({error})"
            ) from None
        for name, value in self.identity.items():
            if theirs.get(name) != value:
                why = ": rates and penalty are laid out over all epochs, so that none can be added" * (name == "epochs")
                raise TrainError(
                    f"train: a run must go on as it began: {name} must be {theirs.get(name)!r}, as in {path}, got "
                    f"{value!r} (choose another --out, or remove that file to begin anew{why})"
                )
        owned = self._owned()
        with torch.no_grad():
            for name, value in state["task"].items():
                owned[name].copy_(value)
        for schedule, optimizer, own in zip(self.schedules, state["optimizers"], state["schedules"], strict=True):
            schedule.optimizer.load_state_dict(optimizer)
            schedule.load_state_dict(own)
        self.step, self.losses, self.history = state["step"], list(state["losses"]), state["history"]
        self.saved = self.step
        self.gates = GateLog(self.model, self.task)
        torch.set_rng_state(state["random"].cpu())
        if state["random_device"] is not None:
            torch.cuda.set_rng_state(state["random_device"].cpu())

    def _check_finite(self) -> None:
        for name, value in self._owned().items():
            if value.is_floating_point() and not value.isfinite().all():
                self._not_finite(f"{name} must be finite, got NaN or infinity in it")

    def _not_finite(self, what: str) -> None:
        kept = "no checkpoint yet" if self.saved is None else f"{self.out / CHECKPOINT}, of step {self.saved}"
        raise TrainError(
            f"train: {what} at step {self.step + 1}, epoch {self.step // self.per_epoch + 1} (last good checkpoint: "
            f"{kept}; try a lower --lr)"
        )


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """Without functions, which a checkpoint that is read safely cannot hold."""
    return {key: value for key, value in state.items() if isinstance(value, (int, float, str, list, type(None)))}


def _writer(out: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise TrainError(f"train: --tensorboard needs tensorboard: pip install tensorboard ({error})") from None
    return SummaryWriter(str(out / "tensorboard"), purge_step=step)
