"""What every adapted layer is: a frozen base weight, and for each task a delta behind a gate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..formats import Delta, Format
from ..stacked import Stack
from . import gates
from .compressed import CompressedDelta, apart, restored, side_by_side, value_of
from .context import TaskContext, names_of
from .gated import Frozen, Gated, Gating
from .owned import Owned, Scores, put

if TYPE_CHECKING:
    from typing_extensions import Self


class TapsLayer(Gating):
    """Base of `FastTapsLinear`, `FastTapsConv2d` and wrapped layers.

    ::

        W_t = base + I(s_t)·delta_t,   b_t = base_bias + I(s_t)·bias_delta_t

    Parameters: ``base`` and ``base_bias`` are frozen; each task trains ``deltas.<task>``,
    ``bias_deltas.<task>`` (where the layer has a bias) and ``scores.<task>``. A task loaded with a closed gate
    has a score and no delta, and costs nothing. A compressed delta (`set_delta`) is a module of that name, which holds
    the tensors of its format. Loading a state dict gives each task whose score is in it the storage that it has there,
    dense, compressed or (if the base is in it too) none, so optimizers are to be made afterwards.
    """

    macs: int | None = None
    """Multiply-adds of the base for one sample, as seen by the probe."""

    def _start(
        self,
        context: TaskContext | None,
        threshold: float = 0.1,
        initial_score: float | None = None,
        gate: str = "ste",
    ) -> None:
        name = type(self).__name__
        self.initial_score = gates.starting_score(name, threshold, initial_score, gate)
        self._locate_in(TaskContext(name, alone=True) if context is None else context, name)
        self.threshold, self.gate = threshold, gate
        self.deltas, self.bias_deltas, self.scores = Owned(), Owned(), Scores()
        self.baked = {}

    @classmethod
    def _adapting(
        cls, module: nn.Module, tasks: str | Iterable[str], context: TaskContext | None, *settings: Any
    ) -> Self:
        """A layer whose base is ``module``'s parameters, in the same storage; ``settings`` are `_start`'s."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._start(context, *settings)
        layer._take(module)
        layer.add_tasks(tasks)
        return layer.train(module.training)

    def add_tasks(self, tasks: str | Iterable[str]) -> None:
        """Registers new tasks with a layer that is used alone (a model's layers get theirs from the model)."""
        for task in names_of(tasks):
            with self.context.adding(task, self._forget):
                self.add_task(task)

    @torch.inference_mode(False)
    def add_task(self, task: str, *, score: float | None = None, delta: bool = True) -> None:
        """Gives ``task`` a score and, with ``delta``, a zero delta, where it has none yet."""
        if task not in self.scores:
            start = self.initial_score if score is None else score
            self.scores[task] = nn.Parameter(torch.tensor(start, dtype=torch.float32, device=self.base.device))
        if delta and task not in self.deltas:
            self.deltas[task] = nn.Parameter(torch.zeros_like(self.base))
            if self.base_bias is not None:
                self.bias_deltas[task] = nn.Parameter(torch.zeros_like(self.base_bias))

    def close(self, task: str) -> None:
        """Forgets the deltas of ``task``, whose score stays: the gate of a task without storage is closed."""
        self._forget(task, self.deltas, self.bias_deltas)

    def remove_task(self, task: str) -> None:
        """Forgets all that ``task`` has here, and in a layer that is used alone its name."""
        if self.context.alone:
            self.context.remove(task)
        self._forget(task)

    def _forget(self, task: str, *places: Owned) -> None:
        for owned in places or (self.deltas, self.bias_deltas, self.scores):
            if task in owned:
                del owned[task]

    def train_base(self, mode: bool = True) -> None:
        """Whether the base trains too: it is then W0 + the delta that all tasks share, in storage of its own."""
        for parameter in self.base_parameters():
            if mode:
                parameter.data = parameter.detach().clone()
            parameter.requires_grad_(mode)

    def reset_parameters(self) -> None:
        """Starts anew: the base as the ordinary layer initialises it, in storage of its own, zero deltas, first scores.

        Closed gates without storage stay so; a compressed delta becomes a dense one.
        """
        self._unprepared("reset_parameters")
        plain: Any = self.merged(None)
        plain.reset_parameters()
        for own, new in zip(self.base_parameters(), (plain.weight, plain.bias), strict=False):
            own.data = new.data
        for task, held in list(self.deltas.items()):
            if isinstance(held, CompressedDelta):
                self.set_delta(task, torch.zeros_like(self.base))
        with torch.no_grad():
            for delta in (*self.deltas.values(), *self.bias_deltas.values()):
                delta.zero_()
            for score in self.scores.values():
                score.fill_(self.initial_score)

    def delta(self, task: str) -> Delta:
        """The task's delta, dense or in its format."""
        return value_of(self.deltas[task])

    def set_delta(self, task: str, delta: Delta) -> None:
        """Replaces the delta of ``task``, which has one, by a copy of one of the same shape, dense or in a format."""
        if task not in self.deltas:
            raise ValueError(f"{self.path}: task must be one with a delta, got {task!r}")
        if tuple(delta.shape) != tuple(self.base.shape):
            raise ValueError(f"{self.path}: delta must be {tuple(self.base.shape)} like base, got {tuple(delta.shape)}")
        delta = delta.to(device=self.base.device, dtype=self.base.dtype).detach().clone()
        held: Any
        if isinstance(delta, Format):
            held = CompressedDelta(delta, (d for d in self.deltas.values() if isinstance(d, CompressedDelta)))
            held.train(self.training)
        else:
            held = nn.Parameter(delta)
        del self.deltas[task]
        self.deltas[task] = held

    @property
    def fan_in(self) -> int:
        """Products that make one output."""
        return self.base[0].numel()

    def effective(self, task: str | None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of ``task`` (None: the base), summed in float32 and rounded once."""
        if task in self.baked and self.frozen is None:
            raise self._half_undone()
        gated = self._single(task)
        if not gated.deltas:
            return gated.base, gated.bias
        delta = gated.deltas[0]
        delta = delta.dense(self.base.dtype) if isinstance(delta, Format) else delta
        return (self.base + gated.coeffs * delta).to(self.base.dtype), gated.bias

    @torch.no_grad()
    def freeze(self, tasks: Sequence[str]) -> None:
        """Makes the tables of every selection of ``tasks`` once; until `thaw`, parameters are not looked at again."""
        opened = [task for task in tasks if self.is_open(task)]
        deltas = side_by_side([self.deltas[task] for task in opened])  # first: single tasks see the same storage
        single = {task: self._single(task if task in opened else None).detached() for task in (None, *tasks)}
        coeffs = self._coefficients(self.scores.each(opened))
        baked = torch.tensor([task in self.baked for task in opened], device=coeffs.device)
        pairs = [(tasks.index(task), k) for k, task in enumerate(opened)]
        table, scales = coeffs.new_zeros(len(tasks), len(opened)), coeffs.new_ones(len(tasks))
        for (t, k), c, whole in zip(pairs, coeffs, baked, strict=True):
            table[t, k] = torch.where(whole, 1.0, c)
            scales[t] = torch.where(whole, 0.0, 1.0)
        bias = self.base_bias
        if bias is not None and opened:
            bias = torch.stack([b for task in (*tasks, None) if (b := single[task].bias) is not None])
        base_coeffs = scales if self.baked else None
        # Dense ones need it for gradients alone; of others a device, which reads no coefficient, takes what is listed.
        listed = pairs if isinstance(deltas, Stack) or any(isinstance(d, Format) for d in deltas) else None
        mixed = Gated(self.base, deltas, table, bias, pairs=listed, base_coeffs=base_coeffs).detached()
        self.frozen = Frozen(single, mixed)

    @torch.no_grad()
    def thaw(self) -> None:
        """Puts deltas back where whole weights are, and looks at the parameters again in every forward.

        What cannot be read changes nothing. An interrupt while they are put back leaves a layer that refuses to run.
        """
        originals = {task: original() for task, original in self.baked.items()}
        if self.frozen is not None and isinstance(self.frozen.mixed.deltas, Stack):
            apart(self.deltas.values())
        self.frozen = None
        for task, delta in originals.items():
            put(self.deltas[task], delta.to(self.base.device, copy=True))  # copies of the model have the same original
        self.baked.clear()

    @torch.no_grad()
    def bake(self, task: str, original: Callable[[], Tensor]) -> None:
        """Puts the whole weight of ``task`` where its dense delta was, which ``original`` reads from then on."""
        whole = self.effective(task)[0]
        self.baked[task] = original  # first, so that an interrupt finds what to put back
        put(self.deltas[task], whole)

    def original(self, task: str) -> Delta:
        """The delta of ``task``, also while its place holds a whole weight."""
        return self.baked[task]() if task in self.baked else self.delta(task)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As ``nn.Module.state_dict``; while the model is prepared too it holds the deltas."""
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        for task, original in self.baked.items():
            state[f"{prefix}deltas.{task}"] = original()
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self._unprepared("load_state_dict")
        if not hasattr(self.base, "full_tensor"):  # what is sharded already does not learn of new parameters
            self._make_room(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.inference_mode(False)
    def _make_room(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Gives each task whose score is in a state dict the storage that it has there."""
        whole = any(prefix + name in state_dict for name in (*self._stored, *self._stored.values()))  # not scores alone
        copies: dict[tuple[int, torch.Size], Tensor] = {}  # a tensor that several deltas hold together stays one
        for task in self.scores:
            if f"{prefix}scores.{task}" not in state_dict:
                continue
            name, (held,) = f"{prefix}deltas.{task}", self.deltas.each([task])
            parts = {key[len(name) + 1 :]: t for key, t in state_dict.items() if key.startswith(name + ".")}
            if name in state_dict:
                if isinstance(held, CompressedDelta):
                    self._forget(task, self.deltas)
                self.add_task(task)
            elif not parts:
                if whole and f"{prefix}bias_deltas.{task}" not in state_dict:
                    self.close(task)
            elif not (isinstance(held, CompressedDelta) and held.takes(parts)):
                own = {key: copies.setdefault((t.data_ptr(), t.shape), t.clone()) for key, t in parts.items()}
                found = restored(self.base.shape, own)
                if found is not None:
                    self.add_task(task)
                    self.set_delta(task, found)

    def run(self, operation: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """``operation``, with this layer named in what it raises."""
        try:
            return operation(*args, **kwargs)
        except (TypeError, ValueError) as error:
            place = self.path if self.context.alone else f"layer {self.path!r}"
            raise type(error)(f"{place}: {error}") from error
