"""A linear layer with a base and a gated delta for each task."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .. import _call
from .context import TaskContext, TaskNames
from .folded import Epilogue
from .layer import TapsLayer


class FastTapsLinear(TapsLayer, nn.Linear):  # type: ignore[misc]
    """``nn.Linear`` that tasks adapt: a frozen base plus, for each task, a delta behind a gate.

    ::

        y_r = (base + I(s_t)·delta_t) x_r + base_bias + I(s_t)·bias_delta_t        I(s) = 1[s >= threshold]

    Is an ``nn.Linear``, and loads the state dict of one as its base. ``weight`` and ``bias`` are the effective ones.

    Args:
        in_features, out_features, bias, device, dtype: as ``nn.Linear``.
        tasks: names, or one; each gets a zero delta and a score.
        threshold: τ of the gates.
        initial_score: s at the start, at least τ (with "raw": not 0), so that zero deltas train; None: 1.5·τ.
        gate: "ste" (a gate with a straight-through gradient) or "raw" (the score itself multiplies the delta).

    Raises:
        ValueError: a task name that cannot be a parameter's name, an unknown gate, a threshold that is not above 0, it
            or an initial score that is not finite, or an initial score from which zero deltas would never train.

    Cost: `delta_linear`'s; a closed gate's rows share the base product in inference.
    Source: TAPS, arXiv 2203.16708.

    >>> layer = FastTapsLinear(4, 8, tasks=["cubs", "cars"])
    >>> layer(torch.randn(3, 4), tasks=["cars", "base", "cubs"]).shape
    torch.Size([3, 8])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        tasks: str | Iterable[str] = (),
        threshold: float = 0.1,
        initial_score: float | None = None,
        gate: str = "ste",
    ) -> None:
        nn.Module.__init__(self)
        self._start(None, threshold, initial_score, gate)
        self._take(nn.Linear(in_features, out_features, bias, device, dtype))
        self.add_tasks(tasks)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        tasks: str | Iterable[str] = (),
        *,
        threshold: float = 0.1,
        initial_score: float | None = None,
        gate: str = "ste",
        context: TaskContext | None = None,
    ) -> FastTapsLinear:
        """A layer whose base is ``linear``'s weight, in the same storage."""
        return cls._adapting(linear, tasks, context, threshold, initial_score, gate)

    def forward(
        self, input: Tensor, tasks: TaskNames | None = None, batch_dim: int = 0, *, after: Epilogue | None = None
    ) -> Tensor:
        """y [..., O] for input [..., I].

        Args:
            input: [..., I].
            tasks: a name, one name or id per sample, or a `TaskBatch`; default: the running model's, else the
                layer's only task, else (no task at all) the base.
            batch_dim: the axis of input that ``tasks`` given here goes along, as in `delta_linear`.

        Raises:
            ValueError: an unknown task, several tasks and none said, ids that do not divide the batch.
        """
        selection = self.selected(tasks, input.device)
        gated = self.gated(selection, grouped=after is not None)
        batch, axis = self.place(input, gated, selection, None if tasks is None else batch_dim)
        follows = {} if after is None else after.options(selection)
        return self.run(_call.linear, input, *gated.weight, gated.how(batch, axis, **follows))

    def merged(self, task: str | None) -> nn.Linear:
        """An ordinary ``nn.Linear`` with the effective weight of ``task`` (None: the base), in storage of its own."""
        return self._ordinary(nn.Linear, task)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.base_bias is not None}, tasks=[{self._opened()}]"
