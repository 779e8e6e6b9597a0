"""What `TapsModel.prepare_inference` does to a model, its report, and how all of it is undone."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import tempfile
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ._regions import Region, regions
from .convert import Row
from .formats import Format
from .nn.context import Selection
from .nn.layer import TapsLayer
from .sharing import readable_bytes

if TYPE_CHECKING:
    from ._running import RunningModel

ORIGINALS = ("disk", "memory", "discard")


class Originals:
    """The deltas that baked weights stand in for, bit for bit, by name.

    Args:
        where: "disk" (a temporary folder, removed with the last model that needs it in the process that made it),
            "memory" (of the host) or "discard".
        tensors: by name. On disk each is written alone, so that no second copy of all is ever held.
    """

    def __init__(self, where: str, tensors: Mapping[str, Tensor]) -> None:
        self.where = where
        self.bytes = sum(t.nbytes for t in tensors.values())
        self._names = {name: i for i, name in enumerate(tensors)}
        self._held: dict[str, Tensor] = {}
        self._folder: Path | None = None
        if where == "disk" and tensors:
            self._folder = Path(tempfile.mkdtemp(prefix="taps_fast-"))
            weakref.finalize(self, _remove, self._folder, os.getpid())
        for name, t in tensors.items():
            if self._folder is not None:
                # The order in memory needs no copy to be written: channels may be the last axis there.
                order = sorted(range(t.dim()), key=lambda axis: -t.stride()[axis])
                save_file(
                    {"delta": t.detach().permute(order).contiguous(), "order": torch.tensor(order)}, self._file(name)
                )
            elif where == "memory":
                self._held[name] = t.detach().to("cpu", copy=True)

    def _file(self, name: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{self._names[name]}.safetensors"

    def read(self, name: str) -> Tensor:
        """
        Raises:
            RuntimeError: deltas were discarded, or somebody has removed the file.
        """
        if self.where == "discard":
            raise RuntimeError(
                "TapsModel: deltas must be kept to be saved or put back, got a model prepared with originals='discard'"
            )
        if self._folder is None:
            return self._held[name]
        file = self._file(name)
        try:
            found = load_file(file)
        except FileNotFoundError:
            raise RuntimeError(
                f"TapsModel: a prepared model's deltas must stay in their folder, got no {file}: the delta of {name} "
                "is lost. Forwards and merge() still have its whole weight; to train or save it, load the task into a "
                "new model (prepare_inference(originals='memory') needs no files)"
            ) from None
        delta: Tensor = found["delta"].permute(found["order"].argsort().tolist())
        return delta

    def __deepcopy__(self, memo: dict[int, Any]) -> Originals:
        return self  # never changed, and the folder lives as long as somebody needs it

    def __getstate__(self) -> dict[str, Any]:
        """Another process may not have the folder: what is pickled holds the tensors."""
        if self._folder is None:
            return self.__dict__
        held = {name: self.read(name) for name in self._names}
        return {**self.__dict__, "where": "memory", "_folder": None, "_held": held}


class Turns:
    """Forwards run side by side; what changes the tensors that they read waits for them, and they for it."""

    def __init__(self) -> None:
        self._turn = threading.Condition()
        self._forwards: set[int | None] = set()
        self._changes: list[int] = []

    def __reduce__(self) -> tuple[type[Turns], tuple[()]]:
        return Turns, ()  # in a copy of the model nothing runs

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Nothing is changed within, by other threads."""
        me = threading.current_thread().ident
        if me in self._forwards or me in self._changes[:1]:
            yield
            return
        try:
            with self._turn:
                while self._changes:
                    self._turn.wait()
                self._forwards.add(me)
            yield
        finally:
            with self._turn:
                self._forwards.discard(me)
                if self._changes:
                    self._turn.notify_all()

    @contextlib.contextmanager
    def change(self, devices: Iterable[torch.device]) -> Iterator[None]:
        """No other thread's forward runs within, nor what one has begun on ``devices``.

        Raises:
            RuntimeError: a forward of this thread runs.
        """
        me = threading.get_ident()
        if me in self._changes[:1]:
            yield
            return
        if me in self._forwards:
            raise RuntimeError(
                "TapsModel: prepare_inference and unprepare must be called outside of forwards, got a call within one"
            )
        try:
            with self._turn:
                self._changes.append(me)  # forwards that come now wait
                self._turn.wait_for(lambda: self._changes[0] == me and not self._forwards.intersection(_threads()))
            _synchronize(devices)
            yield
            _synchronize(devices)
        finally:
            with self._turn:
                self._changes.remove(me)
                self._turn.notify_all()


