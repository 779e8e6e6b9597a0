"""Linear layers that store their weight as [I, O]: transformers' ``Conv1D`` (GPT-2 and its kin)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import delta_linear
from .context import TaskContext
from .layer import TapsLayer, fill


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether this is ``y = x @ weight + bias`` of transformers, known by name: that package is not imported."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


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
        initial_score: float = 0.15,
        gate: str = "ste",
    ) -> None:
        super().__init__()
        self._start(context, threshold, initial_score, gate)
        self._adopt(*module._parameters.values())  # type: ignore[arg-type]
        bare = copy.copy(module)
        bare._parameters = dict.fromkeys(module._parameters)
        self._bare = [bare]  # in a list: not a submodule
        self.train(module.training)

    @property
    def fan_in(self) -> int:
        return self.base.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """y [..., O] for x [..., I]."""
        gated = self.gated(self.selected(None, x.device))
        batch, axis = self.place(x, gated, None)
        deltas = [delta.t() for delta in gated.deltas]
        options: dict[str, Any] = {"tasks": batch, "pairs": gated.pairs, "batch_dim": axis}
        return self.run(delta_linear, x, self.base.t(), deltas, gated.coeffs, gated.bias, **options)

    def merged(self, task: str | None) -> nn.Module:
        weight, bias = self.effective(task)
        with torch.no_grad():
            return fill(copy.deepcopy(self._bare[0]), weight, bias, self.training)

    def extra_repr(self) -> str:
        return f"{self.base.shape[0]}, {self.base.shape[1]}, tasks={list(self.scores)}"
