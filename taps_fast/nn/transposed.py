"""Linear layers that store their weight as [I, O]: transformers' ``Conv1D`` (GPT-2 and its kin)."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import _call
from ..formats import Delta, LowRank
from ..stacked import Stack
from .context import TaskContext
from .folded import Epilogue
from .layer import TapsLayer
from .stand_in import fill


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether this is ``y = x @ weight + bias`` of transformers, known by name: that package is not imported."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def _transposed(deltas: Sequence[Delta], dtype: torch.dtype) -> Sequence[Delta]:
    """Views, but of codes, which become dense."""
    if isinstance(deltas, Stack) and isinstance(deltas.like, LowRank):
        return deltas.t()
    return [d.t() if isinstance(d, (Tensor, LowRank)) else d.dense(dtype).t() for d in deltas]


class TransposedLinear(TapsLayer):
    """y = x·(base + Σ gate·delta) + bias, with base and deltas stored as [I, O].

    Args:
        module: a ``Conv1D``; its weight becomes the base in the storage it is in.
    """

    def __init__(
        self,
        module: nn.Module,
        context: TaskContext | None = None,
        *,
        threshold: float = 0.1,
        initial_score: float | None = None,
        gate: str = "ste",
    ) -> None:
        super().__init__()
        self._start(context, threshold, initial_score, gate)
        self._take(module)
        bare = copy.copy(module)
        bare._parameters = dict.fromkeys(module._parameters)
        self._bare = [bare]  # in a list: not a submodule
        self.train(module.training)

    @property
    def fan_in(self) -> int:
        return self.base.shape[0]

    def forward(self, x: Tensor, *, after: Epilogue | None = None) -> Tensor:
        """y [..., O] for x [..., I]; ``after`` is what `TapsModel.prepare_inference` folds into this layer."""
        selection = self.selected(None, x.device)
        gated = self.gated(selection, grouped=after is not None)
        batch, axis = self.place(x, gated, selection, None)
        deltas = _transposed(gated.deltas, x.dtype)
        how = gated.how(batch, axis, **({} if after is None else after.options(selection)))
        return self.run(_call.linear, x, gated.base.t(), deltas, gated.coeffs, gated.bias, how)

    def merged(self, task: str | None) -> nn.Module:
        weight, bias = self.effective(task)
        with torch.no_grad():
            return fill(copy.deepcopy(self._bare[0]), weight, bias, self.training)

    def extra_repr(self) -> str:
        return f"{self.base.shape[0]}, {self.base.shape[1]}, tasks=[{self._opened()}]"