def _threads() -> set[int | None]:
    """Those of this process: after a fork, of the others there is only what they have left."""
    return {thread.ident for thread in threading.enumerate()}


def _devices(model: RunningModel) -> set[torch.device]:
    return {parameter.device for parameter in model.parameters()}


def _synchronize(devices: Iterable[torch.device]) -> None:
    """Other threads may have streams of their own, which know nothing of memory that is given back."""
    accelerator = torch.accelerator.current_accelerator()
    for device in devices:
        if accelerator is not None and accelerator.type == device.type:
            torch.accelerator.synchronize(device)


def _remove(folder: Path, process: int) -> None:
    """Unless this is a fork of the process that made the folder and may still need it."""
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(repr=False)
class Preparation:
    """What `TapsModel.prepare_inference` made of a model; ``print`` shows one row a module.

    Attributes:
        rows: path, type, verdict ("folded", "baked", "frozen" or "left") and why.
        baked_bytes: of the deltas that now hold whole weights: no byte more than before.
        table_bytes: of the tables of scale and shift, which are new.
        originals: where the deltas are: "disk", "memory" or "discard".
    """

    originals: str
    found: list[Row] = field(default_factory=list)
    baked_bytes: int = 0
    regions: list[Region] = field(default_factory=list)
    types: dict[str, str] = field(default_factory=dict)
    trained: bool = False
    """Whether a backward has come through the model meanwhile, and been warned about."""

    @property
    def table_bytes(self) -> int:
        return sum(region.bytes for region in self.regions)

    @property
    def rows(self) -> list[Row]:
        rows = list(self.found)
        for region in self.regions:
            for fold in region.folds:
                parts = [part for part in (fold.norm, fold.activation) if part is not None]
                what = f"with {' and '.join(parts)}" if parts else "one pass over tables of scale and shift"
                verdict = ("folded", what) if region.gave_up is None else ("left", region.gave_up)
                rows.append(Row(fold.path, self.types.get(fold.path, ""), *verdict))
        return rows

    def of(self, verdict: str) -> list[Row]:
        """The rows with this verdict."""
        return [row for row in self.rows if row.verdict == verdict]

    def __str__(self) -> str:
        rows = self.rows
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
        lines = [f"{r[0]:<{widths[0]}}  {r[1]:<{widths[1]}}  {r[2]:<{widths[2]}}  {r[3]}" for r in rows]
        counts = Counter(row.verdict for row in rows)
        total = ", ".join(f"{counts[verdict]} {verdict}" for verdict in ("folded", "baked", "left"))
        where = {
            "disk": "a temporary folder on disk",
            "memory": "host memory, besides",
            "discard": "nowhere: save_task and unprepare cannot work",
        }
        unverified = sum(not r.verified and r.gave_up is None for r in self.regions)
        waiting = f"; to be verified by the first forward: {unverified} traced" if unverified else ""
        return "\n".join(
            [
                *lines,
                f"{total}{waiting}",
                f"whole weights in place of deltas: {readable_bytes(self.baked_bytes)}, no more than before; the "
                f"deltas ({readable_bytes(self.baked_bytes)}) are in {where[self.originals]}",
                f"tables of scale and shift: {readable_bytes(self.table_bytes)} more",
            ]
        )

    def __repr__(self) -> str:
        return str(self)  # what a notebook shows


def prepare(model: RunningModel, args: Any, kwargs: Any, *, bake: bool | None, originals: str) -> Preparation:
    """Bakes, folds and freezes; see `TapsModel.prepare_inference`."""
    if originals not in ORIGINALS:
        raise ValueError(f"TapsModel.prepare_inference: originals must be {', '.join(ORIGINALS)}, got {originals!r}")
    if model.training or any(m.training for m in model.model.modules()):
        raise ValueError("TapsModel.prepare_inference: the model must be in eval mode, got one in training mode")
    with model.turns.change(_devices(model)):
        return _prepare(model, args, kwargs, bake, originals)


def _prepare(model: RunningModel, args: Any, kwargs: Any, bake: bool | None, originals: str) -> Preparation:
    unprepare(model)
    report = Preparation(originals, types={row.path: row.type for row in model.conversion.rows})
    model.prepared = report
    try:
        with torch.inference_mode(False), torch.no_grad():
            _change(model, report, bake)
        if args or kwargs:
            previous = model.context.enter(Selection())
            try:
                with torch.no_grad():
                    model.model(*args, **kwargs)
            finally:
                model.context.enter(previous)
    except BaseException:
        if not any(originals == "discard" and layer.baked for layer in model.conversion.layers.values()):
            unprepare(model)
        raise
    return report


