"""What tasks share: which layers each task opened, what that adds to the base, and what separate models would take.

The fraction of a task is that of TAPS (arXiv 2203.16708): norm parameters and the weights behind
open gates, over the parameters of the base. The head is counted apart, since every method needs one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from ._names import counted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OPEN, CLOSED = "#", "."


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """One adapted layer."""

    name: str
    kind: str
    """"linear" or "conv2d"."""
    parameters: int
    """Of one task's delta, that of the bias included."""
    bytes: int
    """Of one task's delta in memory."""
    macs: int | None
    """Multiply-adds of one sample, None where no forward has told the sizes."""
    open: Mapping[str, bool]
    """By task: whether its gate is open."""
    compressed: Mapping[str, int] = field(default_factory=dict)
    """By task whose delta is kept in another format: the bytes of it."""

    def bytes_of(self, task: str) -> int:
        """Of this task's delta in memory."""
        return self.compressed.get(task, self.bytes)


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """What one task has besides its deltas. Bytes include running statistics."""

    norm_parameters: int = 0
    norm_bytes: int = 0
    head_parameters: int = 0
    head_bytes: int = 0


@dataclass(frozen=True, slots=True, repr=False)
class Sharing:
    """The layer × task table; ``print`` shows it, `plot` draws it.

    Attributes:
        layers: in the order of the network; each says for every task whether it is open.
        tasks: by name, in the order of the columns.
        base_parameters, base_bytes: of the base model, its own head and (bytes) buffers included.
        base_head_bytes: of the head that a task's head replaces; not counted in `bytes` and `separate_bytes`.

    >>> layers = [LayerRecord(f"fc{i}", "linear", 100, 400, 100, {"cubs": i > 2, "cars": i > 3}) for i in range(5)]
    >>> tasks = {"cubs": TaskRecord(head_parameters=50, head_bytes=200), "cars": TaskRecord(norm_parameters=5)}
    >>> sharing = Sharing(layers, tasks, base_parameters=1000, base_bytes=4000)
    >>> sharing.fraction("cubs"), sharing.fraction("cars")
    (0.2, 0.105)
    """

    layers: Sequence[LayerRecord]
    tasks: Mapping[str, TaskRecord]
    base_parameters: int
    base_bytes: int
    base_head_bytes: int = 0

    def __post_init__(self) -> None:
        for layer in self.layers:
            if set(layer.open) != set(self.tasks):
                raise ValueError(
                    f"Sharing: layer {layer.name!r} must say of each task whether it is open, "
                    f"got {list(layer.open)} (tasks {list(self.tasks)})"
                )

    def open_layers(self, task: str) -> list[LayerRecord]:
        """The layers whose gate ``task`` opened."""
        if task not in self.tasks:
            raise KeyError(f"Sharing: task must be one of {', '.join(self.tasks)}, got {task!r}")
        return [layer for layer in self.layers if layer.open[task]]

    def fraction(self, task: str) -> float:
        """(norm parameters + weights behind open gates) / parameters of the base; the head is not counted."""
        weights = sum(layer.parameters for layer in self.open_layers(task))
        return (weights + self.tasks[task].norm_parameters) / max(self.base_parameters, 1)

    def macs_open(self, task: str) -> float | None:
        """The part of the adapted layers' multiply-adds that runs on this task's own weights; None if not known."""
        total, own = 0, 0
        for layer in self.layers:
            if layer.macs is None:
                return None
            total += layer.macs
            own += layer.macs * layer.open[task]
        return own / max(total, 1)

    def added_parameters(self, task: str) -> int:
        """All that the task brings: open weights, norms and head."""
        own = self.tasks[task]
        return sum(x.parameters for x in self.open_layers(task)) + own.norm_parameters + own.head_parameters

    def added_bytes(self, task: str) -> int:
        """Bytes of `added_parameters` and of the task's running statistics."""
        own = self.tasks[task]
        return sum(x.bytes_of(task) for x in self.open_layers(task)) + own.norm_bytes + own.head_bytes

    @property
    def bytes(self) -> int:
        """One base and what every task adds; like `separate_bytes` without the base's head, which tasks replace."""
        return self.base_bytes - self.base_head_bytes + sum(map(self.added_bytes, self.tasks))

    @property
    def separate_bytes(self) -> int:
        """The same tasks as one whole model each, with the task's head in place of the base's."""
        return sum(self.base_bytes - self.base_head_bytes + task.head_bytes for task in self.tasks.values())

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, for JSON; `from_dict` reads them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Sharing:
        """What `as_dict` gave.

        Raises:
            ValueError: data of another form.
        """
        try:
            layers = [LayerRecord(**layer) for layer in data["layers"]]
            tasks = {name: TaskRecord(**task) for name, task in data["tasks"].items()}
            numbers = {key: data[key] for key in ("base_parameters", "base_bytes", "base_head_bytes")}
            return cls(layers, tasks, **numbers)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"Sharing: data must be what as_dict gives, got another form ({error})") from None

    def renamed(self, names: Mapping[str, str]) -> Sharing:
        """The same with other names for the tasks that ``names`` has."""

        def new(by_task: Mapping[str, Any]) -> dict[str, Any]:
            return {names.get(task, task): value for task, value in by_task.items()}

        layers = [replace(x, open=new(x.open), compressed=new(x.compressed)) for x in self.layers]
        return replace(self, layers=layers, tasks=new(self.tasks))

    @classmethod
    def join(cls, parts: Sequence[Sharing]) -> Sharing:
        """One report of several tasks over one base, such as those of separate task folders.

        Raises:
            ValueError: none, a task twice, or parts whose base or adapted layers differ.
        """
        if not parts:
            raise ValueError("Sharing.join: parts must hold at least one report, got none")

        def shape(part: Sharing) -> list[object]:
            layers: list[object] = [(x.name, x.kind, x.parameters, x.bytes) for x in part.layers]
            return [part.base_parameters, part.base_bytes, part.base_head_bytes, *layers]

        first = parts[0]
        tasks: dict[str, TaskRecord] = {}
        for part in parts:
            if shape(part) != shape(first):
                raise ValueError(
                    f"Sharing.join: parts must have one base and the same adapted layers, got {list(part.tasks)} with "
                    f"{len(part.layers)} layers on {part.base_parameters} parameters (others {list(first.tasks)} with "
                    f"{len(first.layers)} on {first.base_parameters})"
                )
            for name, task in part.tasks.items():
                if name in tasks:
                    raise ValueError(f"Sharing.join: tasks must have different names, got {name!r} twice")
                tasks[name] = task
        opens = [{t: v for part in parts for t, v in part.layers[i].open.items()} for i in range(len(first.layers))]
        small = [{t: b for part in parts for t, b in part.layers[i].compressed.items()} for i in range(len(opens))]
        layers = [replace(x, open=o, compressed=c) for x, o, c in zip(first.layers, opens, small, strict=True)]
        return replace(first, layers=layers, tasks=tasks)

    def __str__(self) -> str:
        return "\n".join([*self._layer_lines(), "", *self._task_lines(), "", self._total()])

    def __repr__(self) -> str:
        return str(self)  # what a notebook shows

    def _layer_lines(self) -> list[str]:
        """One line a layer, or a run of layers that the same tasks opened; a column a task, by number."""
        width = len(str(len(self.tasks)))
        rows = [("layer", "kind", "parameters", " ".join(f"{i + 1:>{width}}" for i in range(len(self.tasks))))]
        for pattern, group in groupby(self.layers, key=lambda layer: tuple(layer.open[task] for task in self.tasks)):
            run = list(group)
            name = f"{run[0].name} … {run[-1].name} ({len(run)} layers)" if len(run) > 2 else ""
            marks = " ".join(f"{OPEN if is_open else CLOSED:>{width}}" for is_open in pattern)
            for layer in run[:1] if name else run:
                parameters = sum(x.parameters for x in run) if name else layer.parameters
                kinds = "/".join(dict.fromkeys(x.kind for x in run)) if name else layer.kind
                rows.append((name or layer.name, kinds, f"{parameters:,}", marks))
        return _columns(rows, "<<><")

    def _task_lines(self) -> list[str]:
        rows = [("", "task", "layers open", "weights", "norms", "head", "of the base", "own MACs", "added bytes")]
        for number, (name, own) in enumerate(self.tasks.items(), 1):
            opened, macs = self.open_layers(name), self.macs_open(name)
            rows.append(
                (
                    str(number),
                    name,
                    f"{len(opened)}/{len(self.layers)}",
                    f"{sum(layer.parameters for layer in opened):,}",
                    f"{own.norm_parameters:,}",
                    f"{own.head_parameters:,}",
                    f"{self.fraction(name):.1%}",
                    "?" if macs is None else f"{macs:.1%}",
                    readable_bytes(self.added_bytes(name)),
                )
            )
        return _columns(rows, "><>>>>>>>")

    def _total(self) -> str:
        parameters = 1 + sum(map(self.fraction, self.tasks))
        own_head = (
            f"{readable_bytes(self.base_head_bytes)} of the base's own head apart" if self.base_head_bytes else ""
        )
        unknown = any(layer.macs is None for layer in self.layers) and self.tasks
        return (
            f"{OPEN} open, {CLOSED} closed (runs on the base's weight). Base and {counted(len(self.tasks), 'task')}: "
            f"{parameters:.3f} times the base's {self.base_parameters:,} parameters, heads apart; "
            f"{readable_bytes(self.bytes)} against {readable_bytes(self.separate_bytes)} in separate models"
            f"{', ' if own_head else ''}{own_head}."
            f"{' ?: known after model.probe(...), or a first mixed batch.' if unknown else ''}"
        )

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """The picture of the TAPS paper: a layer a column, a task a row, filled where the gate is open.

        Args:
            path: where to write it (the ending gives the format, e.g. ".png"); None: nowhere. A notebook shows the
                figure that comes back.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: an ending that matplotlib does not know.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(f"Sharing.plot needs matplotlib: pip install matplotlib ({error})") from None
        count, names = len(self.layers), list(self.tasks)
        size = (min(max(4.0, 1.5 + 0.16 * count), 400.0), min(1.2 + 0.3 * len(names), 400.0))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        for row, task in enumerate(names):
            for is_open in (False, True):
                columns = [i for i, layer in enumerate(self.layers) if layer.open[task] == is_open]
                color = f"C{row % 10}"
                axes.scatter(
                    columns,
                    [row] * len(columns),
                    s=40,
                    marker="s",
                    edgecolors=color,
                    facecolors=color if is_open else "none",
                )
        axes.set_xlim(-1, count)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_yticks(range(len(names)), names)
        axes.set_xticks(range(0, count, 5), [str(i + 1) for i in range(0, count, 5)])
        axes.set_xlabel("layer (filled: open gate, the task's own weight)")
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure


def readable_bytes(count: int) -> str:
    """``count`` bytes with three digits and a decimal unit."""
    size, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 999.5 or unit == "TB":
            break
        size /= 1000
    return f"{size:.3g} {unit}"


def _columns(rows: Sequence[Sequence[str]], alignment: str) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, alignment, widths, strict=True)).rstrip()
        for row in rows
    ]
