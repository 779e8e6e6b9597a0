"""Twin-Merging: what tasks share in one weight, what each has beyond it in low rank, mixed for every sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model import TapsModel
from .merged import adopt
from .threads import Current
from .vectors import TaskVectors

Router = Callable[..., Tensor]


class TwinModel(nn.Module):
    """W* + Σ_t softmax(router(x))_t·v_t for each sample, v_t = U_t V_t the low-rank rest of task t.

    ::

        W* = W0 + shared·Σ_k Δ_k              v_t = best rank-r approximation of W_t - W*
        y  = x W*ᵀ + (g ⊙ x V*ᵀ) U*ᵀ          V*, U*: the factors of all tasks side by side, g: each sample's shares

    Linear weights have a v; every other tensor is that of W*. Threads may share the model and run at once.

    Args:
        model: any module of the base's architecture without heads of tasks; not changed, nor copied but for W*.
        vectors: base and K deltas.
        router: from the model's inputs to logits [B, K]; trained by the user, it is a submodule if it is a module.
        shared: the scale of the shared part.
        keep: the share of min(O, I) that is kept as rank.

    Raises:
        ValueError: keep outside (0, 1].

    Cost: one product with W* and two of rank K·r a layer, whatever the mix of a batch; no weight is formed a sample.
    Source: Twin-Merging, arXiv 2406.15479: shared and exclusive knowledge, singular values cut to 10 %, a router.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> tuned = [{n: t + 0.1 for n, t in model.state_dict().items()} for _ in range(3)]
    >>> twin = TwinModel(model, TaskVectors.from_checkpoints(model.state_dict(), tuned), nn.Linear(4, 3))
    >>> twin(torch.randn(5, 4)).shape
    torch.Size([5, 2])
    """

    def __init__(
        self, model: nn.Module, vectors: TaskVectors, router: Router, *, shared: float = 0.3, keep: float = 0.1
    ) -> None:
        super().__init__()
        if not 0 < keep <= 1:
            raise ValueError(f"TwinModel: keep must be in (0, 1], got {keep}")
        self.router, self.tasks = router, list(vectors.tasks)
        merged = vectors.fold(shared)
        network = TapsModel(model, include=[], norms="shared")
        places = adopt(network, TaskVectors(merged, vectors.deltas, vectors.tasks))
        self._shares = Current()
        for name, mine in places.items():
            for path, _, last in (place.rpartition(".") for place in mine):
                module = network.get_submodule(path)
                if last == "weight" and type(module) is nn.Linear:
                    rest = [vectors.base[name] + d - merged[name] for d in vectors.deltas[name]]
                    _twin(module, rest, keep, self._shares)
        self.network = network.requires_grad_(False).eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output; every sample has its own shares."""
        logits = self.router(*args, **kwargs)
        if logits.dim() != 2 or logits.shape[1] != len(self.tasks):
            raise ValueError(
                f"TwinModel: router must return [B, {len(self.tasks)}], one logit a task, got {tuple(logits.shape)}"
            )
        with self._shares.of(F.softmax(logits, -1)):
            return self.network(*args, **kwargs, tasks="base")


class _TwinLinear(nn.Linear):
    up: Tensor
    down: Tensor
    shares: Current
    """[B, K]"""

    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        shares = self.shares.now
        if shares is None:
            return y
        if input.shape[0] != shares.shape[0]:
            raise ValueError(
                f"TwinModel: the batch must be the first axis of x, got {tuple(input.shape)} for {len(shares)}"
            )
        inner = F.linear(input, self.down)
        each = shares.repeat_interleave(inner.shape[-1] // shares.shape[1], 1).to(inner.dtype)
        each = each.view(each.shape[0], *(1,) * (inner.dim() - 2), each.shape[1])
        return y + F.linear(inner * each, self.up)


def _twin(layer: nn.Linear, rest: list[Tensor], keep: float, shares: Current) -> None:
    """Adds the low-rank rests to a layer, wherever it is referred to."""
    dtype, rank = layer.weight.dtype, max(1, round(keep * min(layer.weight.shape)))
    ups, downs = [], []
    for delta in rest:
        u, s, v = torch.linalg.svd(delta.float(), full_matrices=False)
        ups.append(u[:, :rank] * s[:rank])
        downs.append(v[:rank])
    layer.__class__ = _TwinLinear
    layer.register_buffer("up", torch.cat(ups, 1).to(dtype))
    layer.register_buffer("down", torch.cat(downs).to(dtype))
    layer.shares = shares  # type: ignore[assignment]
