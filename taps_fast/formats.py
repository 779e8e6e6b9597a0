"""Deltas that take less memory than a weight: one bit, one byte, or two thin matrices instead of each number.

A format is a small immutable object with a `shape`. What it means is its `dense`: every faster way of using it
is tested against that. `delta_linear` and `delta_conv2d` take formats wherever they take a delta, beside dense ones,
and a `taps_fast.stacked.Stack` of many alike in place of a list.

    SignBits   scale · (bit ? +1 : -1)     1 bit per weight            BitDelta, arXiv 2402.10193
    MaskBits   scale · (bit ? tile : 0)    1 bit per weight and task   TALL-masks, arXiv 2405.07813; EMR, 2405.17461
    Int8       scale[o] · code[o, i]       1 byte per weight
    LowRank    scale · B A                 r·(O + I) numbers           LoRA, arXiv 2106.09685; truncated SVD

Below, I is all that follows the first axis: for a convolution C/groups·kh·kw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from ._bits import WORD, matrix_of
from ._bits import pack_bits as pack_bits
from ._bits import unpack_bits as unpack_bits

_Self = TypeVar("_Self", bound="Format")


@dataclass(frozen=True, eq=False)
class Format:
    """What all formats share. A format of one's own needs its tensors as fields, and `dense`."""

    name: ClassVar[str]
    trained: ClassVar[tuple[str, ...]]
    """The fields that a layer trains."""
    own_dtype: ClassVar[tuple[str, ...]] = ("scale",)
    """The fields that stay in the dtype they have where the model's changes."""
    shared: ClassVar[tuple[str, ...]] = ()
    """The fields that several deltas hold together."""

    shape: tuple[int, ...]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The fields that are tensors, by name."""
        held = {name: getattr(self, name) for name in self.__match_args__}  # not vars: older compilers cannot read it
        return {name: value for name, value in held.items() if isinstance(value, Tensor)}

    @property
    def bytes(self) -> int:
        """Of its own tensors; those that several deltas hold together are not counted."""
        return sum(t.nbytes for name, t in self.tensors.items() if name not in self.shared)

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return next(iter(self.tensors.values())).device

    def to(self: _Self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> _Self:
        """The same delta elsewhere, or for inputs of another dtype (codes and scales keep theirs)."""
        return replace(self, **self.moved(self.tensors, device, dtype))  # type: ignore[arg-type]

    @classmethod
    def moved(
        cls, tensors: dict[str, Tensor], device: torch.device | str | None, dtype: torch.dtype | None
    ) -> dict[str, Tensor]:
        """What `to` makes of fields."""
        casts = {name for name, t in tensors.items() if t.is_floating_point() and name not in cls.own_dtype}
        return {n: t.to(device=device, dtype=dtype if n in casts else None) for n, t in tensors.items()}

    def detach(self: _Self) -> _Self:
        """The same values, in the same storage, of which nothing is recorded."""
        return replace(self, **{name: value.detach() for name, value in self.tensors.items()})  # type: ignore[arg-type]

    def clone(self: _Self) -> _Self:
        """The same values in storage of their own, but for what several deltas hold together."""
        own = {
            name: value.clone(memory_format=torch.contiguous_format)
            for name, value in self.tensors.items()
            if name not in self.shared
        }
        return replace(self, **own)  # type: ignore[arg-type]

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The delta itself, [O, …]; differentiable in whatever is trained."""
        raise NotImplementedError

    def error(self, delta: Tensor) -> float:
        """‖Δ - Δ'‖ / ‖Δ‖ of this Δ' for the delta it stands for; 0 for a Δ of 0."""
        wide = delta.detach().double()
        norm = float(wide.norm())
        return float((wide - self.dense(torch.float64).detach()).norm()) / norm if norm else 0.0

    def _check(self, name: str, value: Tensor, *legal: tuple[int, ...]) -> None:
        if tuple(value.shape) not in legal:
            raise ValueError(
                f"{type(self).__name__}: {name} must be {' or '.join(map(str, legal))}, got {tuple(value.shape)} "
                f"(shape {self.shape})"
            )


