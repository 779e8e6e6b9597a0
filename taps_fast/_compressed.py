"""Products with compressed deltas that never become dense.

Without gradients on a CPU one operator reads base, dense deltas and codes. Else codes, and low rank everywhere, are
what `delta_linear` adds to the product of the rest.

Of a mixed batch, a task may use several deltas of one kind. They are taken in turns: in one turn each task uses at
most one, and one grouped product serves all rows. With one delta a task there is one turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _ext
from .formats import Delta, Format, Int8, LowRank, MaskBits, SignBits
from .stacked import Stack
from .tasks import Index, TaskBatch, sample_of_row, sums_of_rows

ops = torch.ops.taps_fast

CODED_ROWS = 16
"""Rows a task up to which decoding a delta in registers costs less than decoding it into memory for a GEMM."""

CODED = (SignBits, MaskBits, Int8)
"""The formats whose codes the kernels read."""

Linear = Callable[..., Tensor]
"""`delta_linear`, handed down: a low-rank delta is two dense ones, one after the other."""


def stays_apart(delta: Format, base: Tensor, rows: int, algorithm: str) -> bool:
    """Whether a product of its own is what was asked for or, under "auto", costs less than a dense delta."""
    if algorithm != "auto":
        return algorithm == "split"
    if isinstance(delta, LowRank):
        return delta.rank * sum(base.shape) < base.numel()
    return CODED_ROWS >= rows and base.device.type == "cpu" and _ext.CPU_ERROR is None


def decoded_by_kernel(
    x: Tensor,
    base: Tensor,
    deltas: Sequence[Delta],
    coeffs: Tensor,
    bias: Tensor | None,
    backend: str | None,
    algorithm: str,
) -> set[int]:
    """The deltas whose codes `linear_coded` reads: on a CPU, where nothing needs a gradient and there is a weight."""
    if base.numel() == 0:
        return set()
    if x.device.type != "cpu" or _ext.CPU_ERROR is not None or backend not in (None, "cpu"):
        return set()
    if algorithm not in ("auto", "blend", "split"):
        return set()
    if torch.is_grad_enabled():
        tensors = [t for t in (x, base, coeffs, bias) if t is not None]
        for delta in [deltas] if isinstance(deltas, Stack) else deltas:
            tensors += delta.tensors.values() if isinstance(delta, Format | Stack) else [delta]
        if any(t.requires_grad for t in tensors):
            return set()
    if isinstance(deltas, Stack):
        return set(range(len(deltas)) if isinstance(deltas.like, CODED) else ())
    return {k for k, delta in enumerate(deltas) if isinstance(delta, CODED)}


def is_low_rank_stack(
    x: Tensor,
    base: Tensor,
    deltas: Sequence[Delta],
    coeffs: Tensor,
    bias: Tensor | None,
    rows: int,
    backend: str | None,
    algorithm: str,
) -> bool:
    """Whether `linear_low_rank_` takes all deltas: on a CPU, where nothing needs a gradient and they stay apart."""
    if not isinstance(deltas, Stack) or not isinstance(deltas.like, LowRank) or backend not in (None, "cpu"):
        return False
    if x.device.type != "cpu" or _ext.CPU_ERROR is not None or not stays_apart(deltas.like, base, rows, algorithm):
        return False
    tensors = (x, base, coeffs, bias, *deltas.tensors.values())
    return not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors))


def add_low_rank(y: Tensor, x: Tensor, stack: Stack, coeffs: Tensor, batch: TaskBatch | None, inner: int) -> Tensor:
    """y + Σ_k coeffs[t, k]·delta_k x, written over y."""
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    factors = (stack.tensors["a"].contiguous(), stack.tensors["b"].transpose(1, 2).contiguous())  # as they lie in it
    scale = stack.tensors["scale"].to(exact)
    index: Index = (None, None, None) if batch is None else batch.tensors
    rows, sums = x.flatten(0, -2), y.flatten(0, -2)
    ops.linear_low_rank_(sums, rows, *factors, scale, coeffs.to(exact), *index, inner)
    return y


def linear_coded(
    x: Tensor,
    base: Tensor,
    deltas: Sequence[Delta],
    coeffs: Tensor,
    base_coeffs: Tensor | None,
    bias: Tensor | None,
    batch: TaskBatch | None,
    inner: int,
    algorithm: str,
) -> Tensor:
    """The operator of this name. bias [O] or [T + 1, O]; deltas of other formats have been made dense."""
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    weights: list[Tensor] = []
    scales: list[Tensor] = []
    tiles: list[Tensor] = []
    tile_of: list[int] = []
    for delta in [deltas] if isinstance(deltas, Stack) else deltas:
        tile_of.append(-1)
        if isinstance(delta, Tensor):
            weights.append(delta)
            scales.append(coeffs)
            continue
        fields = delta.tensors
        weights.append(fields["codes"])
        scale = fields["scale"]
        scales.append(scale if scale.dtype == exact else scale.to(exact))
        if "tile" in fields:
            tile_of[-1] = next((n for n, tile in enumerate(tiles) if tile is fields["tile"]), len(tiles))
            if tile_of[-1] == len(tiles):
                tiles.append(fields["tile"])
    index: Index = (None, None, None) if batch is None else batch.tensors
    if base_coeffs is not None:
        base_coeffs = base_coeffs.to(exact)
    rows = x if x.dim() == 2 else x.flatten(0, -2)
    y: Tensor = ops.linear_coded(
        rows, base, weights, coeffs.to(exact), base_coeffs, bias, *index, inner, algorithm, scales, tiles, tile_of
    )
    return y if x.dim() == 2 else y.view(*x.shape[:-1], base.shape[0])


def used_pairs(coeffs: Tensor, pairs: Sequence[tuple[int, int]] | None) -> list[tuple[int, int]]:
    """The (task, delta) pairs that need a product: without those of coefficient 0, where they are read for nothing."""
    table = coeffs if coeffs.dim() == 2 else coeffs[None]
    unread = table.requires_grad or table.device.type != "cpu" or torch.compiler.is_compiling()
    if pairs is None:
        if not unread:
            return [(t, k) for t, k in table.nonzero().tolist()]
        return [(t, k) for t in range(table.shape[0]) for k in range(table.shape[1])]
    if unread:
        return list(pairs)
    values = table.tolist()
    return [(t, k) for t, k in pairs if values[t][k] != 0]


def columns(coeffs: Tensor, places: Sequence[int]) -> Tensor:
    """coeffs[..., places]; on a GPU a list would be copied there."""
    if list(places) == list(range(coeffs.shape[-1])):
        return coeffs
    every = coeffs.unbind(-1)
    return torch.stack([every[k] for k in places], -1) if places else coeffs[..., :0]


def turns(deltas: Iterable[int], pairs: Iterable[tuple[int, int]], num_tasks: int) -> list[list[int]]:
    """For each turn the delta that each task uses, -1 for none."""
    found: list[list[int]] = []
    used = [0] * num_tasks
    wanted = set(deltas)
    for task, delta in pairs:
        if delta in wanted:
            if used[task] == len(found):
                found.append([-1] * num_tasks)
            found[used[task]][task] = delta
            used[task] += 1
    return found


class Products(NamedTuple):
    """The deltas of one call that stay apart, and what their products need. x is [..., I], not flattened."""

    x: Tensor
    deltas: Sequence[Delta]
    apart: list[int]
    coeffs: Tensor
    batch: TaskBatch | None
    batch_dim: int
    inner: int
    pairs: list[tuple[int, int]]
    linear: Linear
    backend: str | None

    def added_to(self, y: Tensor) -> Tensor:
        """y + Σ_k coeffs[t, k]·deltas[k] x over the deltas that stay apart."""
        low = {k: d for k, d in enumerate(self.deltas) if k in self.apart and isinstance(d, LowRank)}
        if any(k in low for _, k in self.pairs):
            y = y + self._low_rank(low).to(y.dtype)
        for kind, tile, places in self._coded_groups():
            for which in turns(places, self.pairs, self.num_tasks):
                y = self._coded(y, kind, tile, which)
        return y

    @property
    def num_tasks(self) -> int:
        return 1 if self.batch is None else self.batch.num_tasks

    def _coded_groups(self) -> list[tuple[str, Tensor | None, list[int]]]:
        """The deltas that one call can take: of one kind, and masks of one tile."""
        found: list[tuple[str, Tensor | None, list[int]]] = []
        for k in self.apart:
            delta = self.deltas[k]
            if isinstance(delta, CODED):
                tile = delta.tile if isinstance(delta, MaskBits) else None
                for name, held, places in found:
                    if name == delta.name and held is tile:
                        places.append(k)
                        break
                else:
                    found.append((delta.name, tile, [k]))
        return found

    def _coded(self, y: Tensor, kind: str, tile: Tensor | None, which: list[int]) -> Tensor:
        """y + coeffs[t, k]·scale_k∘(D_k x) with k = which[t]."""
        used = sorted({k for k in which if k >= 0})
        deltas = [d for k, d in enumerate(self.deltas) if k in used and isinstance(d, CODED)]
        table = self.coeffs if self.batch is not None else self.coeffs[None]
        scales = [d.scale.to(table.dtype) for d in deltas]
        if any(scale.dim() for scale in scales):
            scales = [scale.expand(y.shape[-1]) for scale in scales]
        # Picked one by one: an index made from Python numbers would be a copy from the host.
        rows = [used.index(k) if k >= 0 else 0 for k in which]
        scale = torch.stack([scales[n] for n in rows]).view(len(rows), -1)  # [T, 1 or O]
        # What a task without such a delta gets here is not used.
        aligned = which == list(range(table.shape[1]))
        own = table.diagonal() if aligned else torch.stack([table[t, max(k, 0)] for t, k in enumerate(which)])
        factors = own[:, None] * scale
        factors = factors.expand(-1, y.shape[-1])
        index = (None, None, None) if self.batch is None else self.batch.tensors
        call = CodedCall([rows[t] if k >= 0 else -1 for t, k in enumerate(which)], index, self.inner, kind)
        tile = None if tile is None else tile.contiguous()
        tensors = [y.flatten(0, -2).contiguous(), self.x.flatten(0, -2).contiguous(), factors.contiguous()]
        codes = [d.codes.contiguous() for d in deltas]
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            out: Tensor = Coded.apply(call, tile, *tensors, *codes)  # type: ignore[no-untyped-call]
        else:
            out = ops.coded_fwd(*tensors[:2], codes, tile, tensors[2], call.which, *call.batch, call.inner, kind)
        return out.view(y.shape)

    def _low_rank(self, low: dict[int, LowRank]) -> Tensor:
        """Σ c·B (A x), by task where each uses one delta at most; else with all deltas side by side."""
        places, deltas = list(low), list(low.values())
        coeffs = self._scaled(places, deltas)
        if self.batch is not None:
            each = turns(places, self.pairs, self.batch.num_tasks)
            if len(each) == 1:
                return self._by_task(low, each[0], coeffs)
        weights = torch.cat([coeffs[..., n, None].expand(*coeffs.shape[:-1], d.rank) for n, d in enumerate(deltas)], -1)
        if self.batch is not None:
            weights = F.pad(weights, (0, 0, 0, 1))[self.task_of_row].view(*self.x.shape[:-1], weights.shape[-1])
        thin = F.linear(self.x, torch.cat([d.a for d in deltas]))
        return F.linear((thin * weights).to(thin.dtype), torch.cat([d.b for d in deltas], 1))

    def _scaled(self, places: list[int], deltas: list[LowRank]) -> Tensor:
        """Coefficients [..., K] times scales, and 0 where a task does not use a delta: 0·inf is NaN."""
        scales = torch.stack([d.scale for d in deltas]).to(self.coeffs.dtype)
        eye = torch.eye(len(places), dtype=torch.bool, device=scales.device).unbind()
        none = torch.zeros_like(scales, dtype=torch.bool)
        used = [none] * self.num_tasks
        for t, k in self.pairs:
            if k in places:
                used[t] = used[t] | eye[places.index(k)]
        # Before the product, so that nothing of other scales comes back in its gradients.
        return columns(self.coeffs, places) * torch.where(torch.stack(used), scales, 0).view(
            *self.coeffs.shape[:-1], len(places)
        )

    def _by_task(self, low: dict[int, LowRank], which: list[int], coeffs: Tensor) -> Tensor:
        """Σ over ranks, as no row may meet another task's delta: 0·NaN is NaN."""
        total: Tensor | None = None
        places = list(low)
        for rank in sorted({delta.rank for delta in low.values()}):
            mine = [n for n, k in enumerate(places) if low[k].rank == rank]
            of_task = [next((i for i, n in enumerate(mine) if places[n] == k), -1) for k in which]
            y = self._grouped([low[places[n]] for n in mine], of_task, columns(coeffs, mine))
            total = y if total is None else total + y
        assert total is not None
        return total

    def _grouped(self, deltas: list[LowRank], which: list[int], coeffs: Tensor) -> Tensor:
        """Two products with one dense delta a task, over a base of 0."""
        eye = torch.eye(len(deltas), dtype=coeffs.dtype, device=coeffs.device)
        taken = torch.stack([eye[k] if k >= 0 else torch.zeros_like(eye[0]) for k in which])
        options: dict[str, Any] = {
            "tasks": self.batch,
            "base_coeffs": coeffs.new_zeros(len(which)),
            "pairs": [(t, k) for t, k in enumerate(which) if k >= 0],
            "batch_dim": self.batch_dim,
            "backend": self.backend,
        }
        a, b = [d.a for d in deltas], [d.b for d in deltas]
        thin = self.linear(self.x, torch.zeros_like(a[0]), a, taken, **options)
        return self.linear(thin, torch.zeros_like(b[0]), b, coeffs, **options)

    @property
    def task_of_row(self) -> Tensor:
        """int64 [M]: each row's row of a [T + 1, …] table, the base's being the last."""
        assert self.batch is not None
        ids, rows = self.batch.ids, self.x.shape[:-1].numel()
        if ids.shape[0] == 0:
            return ids.new_empty(rows)
        return torch.remainder(ids[sample_of_row(rows, ids.shape[0], self.inner, ids.device)], self.batch.num_tasks + 1)


