"""`TapsModel`: a network that several tasks adapt, each with its own gated deltas, norms and head."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import _compress, _folder, _training, store
from ._compress import Compression
from ._folder import Loaded
from ._parting import part
from ._plain import plain_network
from ._running import RunningModel
from .convert import Patterns, convert
from .nn import TaskContext, gates
from .nn.context import BASE_NAME, names_of
from .sharing import Sharing


class TapsModel(RunningModel):
    """An adapted copy of ``model``: frozen base, and for each task gated deltas, norms and a head.

    Sequential TAPS trains one task after the other, each alone (`task_parameters`); joint TAPS trains all of them and
    what they share in one mixed batch (`train_base`).

    ``model`` itself is left as it is. The copy's base parameters are in the same storage until the copy's train
    (`train_base`, `requires_grad_`) or are loaded. So training ``model`` afterwards, or writing into one of the two,
    changes both: give a copy for that.

    Args:
        model: any module, already on the device and in the dtype you want.
        tasks: names to add at once, or one, with heads like the base's (see `add_task`).
        head: the path of the module that each task replaces (for example "fc"); None: the network keeps one head.
        include: which Linear and Conv2d modules get gates: paths (globs; a path covers what is below it) or types;
            None: all.
        exclude: which modules, norms too, stay shared.
        norms: "task" (each task has its own) or "shared" (the base's, frozen and in eval mode).
        threshold, initial_score, gate: as `FastTapsLinear`.
        slice: how many samples of a mixed batch run together in eval mode; None or 0: all. "auto": on a CPU whose C
            library gives freed memory back to the system (`python -m taps_fast info` says), as many as keep the largest
            layer's input and output under 24 MiB (whole tasks in up to 32 MiB, where all have as many samples; a layer
            or two alone are not sliced), elsewhere all. Samples go by task, and outputs come back in the batch's order.
            Training, compiled models, and models whose output's batch axis the probe cannot tell, are not sliced.

    Raises:
        ValueError: a head or pattern that matches nothing, a lazy, compiled or adapted model, ``norms``, ``gate`` or
            ``slice`` that are none of these, a threshold or a score that `FastTapsLinear` refuses, and what `add_task`
            refuses; TypeError: no module.

    ``print(model.conversion)`` says what was converted, skipped or refused, and why. To ``isinstance`` an adapted layer
    stays an ``nn.Linear`` or ``nn.Conv2d``, though none of a subclass; norms that each task has are none of torch's.

    A state dict holds all tasks; ``load_state_dict`` wants them added, with heads alike, and gives each the storage
    that its deltas have there (none, dense, compressed): make optimizers afterwards.

    In several processes: DDP with ``find_unused_parameters=True`` and ``broadcast_buffers=False`` (or, from PyTorch
    2.13 on, ``forward_sync_buffers=False``), since rank 0's running statistics would replace those of tasks that it
    does not see; ``fully_shard`` with the scores (scalars, always float32) as ``ignored_params``, their gradients
    averaged by the caller, tasks added before, and each batch's ids as a `TaskBatch`, which gives absent tasks zeros
    in every process. With batch norms, `share_statistics` before saving or evaluating.
    Source: TAPS, arXiv 2203.16708.

    >>> backbone = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 10))
    >>> model = TapsModel(backbone, head="2")
    >>> model.add_task("cubs", classes=3)
    >>> model.add_task("cars", classes=5)
    >>> model(torch.randn(6, 4), tasks="cubs").shape
    torch.Size([6, 3])
    >>> model(torch.randn(2, 4), tasks=["cars", "cubs"]).shape  # padded to the widest head
    torch.Size([2, 10])
    """

    def __init__(
        self,
        model: nn.Module,
        tasks: str | Iterable[str] = (),
        *,
        head: str | None = None,
        include: Patterns | None = None,
        exclude: Patterns = (),
        norms: str = "task",
        threshold: float = 0.1,
        initial_score: float | None = None,
        gate: str = "ste",
        slice: int | str | None = "auto",
    ) -> None:
        super().__init__(slice)
        self.context = TaskContext("TapsModel")
        self.threshold, self.gate = threshold, gate
        options = {"threshold": threshold, "initial_score": initial_score, "gate": gate}
        self.model, self.conversion = convert(
            model, self.context, head=head, include=include, exclude=exclude, norms=norms, options=options
        )
        self.parting = self.model.register_load_state_dict_pre_hook(part)  # type: ignore[no-untyped-call]
        self.training = model.training
        _training.note_buffers(self)
        for task in names_of(tasks):
            self.add_task(task)

    @property
    def tasks(self) -> list[str]:
        """Task names; a task's place is its id."""
        return list(self.context.tasks)

    @property
    def widths(self) -> dict[str, int | None]:
        """The number of outputs of each task's head, before padding with -inf (see `forward`); empty without a head."""
        return {} if self.conversion.head is None else self.conversion.head.widths

    def set_task(self, task: str | None) -> None:
        """The task of forwards that name none ("base": no task's); None: the only one, of several they must name one.

        Raises:
            ValueError: an unknown task.
        """
        self.context.default = task if task in (None, BASE_NAME) else self.context.check(task)

    @torch.inference_mode(False)
    def add_task(
        self, task: str, classes: int | None = None, *, head: nn.Module | None = None, deltas: bool = True
    ) -> None:
        """Adds a task: zero deltas behind open gates, norms like the base's, and a head.

        Args:
            task: a new name.
            classes: outputs of a fresh head like the base's (Linear or Conv2d).
            head: a module like which its head starts: a copy, as of the base's without both. `task_parameters` has what
                trains.
            deltas: False: norms and head alone, on the base's weights, until `reopen`.

        Raises:
            ValueError: a name in use or that cannot be a parameter's, a head where the model has no ``head=``, or
                classes that are no whole number of at least 1; TypeError: a head that is no module; RuntimeError: the
                model is prepared. Then nothing has changed.

        Cost: one delta for each adapted layer; the tasks there are do not matter.
        """
        self._unprepared("add_task")
        _folder.refuse_sharded(self, "add_task")
        with _folder.adding(self, task, _folder.given_head(self, classes, head)):
            for layer in self.conversion.layers.values():
                layer.add_task(task, delta=deltas)

    def remove_task(self, task: str) -> None:
        """Forgets all that belongs to a task. The ids of the tasks after it go down by one.

        Raises:
            ValueError: an unknown task; RuntimeError: the model is prepared.
        """
        self._unprepared("remove_task")
        self.context.remove(task)
        _folder.forget(self, task)

    def reopen(self, task: str, score: float | None = None) -> None:
        """Gives every closed layer of ``task`` a zero delta where it has none, and the score to train from again.

        A task loaded from a folder has no storage behind closed gates. Such a gate stays closed in training. Make
        optimizers afterwards: one that was made before does not have the new deltas.

        Args:
            task: a name.
            score: at least the threshold (with gate "raw": not 0), so that the deltas train; None: that of new tasks.

        Raises:
            ValueError: an unknown task, or a score that would leave gates closed; RuntimeError: the model is prepared.
            Then nothing has changed.
        """
        self._unprepared("reopen")
        self.context.check(task)
        if score is not None:
            gates.check_score("TapsModel.reopen: score", score, self.threshold, self.gate)
        for layer in self.conversion.layers.values():
            if not layer.is_open(task):
                layer.add_task(task)
                layer.scores[task].data.fill_(layer.initial_score if score is None else score)

    def task_parameters(self, task: str) -> list[dict[str, Any]]:
        """Two parameter groups of one task, as optimizers take them: "weights" and "scores".

        Joint training takes the groups of every task, and those of `train_base`.

        Raises:
            ValueError: an unknown task, or a pruned delta; RuntimeError: the model is prepared.

        >>> model = TapsModel(nn.Linear(2, 2), ["cubs"])
        >>> groups = model.task_parameters("cubs")
        >>> groups[1]["lr"] = 0.01  # scores at a rate of their own
        >>> optimizer = torch.optim.Adam(groups, lr=1e-3)
        """
        self._unprepared("task_parameters")
        self.context.check(task)
        layers = self.conversion.layers.values()
        owned = [(own, layer.path) for layer in layers for own in (layer.deltas, layer.bias_deltas) if task in own]
        weights = [parameter for own, path in owned for parameter in own.trained(task, path)]
        for module in self.modules_of(task).values():
            weights += module.parameters()
        scores = [parameter for layer in layers for parameter in layer.scores.trained(task, layer.path)]
        return [{"params": weights, "name": "weights"}, {"params": scores, "name": "scores"}]

    def train_base(self, mode: bool = True) -> list[dict[str, Any]]:
        """Joint TAPS: the tasks also train what they share, and all in one mixed batch; False: frozen again.

        ::

            W_t = base + I(s_t)·delta_t,   base = W0 + delta_shared

        W0 is the network's weight. The shared delta has no gate and multiplies every row, so it needs no tensor of its
        own: the base of each adapted layer starts as W0 and is trained. Its gradient is the shared delta's, the sum
        over all tasks. So the base is what it belongs to everywhere: a task folder holds none of it and is of the
        trained base (`fingerprint`), ``merge("base")`` is the shared backbone, which ``TapsModel`` adapts again.

        Weight decay draws the base to 0 where it would draw a separate delta to 0; leave it out to stay near W0.

        Two steps take less memory, one delta per task at a time: train the base alone (``add_task(..., deltas=False)``
        for each task), freeze it, then `reopen` and train task after task.

        Returns:
            A parameter group, "base", for the optimizer; frozen: none.

        Raises:
            RuntimeError: the model is prepared.

        Cost: a copy of the adapted weights, the model given stays as it is; in training one more gradient a layer.
        Source: TAPS, arXiv 2203.16708.

        >>> model = TapsModel(nn.Linear(2, 2), ["cubs", "cars"])
        >>> groups = [*model.task_parameters("cubs"), *model.task_parameters("cars"), *model.train_base()]
        >>> optimizer = torch.optim.Adam(groups, lr=1e-3)
        >>> loss = model(torch.randn(4, 2), tasks=[0, 1, 1, 0]).sum() + model.penalty(model.tasks)
        """
        self._unprepared("train_base")
        layers = self.conversion.layers.values()
        for layer in layers:
            layer.train_base(mode)
        return [{"params": [p for layer in layers for p in layer.base_parameters()], "name": "base"}] if mode else []

    def modules_of(self, task: str) -> dict[str, nn.Module]:
        """The task's own norms and head, by path."""
        head = [] if self.conversion.head is None else [self.conversion.head]
        return {module.path: module.tasks[task] for module in (*self.conversion.norms.values(), *head)}

    def penalty(
        self, task: str | Sequence[str], lam: float = 0.1, *, by: str = "layer", layers: int | None = None
    ) -> Tensor:
        """λ/L·Σ|s| over the L adapted layers, summed over the tasks named: add it to the loss.

        Args:
            task: a name, or several.
            lam: λ, at least 0; between 0.1 and 1 in the paper. More closes more gates.
            by: "layer", the paper's: every gate costs the same; or "size": λ·Σ (n_i/N)·|s_i|, where layer i has n_i of
                the N adapted weights. A large layer then closes first, and a task keeps many small layers instead of a
                few large ones (benchmarks/README.md, Accuracy).
            layers: L of "layer"; default: the number of adapted layers. (The authors' code divides by 52 in every
                network.)

        Raises:
            ValueError: an unknown task or ``by``, λ that is negative or not finite, L below 1 or with "size", a model
                without adapted layers.

        Source: TAPS, arXiv 2203.16708; the weighing by size is ours.
        """
        names = names_of(task)
        adapted = list(self.conversion.layers.values())
        if not adapted or not names:
            raise ValueError(
                f"TapsModel.penalty: there must be adapted layers and tasks, got {len(adapted)} and {names}"
            )
        if by not in ("layer", "size"):
            raise ValueError(f"TapsModel.penalty: by must be 'layer' or 'size', got {by!r}")
        if by == "size" and layers is not None:
            raise ValueError(f"TapsModel.penalty: layers must go with by='layer', got {layers} (by='size')")
        sizes = [layer.base.numel() for layer in adapted] if by == "size" else None
        scores = [[layer.scores[self.context.check(name)] for layer in adapted] for name in names]
        return torch.stack([gates.penalty(mine, lam, layers, sizes) for mine in scores]).sum()

    def merge(self, task: str) -> nn.Module:
        """An ordinary module with the weights of one task ("base": none), in storage of its own.

        Modules have their original types; nothing of taps_fast is in it.

        Raises:
            ValueError: an unknown task.

        Cost: a copy of the whole network, and a pass over the open deltas.
        """
        return plain_network(self, None if task == BASE_NAME else self.context.check(task))

    def fingerprint(self) -> str:
        """The identity of the base: what a task folder must have been saved with. The head is not part of it.

        Cost: all of the base is hashed, at 0.5 to 2 GB/s a core; `save_task` and `load_task` do so each time.
        """
        return store.fingerprint(_folder.whole(dict(_folder.base_tensors(self.model))))

    def save_task(self, task: str, folder: str | os.PathLike[str]) -> None:
        """Writes what ``task`` adds to the base: open deltas, scores, norms and head.

        Of an existing folder a task's two files are replaced, in one step; others stay. Warns where buffers of the base
        are not those that were given.

        Raises:
            ValueError: an unknown task; `taps_fast.TaskFolderError`: ``folder`` is a file; OSError: the disk refuses.

        Cost: `fingerprint`'s; a copy of the task's tensors on the host, hashed and written.
        """
        _training.check_buffers(self)
        tensors = _folder.whole(_folder.task_tensors(self, self.context.check(task)))
        meta = {"task": task, "fingerprint": self.fingerprint(), **_folder.task_meta(self, task)}
        store.save_task(folder, tensors, meta)

    @torch.inference_mode(False)
    def load_task(
        self, folder: str | os.PathLike[str], *, name: str | None = None, head: nn.Module | None = None
    ) -> Loaded:
        """Adds the task of a folder. Either all of it is loaded or nothing changes.

        Closed gates have no storage afterwards: see `reopen` for training on.

        Args:
            folder: what `save_task` wrote, over the same base (weights and dtype).
            name: the task's name here; default: the one it was saved under.
            head: for tasks with a head of their own making: a module like it, which is copied.

        Returns:
            How many tensors matched and how many layers are open; ``print`` it.

        Raises:
            taps_fast.TaskFolderError (a ValueError): not a whole task folder, or another base, threshold, gate,
                conversion.
            ValueError: a name in use; RuntimeError: the model is prepared.

        Cost: one read of the task, and `fingerprint`'s, each time: of 64 tasks the base is hashed 64 times.
        """
        self._unprepared("load_task")
        _folder.refuse_sharded(self, "load_task")
        return _folder.load(self, folder, name, head)

    @torch.inference_mode(False)
    def compress(self, task: str, format: str, *, rank: int | None = None, inputs: Tensor | None = None) -> Compression:
        """Replaces the open deltas of ``task`` by ones that take less memory.

        Scores, bias deltas, norms and head stay as they are. What a format trains can be trained on, from a delta of 0
        too: `task_parameters`. Signs and bytes do not change, only their scales do.

        Args:
            task: a name.
            format: "bits" (BitDelta: signs and one scale, 1 bit per weight), "int8" (a byte per weight, a scale for
                each output) or "lowrank" (two factors, by singular value decomposition).
            rank: of "lowrank"; a layer whose dense delta is no larger than its factors keeps it.
            inputs: what the model takes, to measure how far its output moves; None: not measured.

        Returns:
            A `Compression`: error and bytes, before and after, of each layer; ``print`` it.

        Raises:
            ValueError: an unknown task or format, a rank that is missing or out of place, a delta that is not finite
                or compressed already; RuntimeError: the model is prepared. Then nothing has changed.

        Cost: one pass over the deltas; "lowrank" one singular value decomposition per layer.
        Source: BitDelta, arXiv 2402.10193; LoRA, arXiv 2106.09685.
        """
        self._unprepared("compress")
        return _compress.compress_task(self, self.context.check(task), format, rank, inputs)

    @torch.inference_mode(False)
    def load_lora(
        self, folder: str | os.PathLike[str], name: str, classes: int | None = None, *, head: nn.Module | None = None
    ) -> Loaded:
        """Adds a task from a LoRA adapter that PEFT saved: its low-rank deltas behind open gates, all else the base's.

        A head that PEFT saved whole (``modules_to_save``) is the task's. Layers without an adapter are closed: `reopen`
        gives them a delta. See `taps_fast.peft.read_lora` for what of an adapter can be read.

        Args:
            folder: with adapter_config.json and adapter_model.safetensors.
            name: of the new task.
            classes, head: as in `add_task`.

        Raises:
            taps_fast.AdapterError (a ValueError): not a plain LoRA adapter, or one for other layers than this model's.
            ValueError: a name in use; RuntimeError: the model is prepared.
        """
        self._unprepared("load_lora")
        _folder.refuse_sharded(self, "load_lora")
        return _folder.load_lora(self, folder, name, classes, head)

    def sharing(self) -> Sharing:
        """The layer × task table, with parameters and bytes against separate models; ``.plot()`` draws it."""
        return _folder.sharing(self, self.tasks)
