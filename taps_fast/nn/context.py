"""Which task each sample of the running forward belongs to, and where a layer's input carries the samples."""

from __future__ import annotations

import contextlib
import operator
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._names import nearest
from ..tasks import BASE, TaskBatch
from .owned import Owned

BASE_NAME = "base"
"""What a user writes for a sample that no task claims."""

PREPARED = (
    "the model must not be prepared for inference, got one that is (unprepare() first, and prepare_inference() again "
    "afterwards)"
)

TaskNames = str | Sequence[str | int | None] | Tensor | TaskBatch


def names_of(tasks: str | Iterable[str]) -> list[str]:
    """Task names; a text is one name, not its letters."""
    return [tasks] if isinstance(tasks, str) else list(tasks)


class Mix(NamedTuple):
    """A batch of several tasks."""

    batch: TaskBatch
    tasks: tuple[str, ...]
    """The names that the ids of ``batch`` mean. Where ids are on the host, these are the tasks present alone."""


class Selection(NamedTuple):
    """The tasks of one forward: one for the whole batch, or one a sample."""

    task: str | None = None
    """The task of every sample; None is the base. Means nothing where ``mix`` is given, unless ``uniform``."""
    mix: Mix | None = None
    uniform: bool = False
    """Whether all samples of ``mix`` are known to be of ``task``."""
    present: Mix | None = None
    """The samples of ``mix`` with ids of the tasks present alone, where it has all for the sake of frozen tables."""

    @property
    def mixed(self) -> Mix | None:
        """The mix, where samples may differ in their task."""
        return None if self.uniform else self.mix


