"""The tensors of one layer's workload, the truth about it, and what it must cost."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from taps_fast import testing

from .workloads import LAYERS, Workload

Results = dict[str, Tensor]


class LayerProblem:
    """Inputs of a workload over one set of weights.

    Attributes:
        x, dy: [B, tokens, I] and [B, tokens, O], or images.
        base, deltas: the weight, and K tensors like it. In inference a closed gate has no delta; in training
            every gate has one, because its score gets a gradient.
        gates: float32 [K], the coefficient of each delta; a leaf in training.
        owner: the task of each delta. slot: int64 [T], k + 1 where task t owns delta k, else 0 (the base).
        ids: int64 [B], or None where one weight serves all rows.
    """

    def __init__(self, workload: Workload, device: str, seed: int = 0) -> None:
        self.workload, self.device = workload, device
        self.layer = LAYERS[workload.layer]
        self.dtype: torch.dtype = getattr(torch, workload.dtype)
        self.train = workload.phase == "train"
        self.mixed = workload.tasks is not None
        draw = functools.partial(torch.randn, generator=torch.Generator(device).manual_seed(seed), device=device)
        fan_in = math.prod(self.layer.shape[1:])
        is_open = workload.open_tasks()
        self.owner = list(range(workload.tasks or 0)) if self.train else is_open
        count = len(self.owner) if self.mixed else workload.deltas

        def weight(scale: float) -> Tensor:
            return self.put(draw(self.layer.shape) * scale * fan_in**-0.5).requires_grad_(self.train)

        self.base = weight(1.0).requires_grad_(False)
        self.deltas = [weight(0.5) for _ in range(count)]
        if not self.mixed:  # merging trains coefficients alone
            self.deltas = [d.requires_grad_(False) for d in self.deltas]
        gates = torch.tensor([float(t in is_open) for t in self.owner]) if self.mixed else 0.3 * torch.ones(count)
        self.gates = gates.to(device).requires_grad_(self.train)
        self.slot = torch.zeros(workload.tasks or 1, dtype=torch.int64)
        self.slot[self.owner] = torch.arange(1, len(self.owner) + 1)
        self.slot = self.slot.to(device)
        self.ids = torch.tensor(workload.ids(), device=device) if self.mixed else None
        conv = self.layer.op == "conv2d"
        features = self.layer.shape[1] * self.conv["groups"] if conv else self.layer.shape[1]
        size = (features, *self.layer.size) if conv else (*self.layer.size, features)
        self.x = self.put(draw(workload.samples, *size)).requires_grad_(self.train)
        with torch.no_grad():
            self.dy = self.put(draw(self.product(self.x, self.base).shape))

    def put(self, t: Tensor) -> Tensor:
        layout = torch.channels_last if self.layer.channels_last and t.dim() == 4 else torch.preserve_format
        return t.to(self.device, self.dtype, memory_format=layout)

    @property
    def conv(self) -> dict[str, object]:
        return dict(self.layer.conv)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """The plain layer."""
        return F.conv2d(x, weight, **self.conv) if self.layer.op == "conv2d" else F.linear(x, weight)

    def again(self) -> LayerProblem:
        """The same problem over another set of weights; it shares all that is not a weight."""
        other = LayerProblem.__new__(LayerProblem)
        other.__dict__.update(self.__dict__)
        other.base, *other.deltas = (
            w.detach().clone().requires_grad_(w.requires_grad) for w in (self.base, *self.deltas)
        )
        return other

    def table(self) -> Tensor:
        """coeffs as `taps_fast` takes them: [T, K], the gate of each delta in its owner's row; [K] without tasks."""
        if not self.mixed:
            return self.gates
        where = (torch.tensor(self.owner, dtype=torch.int64), torch.arange(len(self.owner)))
        return self.gates.new_zeros(self.slot.shape[0], len(self.owner)).index_put(where, self.gates)

    @property
    def pairs(self) -> list[tuple[int, int]] | None:
        return [(t, k) for k, t in enumerate(self.owner)] if self.mixed else None

    def summed(self, slot: int) -> Tensor:
        """The weight of a slot, summed as a user would: gates that are 1 cost no product in inference."""
        if not self.mixed:
            weight = self.base
            for gate, delta in zip(self.gates, self.deltas, strict=True):
                weight = weight + gate.to(self.dtype) * delta
            return weight
        if slot == 0:
            return self.base
        delta = self.deltas[slot - 1]
        return self.base + (self.gates[slot - 1].to(self.dtype) * delta if self.train else delta)

    def merged(self) -> list[Tensor]:
        """The weight of every slot."""
        return [self.summed(slot) for slot in range(len(self.deltas) + 1 if self.mixed else 1)]

    def with_sum(self, slot: int, x: Tensor) -> Tensor:
        """The plain layer with the weight of a slot."""
        return self.product(x, self.summed(slot))

    def groups(self) -> list[tuple[int, Tensor | slice]]:
        """Samples by slot, from the ids: rows of closed gates share slot 0. Part of what is timed."""
        if self.ids is None:
            return [(0, slice(None))]
        slots = self.slot[self.ids]
        counts = slots.bincount(minlength=len(self.owner) + 1).tolist()
        present = [s for s, n in enumerate(counts) if n]
        if len(present) == 1:
            return [(present[0], slice(None))]
        rows = slots.argsort(stable=True).split(counts)
        return [(s, rows[s]) for s in present]

    def by_group(self, run: Callable[[int, Tensor], Tensor]) -> Tensor:
        """``run(slot, its rows)`` for every slot in the batch, put together in the order of the rows."""
        groups = self.groups()
        if len(groups) == 1:
            return run(groups[0][0], self.x)
        y = None
        for slot, rows in groups:
            part = run(slot, self.x[rows])
            if y is None:
                y = part.new_empty(self.x.shape[0], *part.shape[1:])
            y[rows] = part
        assert y is not None
        return y

    def differentiate(self, forward: Callable[[], Tensor], *more: Tensor) -> Results:
        """y and the gradients for dy that training needs; only y in inference."""
        if not self.train:
            return {"y": forward()}
        leaves = self.leaves() | {f"more[{i}]": t for i, t in enumerate(more)}
        y = forward()
        found = torch.autograd.grad(y, list(leaves.values()), self.dy, allow_unused=True)
        return {"y": y.detach()} | {name: g for name, g in zip(leaves, found, strict=True) if g is not None}

    def leaves(self) -> dict[str, Tensor]:
        """What training wants a gradient of, by the name of the gradient."""
        deltas = {f"ddeltas[{k}]": d for k, d in enumerate(self.deltas) if d.requires_grad}
        return {"dx": self.x, "dcoeffs": self.gates} | deltas

    def _in(self, dtype: torch.dtype) -> LayerProblem:
        other = self.again()
        other.dtype = dtype
        for name in ("base", "x", "dy"):
            setattr(other, name, getattr(self, name).detach().to(dtype).requires_grad_(self.train and name != "dy"))
        other.deltas = [d.detach().to(dtype).requires_grad_(d.requires_grad) for d in self.deltas]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        other.gates = self.gates.detach().to(wide).requires_grad_(self.train)
        return other

    @functools.cached_property
    def _judged(self) -> tuple[Results, Results, dict[str, float]]:
        """The truth in float64, PyTorch's own answer in this dtype, and the scales of sums that cancel."""

        def plain(p: LayerProblem) -> Results:
            with torch.set_grad_enabled(self.train):
                return p.differentiate(lambda: p.by_group(p.with_sum), *([p.base] if self.train else []))

        exact = self._in(torch.float64)
        ref, low = plain(exact), plain(self._in(self.dtype))
        scales = {}
        if self.train:
            x, dy = exact.x.flatten(0, -2), exact.dy.flatten(0, -2)
            case = testing.Case(self.dtype, rows=len(x), shape=self.layer.shape)
            inputs = testing.Inputs(case, x, exact.base, exact.deltas, exact.gates, None, None, dy)
            one = self.layer.op == "linear" and self.workload.tasks in (None, 1)
            rounded = self.dtype if one and self.device == "cuda" and self.dtype.itemsize == 2 else None
            scales = testing.sum_scales(inputs, {"dbase": ref["more[0]"]}, rounded)
        return ref, low, scales

    def check(self, results: Results) -> None:
        """Judges results by `taps_fast.testing`'s rule; a gradient that is None counts as zero.

        Raises:
            AssertionError: y or a gradient is wrong.
        """
        ref, low, scales = self._judged
        wanted = {"y": ref["y"]} | (self.leaves() if self.train else {})
        for name, like in wanted.items():
            zero = torch.zeros_like(like)
            testing.assert_no_worse_than_torch(
                results.get(name, zero),
                ref.get(name, zero).double(),
                low.get(name, zero),
                scale=scales.get(name),
                name=name,
            )

    def present(self) -> tuple[set[int], set[int]]:
        """Slots in this batch: all of them, and those whose gate is open."""
        if self.ids is None:
            return set(range(1, len(self.deltas) + 1)), set(range(1, len(self.deltas) + 1))
        slots = set(self.slot[self.ids].tolist())
        return slots, {s for s in slots if s and float(self.gates[s - 1]) != 0}

    def flops(self) -> int:
        """One product a row; in training also those of the gradients of x and of the weight."""
        out = self.dy.numel() * math.prod(self.layer.shape[1:]) * 2
        return out * (3 if self.train else 1)

    def bytes(self, merged: bool) -> int:
        """Each tensor that must be read or written, once a pass; ``merged``: weights are stored summed."""
        weight = self.base.numel() * self.base.element_size()
        slots, opened = self.present()
        if merged:
            weights = max(len(slots), 1) if self.mixed else 1
        else:
            weights = 1 + len(opened)
        x, y = (t.numel() * t.element_size() for t in (self.x, self.dy))
        if not self.train:
            return x + y + weights * weight
        # Backward: weights again, the deltas of closed gates for their scores, and the gradients of open ones.
        more = len(slots) if self.mixed else 0
        return 3 * x + 2 * y + (2 * weights + more) * weight

    def weight_bytes(self) -> int:
        return (1 + len(self.deltas)) * self.base.numel() * self.base.element_size()

    def keep(self, weights: Sequence[Tensor]) -> None:
        """Forgets the weights that are not among these, once a provider has merged them into others."""
        kept = {w.data_ptr() for w in weights}
        self.base = self.base if self.base.data_ptr() in kept else None
        self.deltas = [d if d.data_ptr() in kept else None for d in self.deltas]
