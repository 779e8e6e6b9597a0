"""What a layer hands to its operator for one selection of tasks: which deltas, times what, and with which bias."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._call import How, Sources
from ..formats import Delta, Format
from ..stacked import Stack
from ..tasks import TaskBatch
from . import gates
from .compressed import value_of
from .context import Layout, Mix, Selection
from .stand_in import StandIn


class Gated(NamedTuple):
    """The arguments that `delta_linear` and `delta_conv2d` take for one selection."""

    base: Tensor
    deltas: Sequence[Delta]
    coeffs: Tensor
    bias: Tensor | None
    tasks: TaskBatch | None = None
    pairs: list[tuple[int, int]] | None = None
    base_coeffs: Tensor | None = None
    sources: Sources | None = None

    @property
    def weight(self) -> tuple[Tensor, Sequence[Delta], Tensor, Tensor | None]:
        """base, deltas, coeffs and bias."""
        return self[:4]

    def how(self, batch: TaskBatch | None, axis: int = 0, **follows: Any) -> How:
        """The arguments by name, for the ids along the input's batch axis; ``follows`` is an `Epilogue`'s options."""
        return How(batch, self.base_coeffs, self.pairs, axis, **follows, sources=self.sources)

    def detached(self) -> Gated:
        """The same values, of which nothing is recorded."""
        bias = None if self.bias is None else self.bias.detach()
        deltas = self.deltas if isinstance(self.deltas, Stack) else [delta.detach() for delta in self.deltas]
        return self._replace(base=self.base.detach(), deltas=deltas, coeffs=self.coeffs.detach(), bias=bias)


class Frozen(NamedTuple):
    """What `Gated` is for every selection, made once for inference."""

    single: dict[str | None, Gated]
    mixed: Gated
    """Of all tasks; lacks ``tasks``, which come with each batch."""


@functools.lru_cache(maxsize=4096)
def table_of(dtype: torch.dtype, tasks: int, places: tuple[int, ...]) -> Tensor:
    """Coefficients [tasks, open ones], 1 where an open one is its own, in what `delta_linear` uses with ``dtype``.

    Kept, and never written: layers whose gates are alike share it.
    """
    with torch.inference_mode(False):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        table = torch.zeros(tasks, len(places), dtype=wide, device="cpu")
        for k, t in enumerate(places):
            table[t, k] = 1.0
    return table


@functools.lru_cache(maxsize=4096)
def vector_of(dtype: torch.dtype, opened: tuple[bool, ...]) -> Tensor:
    """Coefficients [tasks], 1 where a gate is open and 0 elsewhere; kept as `table_of` is."""
    with torch.inference_mode(False):
        return torch.tensor(opened, dtype=dtype, device="cpu")


def rows_of(table: Tensor, mine: Sequence[str], tasks: Sequence[str], other: Tensor) -> Tensor:
    """A row for each of ``tasks`` from a table that has one for each of ``mine``; ``other`` for the rest."""
    if len(mine) == len(tasks):
        return table
    rows = dict(zip(mine, table.unbind(), strict=True))
    return torch.stack([rows.get(task, other) for task in tasks])


class Gating(StandIn):
    """The part of `TapsLayer` that makes of its parameters and a selection what an operation takes."""

    threshold: float
    gate: str
    baked: dict[str, Callable[[], Tensor]]
    """Tasks whose "delta" is, for inference, their whole weight; and what reads the delta that was there."""
    frozen: Frozen | None = None
    """Set while the model is prepared for inference."""

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

    def _opened(self) -> str:
        """Which tasks have an open gate, for people; reads the scores."""
        try:
            return ", ".join(f"{task} {'open' if self.is_open(task) else 'closed'}" for task in self.scores)
        except RuntimeError:  # on the meta device there are no scores to read
            return ", ".join(self.scores)

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

    def _half_undone(self) -> RuntimeError:
        return RuntimeError(f"{self.path}: its deltas must all be put back first, got some (model.unprepare() again)")

    def _scores_at_hand(self) -> bool:
        """Whether a score is read faster than computed with."""
        if self.gate != "ste" or self.base.device.type != "cpu" or torch.compiler.is_compiling():
            return False
        return type(self.base) in (Tensor, nn.Parameter)  # a subclass may have no values

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

    def _made(self, selection: Selection) -> Gated:
        """What autograd can follow."""
        return self._single(selection.task) if selection.mixed is None else self._mixed(selection.mixed)

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
        return Gated(self.base, [value_of(self.deltas[task]) for task in mine], table, bias, batch, pairs)

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
