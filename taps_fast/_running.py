"""How a `TapsModel` runs: one selection of tasks a forward, prepared for inference, in slices."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from itertools import chain
from numbers import Number
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from . import _prepare, _statistics, _training
from ._folder import base_tensors
from ._prepare import Preparation
from ._probe import batch_of, probe, probe_first
from ._problem import is_transformed, refuse_transforms
from ._slices import Slicing, dims_of, images_a_slice, in_slices
from .convert import Conversion
from .nn import TaskContext
from .nn.context import PREPARED, Mix, Running, Selection, TaskNames
from .nn.per_task import rest
from .tasks import TaskBatch

if TYPE_CHECKING:
    from typing_extensions import Self


class RunningModel(nn.Module):
    """The part of `TapsModel` that runs forwards."""

    model: nn.Module
    context: TaskContext
    conversion: Conversion
    parting: RemovableHandle
    """Of the hook `part` on ``model``."""

    def __init__(self, slice: int | str | None) -> None:
        super().__init__()
        self.probed = False
        self.slicing: Slicing | None = None
        self.meeting: str | None = None
        """Where samples of one batch change each other, as the probe saw it."""
        self.settled = self.looked = False
        """Whether what training mode changes of the base, and of samples, has been found."""
        self.meeting_in_training: str | None = None
        self.given: dict[str, Any] = {}
        """The checksums of the base's buffers, as they were given."""
        self.register_load_state_dict_post_hook(_training.note_buffers)  # type: ignore[no-untyped-call]
        self.prepared: Preparation | None = None
        self.turns = _prepare.Turns()
        if not (slice in ("auto", None) or (isinstance(slice, int) and slice >= 0)):
            raise ValueError(f"TapsModel: slice must be 'auto', None or a number of samples, got {slice!r}")
        self.slice = slice

    def prepare_inference(
        self, *args: Any, bake: bool | None = None, originals: str = "disk", **kwargs: Any
    ) -> Preparation:
        """Makes forwards in eval mode faster, with the same results but for rounding; ``print`` what it returns.

        * *Baked*: behind an open gate the whole weight takes the place of the delta, at the same memory, so that a
          task's rows need one product. `bake` None: for weights of 32 bits and more; 16 bits would round the delta.
        * *Folded*: a batch norm (in eval mode a scale and a shift for each task and channel) and a ReLU, ReLU6, SiLU
          or GELU are computed with the convolution or linear layer before them, where `torch.fx` proves that nothing
          else reads its output. The first forward verifies that by running both ways; a compiled one does not, so give
          an input here before ``torch.compile``: what is not verified runs unfolded in it.
        * *Frozen*: what each forward made of scores, biases and folded norms is made once, and compressed deltas of
          one format lie side by side (`taps_fast.stacked`), so that many tasks cost a layer no more calls. Parameters
          that change afterwards are not seen until `unprepare` or `train`, which undo all of this bit for bit.

        Tasks cannot be added, loaded or removed meanwhile, and what is written into deltas is lost. Saved tasks and
        state dicts hold the original deltas. A prepared model is not for training: a backward through it, which gives
        only heads and what is not adapted their gradients, warns once.

        Other threads may run the model, save and merge its tasks all the while: this waits for their forwards, and they
        for this. That is not so for compiled models and for parts that are called alone.

        Deltas get storage of their own, now and when this is undone. What else holds the old one keeps it, and its
        values: a state dict that was taken before, a model or a process that shares it.

        Args:
            *args, **kwargs: an input of the model, to verify at once instead of in the first forward.
            bake: True, False, or None for the rule above.
            originals: where the deltas are meanwhile: "disk" (a temporary folder), "memory" (of the host: on a CPU
                this doubles the memory of open deltas) or "discard" (then nothing can be saved or undone).

        Raises:
            ValueError: a model in training mode, or an unknown ``originals``. RuntimeError: within a forward of it.
            Whatever the model raises for the input. After any exception the model is as it was, unless its deltas are
            discarded: then load it again.

        Cost: one pass over the deltas, which are written to disk or copied once; tables of [tasks + 1, channels].

        >>> import torch
        >>> from taps_fast import TapsModel
        >>> model = TapsModel(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), ["cubs", "cars"]).eval()
        >>> report = model.prepare_inference(torch.randn(1, 3, 8, 8))
        >>> [(row.path, row.reason) for row in report.of("folded")]
        [('0', 'with 1 and relu')]
        >>> model.unprepare()
        """
        return _prepare.prepare(self, args, kwargs, bake=bake, originals=originals)

    def unprepare(self) -> None:
        """Undoes `prepare_inference`; without one it does nothing.

        Raises:
            RuntimeError: the deltas were discarded, or their folder is gone; or this is within a forward.
            Whatever reading them from disk raises. The model then runs as before, partly undone, and this can be called
            again. A layer that an interrupt left with only some of its deltas refuses to run until then.
        """
        _prepare.unprepare(self)

    def train(self, mode: bool = True) -> Self:
        """As ``nn.Module.train``; training undoes `prepare_inference`.

        In training mode the base's norms stay in eval mode, and so do other modules of the base whose buffers it would
        move: the first forward in it finds them.
        ``torch.optim.swa_utils.update_bn`` resets the statistics of every task, not only of those that its loader
        shows, and leaves the base's as they are.
        """
        if mode:
            self.unprepare()
        super().train(mode)
        rest(self.model, self.conversion.resting)
        return self

    def _unprepared(self, function: str) -> None:
        if self.prepared is not None:
            raise RuntimeError(f"TapsModel.{function}: {PREPARED}")

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        with self.turns.forward():
            return super().state_dict(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._unprepared("to")
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def _load_from_state_dict(self, *args: Any) -> None:
        self._unprepared("load_state_dict")
        super()._load_from_state_dict(*args)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As ``nn.Module.load_state_dict``; see `TapsModel` for what becomes of tasks.

        Raises:
            RuntimeError: keys that are missing or not expected, tasks that were not added among them.
        """
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            places = {f"model.{path}.scores" for path in self.conversion.layers}
            scores = (key.rpartition(".") for key in state_dict)
            unknown = dict.fromkeys(t for place, _, t in scores if place in places and t not in self.context.tasks)
            if not unknown:
                raise
            names, known = ", ".join(unknown), ", ".join(self.context.tasks)
            raise RuntimeError(
                f"TapsModel.load_state_dict: state_dict must hold no task but the model's, got {names} (call add_task "
                f"for each task first; tasks: {known or 'none'})\n{error}"
            ) from None

    def probe(self, *args: Any, batch_dim: int = 0, **kwargs: Any) -> None:
        """Finds which axis of each layer's input carries the batch, so that samples can be told apart.

        Also finds whether what a task changes of one sample would reach its neighbours, as in attention over the batch
        axis: mixed batches of such a model are refused, with the first module that shows it; one task a batch runs.
        Batch norms without running statistics do not count where tasks have their own: each goes by its own rows.

        Runs the base six times on one and two samples made from this input, without gradients, in eval mode;
        buffers and random states stay as they are. The first mixed forward does this by itself, except under
        ``torch.compile``.

        In training mode a network may do something else. So the first forward there runs once more beforehand, if the
        base has buffers: modules that move theirs rest from then on. The first mixed one runs on six and eight samples,
        four times, to see that samples stay apart and keep their order. Before ``torch.compile`` run one such batch.

        What two samples do not show is not seen: give a batch whose first two samples differ in all that steers a
        forward, such as their length. Of a batch of one sample the second is made up, of the same length.

        Args:
            *args, **kwargs: a typical input of the model, of any batch size.
            batch_dim: the axis that carries the batch in the first tensor given.

        Raises:
            ValueError: inputs whose batch axis cannot be told, or that the model cannot take with one sample.
        """
        first = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
        if first is None:
            raise ValueError("TapsModel.probe: the input must hold a tensor, got none")
        if first.numel() == 0:
            raise ValueError(f"TapsModel.probe: the input must hold a sample, got {tuple(first.shape)}")
        with self.turns.forward():
            probe(self, args, kwargs, batch_of(args, kwargs, first.shape[batch_dim], batch_dim))

    def _apart(self, selection: Selection) -> None:
        if selection.mixed is None:
            return
        mode, where = "", self.meeting
        if where is None and self.training:
            mode, where = ", or take each other's places, in training mode", self.meeting_in_training
        if where is not None:
            raise ValueError(
                "TapsModel: samples must not change each other in a mixed batch, got a model in which one task's "
                f"samples change another's{mode}: {where} shows it (run one task a batch, or exclude the "
                "modules before that place)"
            )

    def forward(self, *args: Any, tasks: TaskNames | None = None, **kwargs: Any) -> Any:
        """The model's output, with the weights of ``tasks``.

        Args:
            *args, **kwargs: what the model takes.
            tasks: one name for all samples ("base": none); a list of B names, ids or None (the base); a [B] tensor of
                ids, which index `tasks` (-1: the base) and do not recompile a compiled model; or a `TaskBatch`.
                Default: those of `running`, else the task of `set_task`, else the only one, else (there is none) the
                base.

        Returns:
            What the model returns. In a mixed batch outputs are padded with -inf to the widest head, the base's
            included: right for softmax and cross entropy with class indices; for label smoothing, soft labels and
            binary cross entropy cut each task's rows to its own of `widths`. A label beyond the outputs of a sample's
            own task makes the loss infinite. Tasks that the batch lacks get no gradient where names or ids are on the
            host, and zeros for ids on a device, a `TaskBatch` and in compiled models.

        Raises:
            ValueError: an unknown task, ids out of range or not one a sample, several tasks and none said, a layer
                whose batch axis is not known, samples that would change each other (see `probe`).
            TypeError: tasks that are neither names nor integers.
        """
        if is_transformed():
            refuse_transforms("TapsModel")
        if torch.compiler.is_compiling():
            return self._forward(args, kwargs, tasks)
        with self.turns.forward():
            return self._forward(args, kwargs, tasks)

    def _forward(self, args: Any, kwargs: Any, tasks: TaskNames | None) -> Any:
        # Ids go to the device once here, not once a layer.
        first = next((t for t in chain(args, kwargs.values(), self.parameters()) if isinstance(t, Tensor)), None)
        selection = self.context.active if tasks is None else None  # of `running`
        if selection is None:
            selection = self.context.resolve(tasks, None if first is None else first.device)
        compiling = torch.compiler.is_compiling()
        if self.training and not compiling and not self.settled:
            _training.settle(self, selection, args, kwargs)
        if selection.mix is None or compiling:
            self._apart(selection)
            return self._run(selection, args, kwargs)
        count = selection.mix.batch.size
        if count and not self.probed:
            probe_first(self, args, kwargs, count)
        axes = self.input_axes(args, kwargs, count)
        if count and self.training and not self.looked and selection.mixed is not None:
            _training.look(self, args, kwargs, count)
        self._apart(selection)
        if first is not None and axes is not None and not self.training:
            most = self.slice_of(first, count, selection.mix.batch)
            if most is not None:
                return self._in_slices(selection.mix, args, kwargs, axes, most)
        return self._run(selection, args, kwargs)

    def running(self, tasks: TaskNames) -> contextlib.AbstractContextManager[None]:
        """Within, all that runs the network runs it with ``tasks``, in this thread: methods such as ``generate`` too.

        A mixed batch has one id a sample in each forward: for beam search, which repeats samples, repeat their ids.

        Args:
            tasks: as `forward` takes them.

        Raises:
            ValueError: an unknown task, or samples that would change each other (see `probe`).
            RuntimeError: what a forward finds out first is not known: of a mixed batch call `probe`, and in training
                mode run a forward of this kind once.

        >>> import torch
        >>> from taps_fast import TapsModel
        >>> model = TapsModel(nn.Sequential(nn.Linear(4, 4)), ["cubs", "cars"]).eval()
        >>> x = torch.randn(3, 4)
        >>> model.probe(x)
        >>> with model.running(["cubs", "cars", "cubs"]):
        ...     for _ in range(2):
        ...         x = x + model.model(x)
        """
        found = next((p.device for p in self.parameters()), None)
        selection = self.context.resolve(tasks, found)
        known = self.settled or not self.training
        if selection.mixed is not None:
            known = self.probed and (self.looked or not self.training)
        if not known:
            raise RuntimeError(
                "TapsModel.running: the model must have been probed for a mixed batch, and in training mode have run "
                "a forward of this kind, got one that has not (call model.probe(...), or model(..., tasks=...) once)"
            )
        self._apart(selection)
        return Running(self.context, selection)

    def _run(self, selection: Selection, args: Any, kwargs: Any) -> Any:
        previous = self.context.enter(selection)
        try:
            output = self.model(*args, **kwargs)
        finally:
            self.context.enter(previous)
        report = self.prepared
        if report is not None and not report.trained and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            _prepare.watch_backward(self, report, output)
        return output

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """As ``nn.Module.requires_grad_``; a base that trains is in storage of its own from then on.

        So the network that was given stays as it is. To train the tasks and what they share, `train_base`.

        Raises:
            RuntimeError: it is to train, and the model is prepared.
        """
        if requires_grad:
            self._unprepared("requires_grad_")
            for _, parameter in base_tensors(self.model, head=True):
                if type(parameter) is nn.Parameter and not parameter.requires_grad:
                    parameter.data = parameter.detach().clone()
        return super().requires_grad_(requires_grad)

    def slice_of(self, x: Tensor, count: int, batch: TaskBatch | None = None) -> int | None:
        """How many samples of an input x [``count`` samples, …] run together in a mixed eval batch; None: all."""
        return images_a_slice(self.slice, self.slicing, x, count, batch)

    def input_axes(self, args: Any, kwargs: Any, count: int) -> list[int | None] | None:
        """The batch axis of each part of an input of ``count`` samples; None: it is unlike the one that was probed.

        A part that had no batch axis there and has one of that size here counts as unlike: it may have got one. So does
        an object, such as a cache, which the samples of one forward share.

        Raises:
            ValueError: an input of another number of samples.
        """
        leaves = tree_leaves((args, kwargs))
        axes, dims = ([], None) if self.slicing is None else self.slicing[:2]
        pairs = [(leaf, a) for leaf, a in zip(leaves, axes, strict=False) if a is not None and isinstance(leaf, Tensor)]
        sizes = {leaf.shape[a] for leaf, a in pairs if a < leaf.dim()}
        alike = dims_of(leaves) == dims
        if count not in sizes:
            if alike:
                found = " and ".join(map(str, sorted(sizes)))
                raise ValueError(
                    f"TapsModel: tasks must have one id a sample, got {count} ids and an input of {found} samples"
                )
            batch_of(args, kwargs, count)
        shared = [leaf for leaf, a in zip(leaves, axes, strict=False) if a is None and isinstance(leaf, Tensor)]
        plain = all(leaf is None or isinstance(leaf, (Tensor, str, Number)) for leaf in leaves)
        return axes if alike and plain and sizes == {count} and all(count not in t.shape for t in shared) else None

    def _in_slices(self, mix: Mix, args: Any, kwargs: Any, axes: list[int | None], most: int) -> Any:
        assert self.slicing is not None and self.slicing.output_axes is not None

        def run(samples: slice | Tensor, own_args: Any, own_kwargs: Any) -> Any:
            return self._run(self.context.part(mix, samples), own_args, own_kwargs)

        return in_slices(run, mix.batch, args, kwargs, axes, self.slicing.output_axes, most)

    def share_statistics(self, group: Any = None) -> None:
        """Gives all processes the same running statistics of batch norms, of which each has moved its own in training.

        They become the average over the processes, each weighted by the batches that it has counted since all had the
        same; counted batches become their sum. Statistics of a task that nobody trained stay as they are. Tasks and
        state dicts must have come to all processes alike.

        To be called in every process before saving or evaluating (`TapsModel` says how processes train); without a
        process group it does nothing.

        Args:
            group: the processes, as ``torch.distributed`` takes them; None: all.

        Cost: one all-reduce of two numbers a channel and task.
        """
        self._unprepared("share_statistics")
        _statistics.share(self, group)

    def checkpoint_context(self) -> tuple[Any, Any]:
        """``context_fn`` for ``torch.utils.checkpoint``: the recomputation sees the tasks of this forward."""
        return contextlib.nullcontext(), Running(self.context, self.context.active)