@dataclass(frozen=True, eq=False)
class SignBits(Format):
    """scale · (bit ? +1 : -1): the sign of each weight, and one size for all of them or one for each output.

    Args:
        shape: of the delta, [O, I] or [O, C / groups, kh, kw].
        codes: uint8 [O, 8·ceil(I / 64)], as `pack_bits` gives them.
        scale: [] or [O], float32.

    Raises:
        ValueError, TypeError: fields that do not fit each other.

    Source: BitDelta, arXiv 2402.10193, equation 1: scale = mean |Δ|, which is nearest in the L2 norm; sign(0) is +1.

    >>> delta = torch.tensor([[0.5, -1.5, 0.0]])
    >>> SignBits.from_dense(delta).dense().tolist()
    [[0.6666666865348816, -0.6666666865348816, 0.6666666865348816]]
    """

    name: ClassVar[str] = "bits"
    trained: ClassVar[tuple[str, ...]] = ("scale",)

    codes: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        _check_bits(self, self.codes)
        self._check("scale", self.scale, (), self.shape[:1])

    @classmethod
    def from_dense(cls, delta: Tensor) -> SignBits:
        """The nearest one to a delta."""
        wide = _checked("SignBits", delta)
        scale = wide.abs().mean() if wide.numel() else wide.new_zeros(())
        return cls(tuple(delta.shape), pack_bits(wide >= 0), scale)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The delta itself, [O, …]: ±scale; differentiable in the scale."""
        wide = self.scale.dtype if dtype is None else dtype
        return _scaled(self.scale, unpack_bits(self.codes, self.shape, wide))


@dataclass(frozen=True, eq=False)
class MaskBits(Format):
    """scale · (bit ? tile : 0): the part of one shared delta that a task keeps.

    Args:
        shape, codes, scale: as in `SignBits`.
        tile: like the delta; the same tensor for all tasks that share it. Data: it has no gradient here.

    Source: TALL-masks, arXiv 2405.07813, equation 3 (scale 1); EMR-Merging, arXiv 2405.17461 (a scale per task).

    >>> tile = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> MaskBits.from_mask(tile > 2, tile, 0.5).dense().tolist()
    [[0.0, 0.0], [1.5, 2.0]]
    """

    name: ClassVar[str] = "mask"
    trained: ClassVar[tuple[str, ...]] = ("scale",)
    shared: ClassVar[tuple[str, ...]] = ("tile",)

    codes: Tensor
    tile: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        _check_bits(self, self.codes)
        self._check("tile", self.tile, self.shape)
        self._check("scale", self.scale, (), self.shape[:1])
        if self.tile.requires_grad:
            raise ValueError(
                "MaskBits: tile must not require a gradient: it is data that tasks share, got one that does"
            )

    @classmethod
    def from_mask(cls, mask: Tensor, tile: Tensor, scale: float | Tensor = 1.0) -> MaskBits:
        """From a boolean tensor like ``tile``."""
        if mask.dtype != torch.bool or mask.shape != tile.shape:
            raise ValueError(
                f"MaskBits: mask must be bool {tuple(tile.shape)} like tile, got {mask.dtype} {tuple(mask.shape)}"
            )
        wide = torch.float64 if tile.dtype == torch.float64 else torch.float32
        scale = torch.as_tensor(scale, dtype=wide, device=tile.device)
        return cls(tuple(tile.shape), pack_bits(mask), tile, scale)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The delta itself, [O, …]: scale · tile where a bit is set, else 0; differentiable in the scale."""
        tile = self.tile if dtype is None else self.tile.to(dtype)
        return _scaled(self.scale, torch.where(unpack_bits(self.codes, self.shape), tile, 0))