class TaskContext:
    """The task names of a model and the selection of its running forward, shared by all its layers.

    Threads have a selection each. It is set by the model's forward and gone when that returns.

    Args:
        owner: what error messages begin with.
        tasks: names to begin with.
        alone: whether it belongs to one layer, of no model.
    """

    def __init__(self, owner: str, tasks: Iterable[str] = (), *, alone: bool = False) -> None:
        self.owner = owner
        self.alone = alone
        self.tasks: list[str] = []
        self.default: str | None = None
        self.frozen = False
        """Whether layers hold tables of all tasks, made once: ids of a mix then count all tasks, not those present."""
        self._running = threading.local()
        for task in names_of(tasks):
            self.add(task)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_running"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._running = threading.local()

    def add(self, task: str) -> None:
        """Registers a name."""
        self._check_new(task)
        self.tasks.append(task)

    @contextlib.contextmanager
    def adding(self, task: str, forget: Callable[[str], None]) -> Iterator[None]:
        """Within, ``task`` gets all that it has; its name comes last. What fails or is interrupted is forgotten."""
        self._check_new(task)
        try:
            yield
            self.tasks.append(task)
        except BaseException:
            if task in self.tasks:
                self.tasks.remove(task)
            forget(task)
            raise

    def _check_new(self, task: str) -> None:
        """Refuses a name in use, or that cannot also be a key of parameters and modules."""
        if not isinstance(task, str):
            raise TypeError(f"{self.owner}: task must be a name, got {task!r}")
        if not task or "." in task or task == BASE_NAME or hasattr(_MODULES, task) or hasattr(_PARAMETERS, task):
            raise ValueError(
                f"{self.owner}: task must be a name that is not empty, holds no '.', is not '{BASE_NAME}' and is no "
                f"attribute of nn.ModuleDict or nn.ParameterDict, got {task!r}"
            )
        if task in self.tasks:
            raise ValueError(f"{self.owner}: task must be new, got {task!r} (tasks: {', '.join(self.tasks)})")

    def remove(self, task: str) -> None:
        """Forgets a name. The ids of the tasks after it go down by one."""
        self.tasks.remove(self.check(task))
        if self.default == task:
            self.default = None

    def check(self, task: str, names: Collection[str] | None = None) -> str:
        """The name itself, if there is such a task (among ``names``)."""
        known = self.tasks if names is None else names
        if task not in known:
            near = nearest(task, list(known))
            raise ValueError(f"{self.owner}: task must be one of its tasks, got {task!r} ({near})")
        return task

    def resolve(self, tasks: TaskNames | None, device: torch.device | None = None) -> Selection:
        """What ``tasks`` says: a name, one name a sample, ids, or nothing (the default task)."""
        if tasks is None:
            tasks = self._default()
        if isinstance(tasks, str):
            return Selection(None if tasks == BASE_NAME else self.check(tasks))
        names = tuple(self.tasks)  # once: another thread may remove a task, and ids then mean others
        if isinstance(tasks, TaskBatch):
            if tasks.num_tasks != len(names):
                raise ValueError(
                    f"{self.owner}: tasks must be a TaskBatch of {len(names)} tasks, got one of {tasks.num_tasks}"
                )
            return Selection(mix=Mix(tasks if device is None else tasks.to(device), names))
        if not isinstance(tasks, Tensor):
            if not isinstance(tasks, Iterable):
                raise TypeError(f"{self.owner}: tasks must be a name, or a name or id for each sample, got {tasks!r}")
            places = {name: t for t, name in enumerate(names)}
            tasks = torch.tensor([self._id(task, places) for task in tasks], dtype=torch.int64)
        if tasks.device.type == "cpu" and not torch.compiler.is_compiling():
            return self._on_host(TaskBatch.from_ids(tasks, len(names)), names, device)
        return Selection(mix=Mix(TaskBatch.from_ids(tasks, len(names), device=device), names))

    def part(self, mix: Mix, samples: slice | Tensor) -> Selection:
        """The selection of some samples of a mix."""
        batch = TaskBatch.from_ids(mix.batch.ids[samples], mix.batch.num_tasks)
        if batch.ids.device.type == "cpu" and not torch.compiler.is_compiling():
            return self._on_host(batch, mix.tasks, None)
        return Selection(mix=Mix(batch, mix.tasks))

    def _on_host(self, batch: TaskBatch, names: Sequence[str], device: torch.device | None) -> Selection:
        """The same samples with ids that count the tasks present: absent ones cost nothing and get no gradient."""
        edges = batch.offsets.tolist()
        found = [g + BASE for g in range(len(edges) - 1) if edges[g] < edges[g + 1]]
        present = [t for t in found if t != BASE]
        if not batch.size:  # all tasks get gradients, of 0: else there is no graph
            present = list(range(batch.num_tasks))
        few = batch.only(present) if len(present) < batch.num_tasks else batch
        mix = Mix(few if device is None else few.to(device), tuple(names[t] for t in present))
        task = names[found[0]] if len(found) == 1 and found[0] != BASE else None
        uniform = len(found) <= 1
        if self.frozen and few is not batch:
            whole = Mix(batch if device is None else batch.to(device), tuple(names))
            return Selection(task, whole, uniform, present=mix)
        return Selection(task, mix, uniform)

    def _id(self, task: str | int | None, places: dict[str, int]) -> int:
        if task is None:
            return BASE
        if isinstance(task, str):
            return BASE if task == BASE_NAME else places[self.check(task, places)]
        try:
            if not isinstance(task, bool):
                return operator.index(task)
        except TypeError:
            pass
        raise TypeError(f"{self.owner}: tasks must be a name or id for each sample, got {task!r} for a sample")

    def _default(self) -> str:
        if self.default is not None:
            return self.default
        if len(self.tasks) > 1:
            default = "" if self.alone else ", or call set_task"
            raise ValueError(
                f"{self.owner}: tasks must be said where there are several, got None (tasks: {', '.join(self.tasks)}; "
                f"pass tasks={self.tasks[0]!r} by keyword, or a list with a name for each sample{default})"
            )
        return self.tasks[0] if self.tasks else BASE_NAME

    @property
    def active(self) -> Selection | None:
        """The selection of this thread's running forward."""
        return getattr(self._running, "selection", None)

    def enter(self, selection: Selection | None) -> Selection | None:
        """Makes ``selection`` active and returns the one it replaces, to be entered again afterwards."""
        previous = self.active
        self._running.selection = selection
        return previous


class Running(contextlib.AbstractContextManager[None]):
    """A selection that is active within; every backward that recomputes the same forward enters it once more."""

    def __init__(self, context: TaskContext, selection: Selection | None) -> None:
        self.context, self.selection = context, selection
        self.replaced: list[Selection | None] = []

    def __enter__(self) -> None:
        self.replaced.append(self.context.enter(self.selection))

    def __exit__(self, *_: object) -> None:
        self.context.enter(self.replaced.pop())