class CodedCall(NamedTuple):
    """What of a coded product is not differentiated."""

    which: list[int]
    batch: Index
    inner: int
    kind: str


class Coded(torch.autograd.Function):
    """y + factors[t]∘(D x). Saved: x, codes, tile and factors; D x is computed again for the factors' gradient."""

    @staticmethod
    def forward(
        ctx: Any, call: CodedCall, tile: Tensor | None, y: Tensor, x: Tensor, factors: Tensor, *codes: Tensor
    ) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(x, tile, factors, *call.batch, *codes)
        out: Tensor = ops.coded_fwd(y, x, list(codes), tile, factors, call.which, *call.batch, call.inner, call.kind)
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "delta_linear: second derivatives need backend='reference', or of a TapsModel the network that "
                "merge(task) gives; the kernels have none"
            )
        call: CodedCall = ctx.call
        x, tile, factors, *rest = ctx.saved_tensors
        index, codes = rest[:3], rest[3:]
        dy = dy.contiguous()
        dx = dfactors = None
        if ctx.needs_input_grad[3]:
            dx = ops.coded_dx(dy, codes, tile, factors, call.which, *index, call.inner, call.kind, x.shape[1])
        if ctx.needs_input_grad[4]:
            nothing, ones = dy.new_zeros(dy.shape, dtype=factors.dtype), torch.ones_like(factors)
            product = ops.coded_fwd(nothing, x, codes, tile, ones, call.which, *index, call.inner, call.kind)
            product *= dy
            dfactors = sums_of_rows(product, index, call.inner)[: factors.shape[0]]
        return (None, None, dy, dx, dfactors, *(None for _ in codes))
