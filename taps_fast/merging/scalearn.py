"""ScaLearn: the outputs of frozen adapters, scaled by channel and added."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ScaLearn(nn.Module):
    """h + Σ_s ω_s ∘ o_s(h) over S frozen adapters, with ω trained.

    Args:
        adapters: S modules, each from [..., D] to [..., D]; they are frozen here.
        width: D; None makes one ω per adapter (the uniform form).
        init: where ω starts; default 1 / S.

    ``omega`` is a Parameter [S, D] or [S, 1].

    Raises:
        ValueError: no adapters.

    Cost: the adapters' forwards and one sum. Source: ScaLearn, arXiv 2310.01217, equation of the scaled sum of source
    adapters' outputs; uniform: one number per source.

    >>> layer = ScaLearn([nn.Linear(4, 4), nn.Linear(4, 4)], width=4)
    >>> layer(torch.randn(3, 4)).shape, layer.omega.shape
    (torch.Size([3, 4]), torch.Size([2, 4]))
    """

    def __init__(self, adapters: Sequence[nn.Module], width: int | None = None, init: float | None = None) -> None:
        super().__init__()
        if not adapters:
            raise ValueError("ScaLearn: adapters must be at least one module, got none")
        self.adapters = nn.ModuleList(adapters).requires_grad_(False)
        start = 1 / len(adapters) if init is None else init
        self.omega = nn.Parameter(torch.full((len(adapters), width or 1), start))

    def forward(self, h: Tensor) -> Tensor:
        """h + Σ_s ω_s ∘ o_s(h), [..., D], for h [..., D]."""
        outputs = torch.stack([adapter(h) for adapter in self.adapters], -1)  # [..., D, S]
        return h + (outputs * self.omega.t().to(outputs.dtype)).sum(-1)