@dataclass(frozen=True, eq=False)
class Int8(Format):
    """scale[o] · codes[o, i]: a byte per weight, and a scale for each output.

    Args:
        shape: of the delta.
        codes: int8 [O, I].
        scale: [O] or [], float32.

    >>> delta = torch.tensor([[1.27, -0.5], [0.0, 0.0]])
    >>> Int8.from_dense(delta).codes.tolist()
    [[127, -50], [127, 127]]
    """

    name: ClassVar[str] = "int8"
    trained: ClassVar[tuple[str, ...]] = ("scale",)

    codes: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        out, into = matrix_of(self.shape)
        if self.codes.dtype != torch.int8:
            raise TypeError(f"Int8: codes must be torch.int8, got {self.codes.dtype}")
        self._check("codes", self.codes, (out, into))
        self._check("scale", self.scale, (), (out,))

    @classmethod
    def from_dense(cls, delta: Tensor) -> Int8:
        """Rounded to nearest, the largest of each output being ±127.

        An output of 0 has a scale of 0 and codes of 127: codes of 0 would have a scale that never trains.
        """
        wide = _checked("Int8", delta).flatten(1)
        scale = wide.abs().amax(1) / 127 if wide.shape[1] else wide.new_zeros(wide.shape[0])
        column = scale[:, None]
        codes = torch.where(column == 0, 127, wide / column).round().clamp(-127, 127).to(torch.int8)
        return cls(tuple(delta.shape), codes, scale)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The delta itself, [O, …]: a code times its output's scale; differentiable in the scale."""
        wide = self.scale.dtype if dtype is None else dtype
        return _scaled(self.scale, self.codes.to(wide).view(self.shape))