def _change(model: RunningModel, report: Preparation, bake: bool | None) -> None:
    _bake(model, report, bake)
    tasks = model.context.tasks
    model.context.frozen = True
    for layer in model.conversion.layers.values():
        layer.freeze(tasks)
    for found in regions(model.model, tasks):
        if isinstance(found, Region):
            found.install()
            report.regions.append(found)
        else:
            path, why = found
            report.found.append(Row(path or "(root)", type(model.model.get_submodule(path)).__name__, "left", why))


def unprepare(model: RunningModel) -> None:
    """Deltas, norms and forwards as they were."""
    if model.prepared is not None:
        with model.turns.change(_devices(model)):
            _unprepare(model)


def _unprepare(model: RunningModel) -> None:
    layers = model.conversion.layers.values()
    for original in [original for layer in layers for original in layer.baked.values()][:1]:
        original()  # raises before anything changes
    # Right wherever it stops. Regions need the tables of every layer, so they go first; ids count all tasks, as tables
    # need them, until there are none.
    detach_regions(model.model)
    with torch.inference_mode(False):
        for layer in layers:
            layer.thaw()
    model.context.frozen = False
    model.prepared = None


def watch_backward(model: RunningModel, report: Preparation, output: Any) -> None:
    """Warns once if a backward comes through the output of a prepared model whose parameters want gradients."""

    def warn(_: Tensor) -> None:
        if not report.trained and any(p.requires_grad for p in model.parameters()):
            report.trained = True
            warnings.warn(
                "TapsModel: a prepared model must not be trained, got a backward through one: its gates, deltas and "
                "norms get no gradients (train() or unprepare() first)",
                stacklevel=2,
            )

    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            leaf.register_hook(warn)  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def own_forwards(model: RunningModel) -> Iterator[None]:
    """Every module runs its own forward meanwhile, so that hooks see all calls."""
    paused = [] if model.prepared is None else model.prepared.regions
    try:
        for region in paused:
            region.paused = True
        yield
    finally:
        for region in paused:
            region.paused = False


def detach_regions(module: nn.Module) -> None:
    """Gives every module in it its own forward again."""
    for part in module.modules():
        if isinstance(part.__dict__.get("forward"), Region):
            del part.__dict__["forward"]


def _bake(model: RunningModel, report: Preparation, bake: bool | None) -> None:
    """The rule: a gate is baked if it is open and its delta dense, but not in 16 bits, where a sum loses part of one.

    A product with one whole weight reads half the bytes of base and delta and does no more arithmetic, so there is no
    size from which it stops to pay.
    """
    chosen: list[tuple[str, TapsLayer, str]] = []
    held = Counter(id(delta) for layer in model.conversion.layers.values() for delta in layer.deltas.values())
    for path, layer in model.conversion.layers.items():
        opened = [task for task in model.context.tasks if layer.is_open(task)]
        kind = report.types.get(path, type(layer).__name__)
        small = [task for task in opened if isinstance(layer.delta(task), Format)]
        if small:
            report.found.append(Row(path, kind, "left", f"not baked for {', '.join(small)}: compressed"))
        fixed = [task for task in opened if task not in small and layer.deltas[task].is_inference()]
        if fixed:
            why = "made under torch.inference_mode, so it cannot be changed"
            report.found.append(Row(path, kind, "left", f"not baked for {', '.join(fixed)}: {why}"))
        opened = [task for task in opened if task not in (*small, *fixed)]
        others = [t for t in opened if held[id(d := layer.deltas[t])] > 1 or not isinstance(d, nn.Parameter)]
        if others:
            why = "no parameter of its own, which could hold a whole weight"
            report.found.append(Row(path, kind, "left", f"not baked for {', '.join(others)}: {why}"))
        opened = [task for task in opened if task not in others]
        if not opened:
            continue
        if bake is False:
            report.found.append(Row(path, kind, "left", "not baked: bake=False"))
        elif bake is None and layer.base.dtype.itemsize < 4:
            report.found.append(Row(path, kind, "left", f"not baked: {layer.base.dtype} would round the delta"))
        else:
            chosen += [(path, layer, task) for task in opened]
            report.found.append(Row(path, kind, "baked", f"for {', '.join(opened)}"))
    kept = Originals(report.originals, {f"{path}.{task}": layer.deltas[task] for path, layer, task in chosen})
    report.baked_bytes = kept.bytes
    for path, layer, task in chosen:
        layer.bake(task, functools.partial(kept.read, f"{path}.{task}"))
