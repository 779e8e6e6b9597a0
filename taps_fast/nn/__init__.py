"""Layers, norms and heads that tell tasks apart."""

from .context import TaskContext
from .conv import FastTapsConv2d
from .head import TaskHead
from .linear import FastTapsLinear
from .norm import TaskNorm
from .transposed import TransposedLinear
from .wrapped import WrappedConv2d, WrappedLayer, WrappedLinear

__all__ = [
    "FastTapsConv2d",
    "FastTapsLinear",
    "TaskContext",
    "TaskHead",
    "TaskNorm",
    "TransposedLinear",
    "WrappedConv2d",
    "WrappedLayer",
    "WrappedLinear",
]
