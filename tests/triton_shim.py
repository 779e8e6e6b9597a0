"""Triton kernels on the CPU: switches the interpreter on, and corrects what it computes wrongly.

Import before anything imports triton, as `conftest.py` does. With a CUDA device it does nothing. In Triton 3.6 to
3.9 the interpreter keeps bfloat16 as raw uint16: its casts truncate and `tl.dot` multiplies the bit patterns, without
a word. Here casts round to nearest even and products are computed in float32. Other arithmetic on bfloat16 is
refused, since it would be garbage; kernels convert first anyway.
"""

from __future__ import annotations

import os

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = DEVICE == "cpu"
if INTERPRETED:
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle  # noqa: E402


def widened(bits: np.ndarray) -> np.ndarray:
    """float32 values of bfloat16 bit patterns."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(values: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns of float32 values, to nearest even."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    nearest = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), nearest)


def _is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def install() -> None:
    builder = InterpreterBuilder
    cast_impl, fp_to_fp, binary_op, create_dot = (
        builder.cast_impl, builder.create_fp_to_fp, builder.binary_op, builder.create_dot
    )  # fmt: skip

    def cast(self, src, dst_type):
        into = dst_type.scalar
        if _is_bf16(src) and into != tl.bfloat16:
            src = TensorHandle(widened(src.data), tl.float32)
            return src if into == tl.float32 else cast_impl(self, src, dst_type)
        if into == tl.bfloat16 and not _is_bf16(src):
            return TensorHandle(rounded(src.data.astype(np.float32)), tl.bfloat16)
        return cast_impl(self, src, dst_type)

    def convert(self, src, dst_type, rounding_mode):
        if _is_bf16(src) or dst_type.scalar == tl.bfloat16:
            return cast(self, src, dst_type)
        return fp_to_fp(self, src, dst_type, rounding_mode)

    def binary(self, lhs, rhs, op):
        if _is_bf16(lhs) or _is_bf16(rhs):
            raise NotImplementedError("the interpreter has no bfloat16 arithmetic: convert to float32 first")
        return binary_op(self, lhs, rhs, op)

    def dot(self, a, b, d, *rest):
        a, b = (TensorHandle(widened(h.data), tl.float32) if _is_bf16(h) else h for h in (a, b))
        return create_dot(self, a, b, d, *rest)

    def splat(self, ret_ty, arg):
        # A comparison's handle keeps the type of what it compared; its data is right, and a mask needs booleans.
        value = arg.data[0] if arg.data.ndim else arg.data
        return TensorHandle(np.full(ret_ty.shape, value, dtype=arg.data.dtype), arg.dtype.scalar)

    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch_tensor(tensor, scope)
        # Triton 3.6 makes a loop bound an integer in a way that numpy 2.4 no longer allows.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patched
    builder.cast_impl = builder.create_fp_ext = builder.create_fp_trunc = cast
    builder.create_fp_to_fp, builder.binary_op, builder.create_dot = convert, binary, dot
    builder.create_splat = splat


def run_only_last_programs(monkeypatch) -> None:
    """Of each grid too large to interpret: for tests of the addresses that its last program reads and writes."""

    def programs(*bounds: int) -> range:
        large = len(bounds) == 1 and bounds[0] > 2**16
        return range(bounds[0] - 1, bounds[0]) if large else range(*bounds)

    monkeypatch.setattr(interpreter, "range", programs, raising=False)


if INTERPRETED:
    install()


def to_tf32(tensor: torch.Tensor) -> torch.Tensor:
    """What a tensor core reads of float32: it drops 13 bits, where the vendor's libraries may have rounded before."""
    return (tensor.view(torch.int32) & ~0x1FFF).view(torch.float32)
