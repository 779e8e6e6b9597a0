"""Kernels of other libraries for mixed batches over merged weights, on CUDA, where they are installed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .layers import LayerProblem
from .providers import Forward, installed, layer, segments, unsorted

_FLASHINFER = installed("flashinfer", "flashinfer-python")


@layer("merged-flashinfer", "merged", ("linear",), phase="forward", mixed=True, absent=_FLASHINFER)
def _flashinfer(p: LayerProblem) -> tuple[Forward, Sequence[Tensor]]:
    """FlashInfer's SegmentGEMM (CUDA, 16 bit)."""
    from flashinfer import SegmentGEMMWrapper

    weights = torch.stack(p.merged())
    gemm = SegmentGEMMWrapper(torch.empty(128 << 20, dtype=torch.int8, device=p.device))

    def forward() -> Tensor:
        order, _, ends = segments(p)
        lengths = torch.diff(ends, prepend=ends.new_zeros(1)).long()
        y = gemm.run(p.x[order].flatten(0, -2), weights, len(weights), weight_column_major=True, seg_lens=lengths)
        return unsorted(p, y, order)

    return forward, [weights]


@layer("merged-scattermoe", "merged", ("linear",), phase="forward", mixed=True, absent=installed("scattermoe"))
def _scattermoe(p: LayerProblem) -> tuple[Forward, Sequence[Tensor]]:
    """ScatterMoE's parallel_linear with one expert a row (CUDA)."""
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

    weights = torch.stack(p.merged()).mT.contiguous()

    def forward() -> Tensor:
        slots = p.slot[p.ids].repeat_interleave(p.x[0, ..., 0].numel())
        y = parallel_linear(p.x.flatten(0, -2), weights, 1, *flatten_sort_count(slots[:, None], len(weights)))
        return y.unflatten(0, p.x.shape[:-1])

    return forward, [weights]
