"""Booleans packed into bytes, as `taps_fast.formats` keeps signs and masks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

WORD = 64
"""Rows of bits end on a whole word of so many, the rest being 0: kernels then read words without a tail."""


def matrix_of(shape: Sequence[int]) -> tuple[int, int]:
    """O and I: the first axis, and all that follows it."""
    return shape[0], math.prod(shape[1:])


def pack_bits(mask: Tensor) -> Tensor:
    """uint8 [O, 8·ceil(I / 64)] of a boolean [O, …]: bit i % 8 of byte i // 8 is entry i of the row; the rest is 0.

    >>> pack_bits(torch.tensor([[True, False, True]])).tolist()
    [[5, 0, 0, 0, 0, 0, 0, 0]]
    """
    flat = mask.flatten(1) if mask.dim() > 1 else mask[:, None]
    padded = torch.nn.functional.pad(flat, (0, -flat.shape[1] % WORD))
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (padded.view(flat.shape[0], padded.shape[1] // 8, 8) * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(codes: Tensor, shape: Sequence[int], signs: torch.dtype | None = None) -> Tensor:
    """The boolean tensor that `pack_bits` was given, or ±1 in its place.

    Args:
        codes, shape: uint8 [O, 8·ceil(I / 64)], and the tensor's, [O, …].
        signs: the dtype of ±1; None: a boolean tensor.
    """
    out, into = matrix_of(shape)
    byte = torch.arange(256, dtype=torch.int32, device=codes.device)[:, None]
    bits = byte >> torch.arange(8, dtype=torch.int32, device=codes.device) & 1
    # A row of eight for each byte there is: one pass, where shifts take four.
    table = bits.to(torch.uint8) if signs is None else (2 * bits - 1).to(signs)
    found = torch.nn.functional.embedding(codes.to(torch.int32), table).view(out, codes.shape[1] * 8)
    found = found[:, :into].reshape(tuple(shape))
    return found.bool() if signs is None else found
