"""What the methods that train at test time share: losses over each task's rows, experts, and the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.context import TaskNames
from .merged import adopt, run_each, shared_network
from .serving import taps_model
from .threads import Exchange
from .vectors import TaskVectors

Batch = Mapping[str, Tensor]
"""One step's unlabelled inputs by task."""
Progress = Callable[[int, float], None]
"""Called after each step with its number and loss."""


def entropy(logits: Tensor) -> Tensor:
    """The mean over rows of -Σ p·log p; 0 for no rows. logits: [N, C]."""
    if not logits.shape[0]:
        return logits.sum()
    logs = F.log_softmax(logits, -1)
    return -(logs.exp() * logs).sum(-1).mean()


def agreement(logits: Tensor, teacher: Tensor, confident: bool = False) -> Tensor:
    """The mean cross-entropy against the teacher's labels; 0 where no row is left.

    Args:
        logits, teacher: [N, C].
        confident: leave out the rows where the labels differ and the student's largest
            probability exceeds the teacher's.
    """
    labels = teacher.argmax(-1)
    losses = F.cross_entropy(logits, labels, reduction="none")
    if confident:
        student = logits.detach()
        surer = student.softmax(-1).amax(-1) > teacher.softmax(-1).amax(-1)
        keep = ~((student.argmax(-1) != labels) & surer)
        return (losses * keep).sum() / keep.sum().clamp(min=1)
    return losses.sum() / max(len(losses), 1)


def optimise(
    parameters: list[dict[str, object]],
    batches: Iterable[Batch],
    losses: Callable[[Batch], Tensor],
    *,
    sequential: bool = False,
    weight_decay: float = 0.0,
    progress: Progress | None = None,
) -> None:
    """Adam over the batches: one update a batch from all its tasks, or with ``sequential`` one after each task."""
    optimizer = torch.optim.AdamW(parameters, weight_decay=weight_decay)
    for step, batch in enumerate(batches):
        total = 0.0
        for part in ({task: x} for task, x in batch.items()) if sequential else (batch,):
            loss = losses(part)
            optimizer.zero_grad()
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            total += float(loss.detach())
        if progress is not None:
            progress(step, total)


class Experts(nn.Module):
    """The frozen fine-tuned models, W0 + Δ_t with task t's own head, as one model.

    Where Linear, Conv2d and norms hold all that was fine-tuned, a batch of all tasks runs as one mixed batch over base
    and deltas, and nothing but norms is copied. Otherwise the tasks run one by one, each folded for its batch.

    Args:
        model, vectors, head: as in `MergedModel`.

    >>> model = nn.Linear(4, 2)
    >>> vectors = TaskVectors.from_checkpoints(model.state_dict(), {"a": nn.Linear(4, 2).state_dict()})
    >>> x = torch.randn(3, 4)
    >>> bool(torch.allclose(Experts(model, vectors)({"a": x})["a"], F.linear(x, *vectors.expert("a").values())))
    True
    """

    def __init__(self, model: nn.Module, vectors: TaskVectors, head: str | None = None) -> None:
        super().__init__()
        self.vectors = vectors
        self._places: dict[str, list[str]] = {}
        self._exchange = Exchange()
        try:
            self.network = taps_model(model, vectors, vectors.tasks, self._delta, head)
            self.mixed = True
        except ValueError:  # a tensor in which the samples of a batch cannot differ
            self.network, self.mixed = shared_network(model, vectors, head), False
            self._places = adopt(self.network, vectors)
        self.requires_grad_(False).eval()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Experts:
        """Vectors that are still to be folded move too."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if not self.mixed:
            self.vectors = self.vectors.moved(fn)
            adopt(self.network, self.vectors)
        return self

    @torch.no_grad()
    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Each task's logits for its own rows."""
        if self.mixed:
            return run_each(self.network, batch, lambda x, tasks: self.network(x, tasks=tasks))
        return {task: self._alone(task, x) for task, x in batch.items()}

    def _delta(self, name: str, task: str) -> Tensor:
        return self.vectors.deltas[name][self.vectors.index(task)]

    def _alone(self, task: str, x: Tensor) -> Tensor:
        one = torch.zeros(len(self.vectors))
        one[self.vectors.index(task)] = 1.0
        folded = self.vectors.fold(one, names=[name for name in self.vectors.names if name in self._places])
        weights = {place: weight for name, weight in folded.items() for place in self._places[name]}

        def call(rows: Tensor, tasks: TaskNames) -> Tensor:
            y: Tensor = self._exchange(self.network, weights, rows, {"tasks": tasks})
            return y

        return run_each(self.network, {task: x}, call)[task]
