"""What a training loop needs besides PyTorch's own: warm-up of λ, averaged micro-batches, which gates move, a sweep."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..model import TapsModel


def penalty_weight(lam: float, epoch: int, warmup_epochs: int) -> float:
    """λ of an epoch (counted from 0): 0 in the first ``warmup_epochs``, ``lam`` after them.

    Source: TAPS, arXiv 2203.16708.

    >>> [penalty_weight(0.3, epoch, warmup_epochs=2) for epoch in range(4)]
    [0.0, 0.0, 0.3, 0.3]
    """
    return lam if epoch >= warmup_epochs else 0.0


def accumulate(
    loader: Iterable[tuple[Tensor, Tensor]], every: int
) -> Iterator[list[tuple[float, tuple[Tensor, Tensor]]]]:
    """The micro-batches of each optimizer step, with the share of the step's samples that each has.

    ::

        gradient of a step = Σ share · gradient of the micro-batch's mean loss

    which is the gradient of one batch of all of them, also where the last is shorter. A sum without the shares, as in
    the authors' code, is a learning rate ``every`` times as high.

    Args:
        loader: (inputs, labels), [N_i, …] each.
        every: micro-batches a step; the last step of the loader takes what is left.

    Returns:
        An iterator over steps: lists of (share, (inputs, labels)).

    Raises:
        ValueError: ``every`` below 1.

    Cost: the host holds the micro-batches of a step at once, since the shares need all their sizes.

    >>> from torch import zeros
    >>> loader = [(zeros(n, 2), zeros(n)) for n in (3, 1, 2)]
    >>> [[share for share, _ in step] for step in accumulate(loader, every=2)]
    [[0.75, 0.25], [1.0]]
    """
    if every < 1:
        raise ValueError(f"accumulate: every must be at least 1, got {every}")
    batches = iter(loader)
    while step := list(islice(batches, every)):
        total = sum(len(labels) for _, labels in step)
        yield [(len(batch[1]) / max(total, 1), batch) for batch in step]


class GateLog:
    """A callback for the end of an epoch: how much a task shares, and which gates have moved since the last call.

    Args:
        model: that trains.
        task: one of its tasks.

    >>> from torch import nn
    >>> from taps_fast import TapsModel
    >>> model = TapsModel(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), ["cubs"])
    >>> log = GateLog(model, "cubs")
    >>> _ = model.conversion.layers["1"].scores["cubs"].data.fill_(0.0)
    >>> log()
    {'open_layers': 1, 'layers': 2, 'fraction': 0.5}
    >>> print(log)
    1 of 2 layers open, 50.0% of the base's parameters; closed: 1
    """

    def __init__(self, model: TapsModel, task: str) -> None:
        self.model, self.task = model, task
        self._open = self._opened()
        self.closed: list[str] = []
        """Paths of the layers whose gate was open at the call before."""
        self.reopened: list[str] = []
        self.row: dict[str, int | float] = {}

    def _opened(self) -> set[str]:
        return {path for path, layer in self.model.conversion.layers.items() if layer.is_open(self.task)}

    def __call__(self) -> dict[str, int | float]:
        """Numbers for a logger: open layers, all layers, and the fraction of the base's parameters (no head)."""
        now, layers = self._opened(), self.model.conversion.layers
        self.closed = [path for path in layers if path in self._open - now]
        self.reopened = [path for path in layers if path in now - self._open]
        self._open = now
        fraction = self.model.sharing().fraction(self.task)
        self.row = {"open_layers": len(now), "layers": len(layers), "fraction": fraction}
        return dict(self.row)

    def __str__(self) -> str:
        row = self.row or self()
        text = f"{row['open_layers']} of {row['layers']} layers open, {row['fraction']:.1%} of the base's parameters"
        for what, paths in (("closed", self.closed), ("reopened", self.reopened)):
            if paths:
                text += f"; {what}: {', '.join(paths[:5])}{f' and {len(paths) - 5} more' if len(paths) > 5 else ''}"
        return text


class Point(NamedTuple):
    """One trained model: its method or λ, parameters (a fraction of the base's), accuracy (a fraction)."""

    label: str
    parameters: float
    accuracy: float


def tradeoff(points: Sequence[Point], path: str | os.PathLike[str] | None = None) -> Figure:
    """Accuracy against parameters, one labelled point a model: what a sweep of λ is for.

    Points whose labels differ only in what follows "λ=" are joined by a line.

    Args:
        points: in any order.
        path: where to write it (the ending gives the format); None: nowhere.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"tradeoff needs matplotlib: pip install matplotlib ({error})") from None
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    families: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda p: p.parameters):
        families.setdefault(point.label.partition("λ=")[0], []).append(point)
    for family in families.values():
        axes.plot([100 * p.parameters for p in family], [100 * p.accuracy for p in family], "o-")
        for point in family:
            axes.annotate(
                point.label,
                (100 * point.parameters, 100 * point.accuracy),
                xytext=(4, 4),
                textcoords="offset points",
                fontsize=8,
            )
    axes.set_xlabel("parameters added, % of the base's (no head)")
    axes.set_ylabel("accuracy, %")
    axes.grid(alpha=0.3)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure
