"""A convolution with a base and a gated delta for each task."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _call
from .context import TaskContext, TaskNames
from .folded import Epilogue
from .layer import TapsLayer

Pair = int | tuple[int, int]


class FastTapsConv2d(TapsLayer, nn.Conv2d):
    """``nn.Conv2d`` that tasks adapt: a frozen base plus, for each task, a delta behind a gate.

    ::

        y_n = conv2d(x_n, base + I(s_t)·delta_t) + base_bias + I(s_t)·bias_delta_t        I(s) = 1[s >= threshold]

    Is an ``nn.Conv2d``, and loads the state dict of one as its base. ``weight`` and ``bias`` are the effective ones.

    Args:
        in_channels … dtype: as ``nn.Conv2d``, every padding and padding mode included.
        tasks, threshold, initial_score, gate: as `FastTapsLinear`.

    Raises:
        ValueError: a task name that cannot be a parameter's name, an unknown gate, a threshold that is not above 0, it
            or an initial score that is not finite, or an initial score from which zero deltas would never train.

    Cost: `delta_conv2d`'s; images behind closed gates share the base convolution.
    Source: TAPS, arXiv 2203.16708.

    >>> layer = FastTapsConv2d(3, 8, 3, padding="same", tasks=["cubs"])
    >>> layer(torch.randn(2, 3, 5, 5)).shape
    torch.Size([2, 8, 5, 5])
    """

    images_first = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair | str = 0,
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
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
        sizes: Any = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        options: Any = {"bias": bias, "padding_mode": padding_mode, "device": device, "dtype": dtype}
        self._take(nn.Conv2d(*sizes, **options))
        self.add_tasks(tasks)

    @classmethod
    def from_conv2d(
        cls,
        conv: nn.Conv2d,
        tasks: str | Iterable[str] = (),
        *,
        threshold: float = 0.1,
        initial_score: float | None = None,
        gate: str = "ste",
        context: TaskContext | None = None,
    ) -> FastTapsConv2d:
        """A layer whose base is ``conv``'s kernel, in the same storage."""
        return cls._adapting(conv, tasks, context, threshold, initial_score, gate)

    def forward(self, input: Tensor, tasks: TaskNames | None = None, *, after: Epilogue | None = None) -> Tensor:
        """y [N, O, H', W'] for input [N, C, H, W] ([C, H, W] with one task); ``tasks`` as in `FastTapsLinear`."""
        selection = self.selected(tasks, input.device)
        gated = self.gated(selection, grouped=after is not None)
        batch, _ = self.place(input, gated, selection, None if tasks is None else 0)
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            # "same" and "valid" are numbers in it already.
            input, padding = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode), (0, 0)
        conv = (self.stride, padding, self.dilation, self.groups)
        if after is None and not gated.deltas and _call.is_plain_conv2d(input, gated.base, self.groups):
            # Checks are slow after a large layer, which leaves no Python in the caches.
            return F.conv2d(input, gated.base, gated.bias, *conv)
        follows = {} if after is None else after.options(selection)
        return self.run(_call.conv2d, input, *gated.weight, *conv, gated.how(batch, **follows))

    def merged(self, task: str | None) -> nn.Conv2d:
        """An ordinary ``nn.Conv2d`` with the effective weight of ``task`` (None: the base), in storage of its own."""
        return self._ordinary(nn.Conv2d, task)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, groups={self.groups}, bias={self.base_bias is not None}, "
            f"tasks=[{self._opened()}]"
        )