@dataclass(frozen=True, eq=False)
class LowRank(Format):
    """scale · B A: a delta of rank r.

    Args:
        shape: of the delta.
        b: [O, r].
        a: [r, I].
        scale: []; LoRA's α/r.

    Source: LoRA, arXiv 2106.09685.

    >>> low = LowRank.from_dense(torch.ones(4, 6), rank=1)
    >>> torch.allclose(low.dense(), torch.ones(4, 6)), low.bytes
    (True, 44)
    """

    name: ClassVar[str] = "lowrank"
    trained: ClassVar[tuple[str, ...]] = ("b", "a")

    b: Tensor
    a: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        out, into = matrix_of(self.shape)
        rank = self.b.shape[-1] if self.b.dim() else 0
        self._check("b", self.b, (out, rank))
        self._check("a", self.a, (rank, into))
        self._check("scale", self.scale, ())
        if self.a.dtype != self.b.dtype:
            raise TypeError(f"LowRank: a must be {self.b.dtype} like b, got {self.a.dtype}")

    @property
    def rank(self) -> int:
        """r, the columns of b and rows of a."""
        return self.b.shape[1]

    def t(self) -> LowRank:
        """The transposed delta, by views of the same factors."""
        return LowRank((self.a.shape[1], self.b.shape[0]), self.a.t(), self.b.t(), self.scale)

    @classmethod
    def of(cls, b: Tensor, a: Tensor, scale: float = 1.0, shape: Sequence[int] | None = None) -> LowRank:
        """From its factors.

        Args:
            b, a, scale: as above.
            shape: of the delta, where it has more than two axes.
        """
        wide = torch.float64 if b.dtype == torch.float64 else torch.float32
        sizes = (b.shape[0], a.shape[1]) if shape is None else tuple(shape)
        return cls(sizes, b, a, torch.tensor(scale, dtype=wide, device=b.device))

    @classmethod
    def from_dense(cls, delta: Tensor, rank: int) -> LowRank:
        """The nearest one of this rank: the truncated singular value decomposition, its root in each factor.

        What of the rank the delta does not need, all of it where the delta is 0, starts as in LoRA: 0 in b, random in a
        (the same numbers each time). With 0 in both it would never train.
        """
        wide = _checked("LowRank", delta).flatten(1)
        if not hasattr(rank, "__index__") or rank < 1:
            raise ValueError(f"LowRank: rank must be a whole number of at least 1, got {rank}")
        u, s, v = torch.linalg.svd(wide, full_matrices=False)
        root = s[:rank].sqrt()
        needed = s[:rank] > s[:1] * max(wide.shape) * torch.finfo(wide.dtype).eps
        start = torch.randn(v[:rank].shape, generator=torch.Generator().manual_seed(0), device="cpu").to(wide)
        b = torch.where(needed, u[:, :rank] * root, 0)
        a = torch.where(needed[:, None], root[:, None] * v[:rank], start / max(wide.shape[1], 1) ** 0.5)
        return cls.of(b.to(delta.dtype), a.to(delta.dtype).contiguous(), shape=delta.shape)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The delta itself, [O, …]: scale · B A; differentiable in B and A."""
        b, a = (self.b, self.a) if dtype is None else (self.b.to(dtype), self.a.to(dtype))
        return (self.scale.to(b.dtype) * (b @ a)).view(self.shape)


FORMATS: dict[str, type[Format]] = {kind.name: kind for kind in (SignBits, MaskBits, Int8, LowRank)}

Delta = Tensor | Format


def compress(delta: Tensor, name: str, *, rank: int | None = None) -> Format:
    """The nearest delta of a format.

    Args:
        delta: [O, …], finite.
        name: "bits" (`SignBits`), "int8" or "lowrank".
        rank: for "lowrank" alone.

    Raises:
        ValueError: another name, a rank that is missing or out of place, a delta with NaN or infinity.

    Cost: one pass over the delta; "lowrank" one singular value decomposition.

    >>> compress(torch.ones(4, 6), "int8").error(torch.ones(4, 6)) < 1e-6
    True
    """
    check_format("compress: name", name, rank)
    if name == "bits":
        return SignBits.from_dense(delta)
    return Int8.from_dense(delta) if rank is None else LowRank.from_dense(delta, rank)


def check_format(what: str, name: str, rank: int | None) -> None:
    """Whether `compress` has this format, and a rank where it wants one."""
    if name not in ("bits", "int8", "lowrank"):
        raise ValueError(f"{what} must be bits, int8 or lowrank, got {name!r}")
    if (rank is None) == (name == "lowrank"):
        function = what.partition(":")[0]
        raise ValueError(f"{function}: rank must be given for lowrank and for nothing else, got {rank} for {name!r}")


def _check_bits(format: Format, codes: Tensor) -> None:
    if codes.dtype != torch.uint8:
        raise TypeError(f"{type(format).__name__}: codes must be torch.uint8, got {codes.dtype}")
    out, into = matrix_of(format.shape)
    format._check("codes", codes, (out, 8 * -(-into // WORD)))


def _checked(name: str, delta: Tensor) -> Tensor:
    """The values of a delta, wide enough to compute with."""
    if delta.dim() < 2 or not delta.is_floating_point():
        raise ValueError(
            f"{name}: delta must be a floating-point tensor [O, …] with an axis more, got {delta.dtype} "
            f"{tuple(delta.shape)}"
        )
    wide = delta.detach().to(torch.float64 if delta.dtype == torch.float64 else torch.float32)
    if not bool(wide.isfinite().all()):
        bad = (~wide.isfinite()).nonzero()
        raise ValueError(f"{name}: delta must be finite, got {float(wide[tuple(bad[0])])} at {tuple(bad[0].tolist())}")
    return wide


def _scaled(scale: Tensor, weight: Tensor) -> Tensor:
    """scale [] or [O] times weight [O, …], rounded once to weight's dtype; so is no sum of the scale's gradient."""
    if scale.dim():
        scale = scale.view(-1, *(1,) * (weight.dim() - 1))
    wide = torch.promote_types(scale.dtype, weight.dtype)
    return (weight.to(wide) * scale.to(wide)).to(weight.dtype)
