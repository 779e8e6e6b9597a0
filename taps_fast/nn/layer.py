"""What every adapted layer is: a frozen base weight, and for each task a delta behind a gate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._call import Sources
from ..formats import Delta, Format
from ..stacked import Stack
from ..tasks import TaskBatch
from . import gates
from .compressed import CompressedDelta, apart, restored, side_by_side, value_of
from .context import Layout, Mix, Selection, TaskContext, names_of
from .gated import Frozen, Gated, rows_of, table_of, vector_of
from .owned import Owned, Scores, put
from .stand_in import StandIn

if TYPE_CHECKING:
    from typing_extensions import Self


class TapsLayer(StandIn):
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
    frozen: Frozen | None = None
    """Set while the model is prepared for inference."""

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
        self.baked: dict[str, Callable[[], Tensor]] = {}
        """Tasks whose "delta" is, for inference, their whole weight; and what reads the delta that was there."""

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

    def is_open(self, task: str) -> bool:
        """Whether the task's delta takes part; reads the score."""
        return bool(self._places([task], self.deltas.each([task])))

    def _places(self, tasks: Sequence[str], deltas: Sequence[Any]) -> list[int]:
        """Which of ``tasks``, which own ``deltas``, have an open gate; reads the scores."""
        if self.gate == "raw":
            return [t for t, delta in enumerate(deltas) if delta is not None]
        least = gates.as_float32(self.threshold)  # float32 against float32, as in `gates.coefficients`
        scores = self.scores.each(tasks)
        return [t for t, delta in enumerate(deltas) if delta is not None and scores[t].item() >= least]

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

    def gated(self, selection: Selection, *, grouped: bool = False) -> Gated:
        """Base, deltas, coefficients and bias for one forward; ``grouped``: with ids, even if no layer is open."""
        mix, frozen = selection.mixed, self.frozen
        if frozen is None:
            if self.baked:
                raise self._half_undone()
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                return self._sourced(selection)
            return self._open(selection) if self._scores_at_hand() else self._made(selection)
        if mix is None:
            return frozen.single[selection.task]
        if not frozen.mixed.deltas and not grouped:
            return frozen.single[None]
        return frozen.mixed._replace(tasks=mix.batch)

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
        mixed = Gated(self.base, deltas, table, bias, base_coeffs=base_coeffs).detached()
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

    def _half_undone(self) -> RuntimeError:
        return RuntimeError(f"{self.path}: its deltas must all be put back first, got some (model.unprepare() again)")

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

    def _scores_at_hand(self) -> bool:
        """Whether a score is read faster than computed with."""
        if self.gate != "ste" or self.base.device.type != "cpu" or torch.compiler.is_compiling():
            return False
        return type(self.base) in (Tensor, nn.Parameter)  # a subclass may have no values

    def _made(self, selection: Selection) -> Gated:
        """What autograd can follow."""
        return self._single(selection.task) if selection.mixed is None else self._mixed(selection.mixed)

    def _sourced(self, selection: Selection) -> Gated:
        """With gradients: what `_made` gives, but with the sources of coefficients and bias instead of a graph."""
        with torch.no_grad():
            gated = self._made(selection)
        if not gated.deltas:
            return gated._replace(base=self.base, bias=self.base_bias)
        if any(isinstance(delta, Format) for delta in gated.deltas):
            return self._made(selection)
        tasks: Any = (selection.task,) if selection.mixed is None else selection.mixed.tasks
        places = tuple([t for t, _ in gated.pairs or [(0, 0)]])
        tasks = [tasks[t] for t in places]
        # Read once more: what a parametrization makes of parameters must have its graph.
        deltas, scores, base_bias = self.deltas.each(tasks), self.scores.each(tasks), self.base_bias
        bias_deltas = [] if base_bias is None else self.bias_deltas.each(tasks)

        def traced() -> tuple[Tensor, Tensor | None]:
            again = self._made(selection)
            return again.coeffs, again.bias

        sources = Sources(places, scores, bias_deltas, base_bias, traced)
        return gated._replace(base=self.base, deltas=deltas, sources=sources)

    def _open(self, selection: Selection) -> Gated:
        """Without gradients, with scores at hand: the open deltas alone, times 1."""
        dtype, bias, mix = self.base.dtype, self.base_bias, selection.mixed
        if mix is None:
            task = selection.task
            if task is None:
                return self._single(None)
            held = self.deltas.each((task,))
            if not self._places((task,), held):
                return self._single(None if task in self.scores else task)
            if bias is not None:
                bias = bias + self.bias_deltas[task]
            return Gated(self.base, [value_of(held[0])], table_of(dtype, 1, (0,)).view(1), bias)
        held = self.deltas.each(mix.tasks)
        places = self._places(mix.tasks, held)
        if not places:
            return self._single(None)
        if bias is not None:
            rows, more = [torch.zeros_like(bias)] * (len(mix.tasks) + 1), self.bias_deltas.each(mix.tasks)
            for t in places:
                rows[t] = more[t]
            bias = torch.stack(rows).add_(bias)
        deltas = [value_of(held[t]) for t in places]
        return Gated(self.base, deltas, table_of(dtype, len(mix.tasks), tuple(places)), bias, mix.batch)

    def _coefficients(self, scores: Sequence[Tensor]) -> Tensor:
        wide = torch.float64 if self.base.dtype == torch.float64 else torch.float32
        if not scores:
            return torch.zeros(0, dtype=wide, device=self.base.device)
        if not torch.is_grad_enabled() and self._scores_at_hand():
            least = gates.as_float32(self.threshold)
            return vector_of(wide, tuple([score.item() >= least for score in scores]))
        # Compared as float32 in every model: in float64 the threshold would be another number.
        table = scores[0][None] if len(scores) == 1 else torch.stack(list(scores))
        return gates.coefficients(table, self.threshold, self.gate).to(wide)

    def _single(self, task: str | None) -> Gated:
        base, bias = self.base, self.base_bias
        if task is None:
            return Gated(base, [], self._coefficients([]), bias)
        scores, held = self.scores.each((task,)), self.deltas.each((task,))
        if scores[0] is None:
            raise ValueError(f"{self.path}: task must be one it has, got {task!r}")
        if held[0] is None:
            return Gated(base, [], self._coefficients([]), bias)
        coeffs = self._coefficients(scores)
        if bias is not None:
            bias = torch.addcmul(bias, coeffs, self.bias_deltas[task]).to(bias.dtype)
        if task in self.baked:
            return Gated(held[0], [], self._coefficients([]), bias)
        return Gated(base, [value_of(held[0])], coeffs, bias)

    def _mixed(self, mix: Mix) -> Gated:
        """A row of coefficients for each task of the mix: its gate at its own delta, 0 elsewhere."""
        batch, tasks = mix
        places = [t for t, task in enumerate(tasks) if task in self.deltas]
        mine = [tasks[t] for t in places]
        if not mine:
            return self._single(None)
        coeffs = self._coefficients(self.scores.each(mine))
        table = torch.diag(coeffs)
        bias = self.base_bias
        if bias is not None:
            deltas = torch.stack([self.bias_deltas[task] for task in mine])
            biases = torch.addcmul(bias, coeffs[:, None], deltas).to(bias.dtype)
            bias = torch.cat([rows_of(biases, mine, tasks, bias), bias[None]])
        table = rows_of(table, mine, tasks, coeffs.new_zeros(len(mine)))
        pairs = [(t, k) for k, t in enumerate(places)]
        return Gated(self.base, [self.delta(task) for task in mine], table, bias, batch, pairs)

    def place(
        self, x: Tensor, gated: Gated, selection: Selection, batch_dim: int | None
    ) -> tuple[TaskBatch | None, int]:
        """The ids along x's batch axis, and that axis: ``batch_dim`` where the caller said ids, else the probe's."""
        mix = selection.mix
        if mix is None or (gated.tasks is None and batch_dim is None):
            return None, 0
        if batch_dim is not None and not -x.dim() <= batch_dim < x.dim():
            raise ValueError(f"{self.path}: batch_dim must be an axis of its input, got {batch_dim} ({tuple(x.shape)})")
        layout = self.layout(x, mix.batch) if batch_dim is None else Layout(batch_dim)
        spread = layout.spread(mix.batch, x.shape[layout.axis], self.path)  # counts them, needed or not
        return (None, 0) if gated.tasks is None else (spread, layout.axis)

    def run(self, operation: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """``operation``, with this layer named in what it raises."""
        try:
            return operation(*args, **kwargs)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{self.path}: {error}") from error