class Layout(NamedTuple):
    """Where an input carries its samples: along ``axis``, whose size is a multiple r of their number B."""

    axis: int = 0
    outer: bool | None = True
    """Whether a sample's r entries are consecutive (True) or B apart (False); None: only r = 1 was seen."""

    def spread(self, batch: TaskBatch, size: int, owner: str) -> TaskBatch:
        """A batch that has the ids along ``axis``, so that each id covers consecutive entries."""
        repeats = 1 if size == batch.size else size // max(batch.size, 1)
        if repeats * batch.size != size:
            raise ValueError(
                f"{owner}: tasks must divide its batch: rows % ids == 0, got {batch.size} ids and {size} rows along "
                f"axis {self.axis} of its input"
            )
        if repeats == 1 or self.outer:
            return batch
        if self.outer is None:
            raise ValueError(
                f"{owner}: the probe must have seen a like input, got {repeats} rows a sample along axis {self.axis} "
                "where it saw one (call model.probe(...) with an input of this shape)"
            )
        return TaskBatch.from_ids(batch.ids.repeat(repeats), batch.num_tasks)

    def per_entry(self, batch: TaskBatch, size: int, owner: str) -> Tensor:
        """int64 [size]: the row of a table [base, task 0, task 1, …] for each entry along ``axis``."""
        spread = self.spread(batch, size, owner)
        ids = spread.ids if spread.size == size else spread.ids.repeat_interleave(size // spread.size, output_size=size)
        return ids + 1

    def gather(self, table: Tensor, batch: TaskBatch, x: Tensor, owner: str) -> Tensor:
        """Each entry's row of a table [T + 1, …] (base, task 0, …), shaped to go with x's last axes."""
        rows = table[self.per_entry(batch, x.shape[self.axis], owner)]
        middle = x.dim() - self.axis - rows.dim()
        return rows.reshape(rows.shape[0], *(1,) * middle, *rows.shape[1:])


class Located:
    """What every module that tells tasks apart has: a context, a path for messages, and its input's layouts."""

    context: TaskContext
    path: str
    layouts: dict[int, Layout]
    """The layout of an input, by its number of dimensions; found by `TapsModel.probe`."""
    images_first = False
    """Whether the type says that axis 0 of a 4-d input is the batch."""
    refusal: str | None = None
    """Why the probe could not tell the layout."""

    def _locate_in(self, context: TaskContext, path: str) -> None:
        self.context, self.path, self.layouts = context, path, {}

    def _unprepared(self, function: str) -> None:
        """Refuses what the tables of a prepared model would not follow; parts of it can be reached one by one."""
        if self.context.frozen:
            raise RuntimeError(f"{self.path}.{function}: {PREPARED}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._unprepared("to")
        return super()._apply(fn, recurse)  # type: ignore[misc]

    def _load_from_state_dict(self, *args: Any) -> None:
        self._unprepared("load_state_dict")
        super()._load_from_state_dict(*args)  # type: ignore[misc]

    def selected(self, tasks: TaskNames | None = None, device: torch.device | None = None) -> Selection:
        """The selection that applies to this call: said here, else of the running forward, else the default."""
        if tasks is None:
            active = self.context.active
            if active is not None:
                return active
            recomputed = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
            if recomputed and not self.context.alone:
                raise RuntimeError(
                    f"{self.path}: tasks must be known, but this forward is recomputed in a backward, where the "
                    "selection is gone; use checkpoint(..., use_reentrant=False, context_fn=model.checkpoint_context)"
                )
        return self.context.resolve(tasks, device)

    def layout(self, x: Tensor, batch: TaskBatch) -> Layout:
        """Where x carries the batch; an error where that is not known."""
        found = self.layouts.get(x.dim())
        if found is not None:
            return found
        if self.images_first and self.refusal is None and x.dim() == 4 and x.shape[0] == batch.size:
            return Layout()
        if batch.size == 0 and 0 in x.shape:
            return Layout(x.shape.index(0))
        raise ValueError(
            f"{self.path}: the batch axis of its input must be known in a mixed batch, got an input "
            f"{tuple(x.shape)} and {batch.size} ids "
            f"({self.refusal or 'call model.probe(...) once with an input like this one'})"
        )


def task_by_task(
    x: Tensor, batch: TaskBatch, layout: Layout, owner: str, run: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """``run(task, its rows of x)`` for each task present, put back in x's order along the batch axis."""
    if torch.compiler.is_compiling():
        raise RuntimeError(
            f"{owner}: runs a mixed batch task by task, whose sizes torch.compile cannot know; leave this model "
            "uncompiled, or exclude the module"
        )
    axis = layout.axis
    spread = layout.spread(batch, x.shape[axis], owner)
    repeats = x.shape[axis] // max(spread.size, 1)
    edges = spread.offsets.tolist()

    def named(task: int, rows: Tensor) -> Tensor:
        y = run(task, rows)
        if not isinstance(y, Tensor):
            raise TypeError(f"{owner}: must return one tensor in a mixed batch, got {type(y).__name__}")
        return y

    present = [g for g in range(len(edges) - 1) if edges[g] < edges[g + 1]]
    if len(present) <= 1:
        return named(present[0] - 1 if present else BASE, x)
    rows = (spread.order[:, None] * repeats + torch.arange(repeats, device=x.device)).flatten()
    parts = [named(g - 1, x.index_select(axis, rows[edges[g] * repeats : edges[g + 1] * repeats])) for g in present]
    return torch.cat(parts, axis).index_select(axis, rows.argsort())


_MODULES, _PARAMETERS = nn.ModuleDict(), Owned()
