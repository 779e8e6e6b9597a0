"""What a call asks for, as metadata, and every error that a caller of the ops can cause.

Nothing here reads the value of a tensor. Messages have one form:
``<function>: <argument> must <rule>, got <value> (<related value>)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .formats import Delta, Format
from .stacked import Deltas, Stack
from .tasks import TaskBatch

IntPair = int | Sequence[int]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Problem(NamedTuple):
    """One call of `delta_linear` or `delta_conv2d`: all that choosing a kernel may depend on."""

    op: str
    device: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    """Of the weight: (O, I), or (O, C / groups, kh, kw)."""
    rows: int
    """M; for a convolution, the number of images."""
    num_deltas: int
    num_tasks: int | None
    """T, or None when one weight serves all rows."""
    grad: bool
    groups: int = 1
    row_taps: int = 0
    """As `row_taps` says."""
    depthwise: bool = False
    """Whether every channel is a group of its own, in and out, on channels last."""
    pixels: int = 1
    """Output pixels of an image."""
    channels_last: bool = False
    """Whether x and base are."""
    turned: bool = False
    """Whether a matrix has in features that are no neighbours in memory, as the weights of GPT-2."""
    gpu: int | None = None
    """Which of several GPUs, where the tensors are on one; None: the current one."""


def unbind_deltas(function: str, deltas: Sequence[Delta] | Tensor) -> Deltas:
    """K deltas, from a sequence or from one tensor [K, …]; a list or a stack as it is."""
    if isinstance(deltas, (list, Stack)):
        return deltas
    if isinstance(deltas, Tensor):
        if deltas.dim() == 0:
            raise ValueError(f"{function}: deltas must be K tensors shaped like base or one [K, …], got a scalar")
        return list(deltas.unbind())
    return list(deltas)


def is_dense_linear(x: Tensor, base: Tensor, deltas: Deltas, bias: Tensor | None) -> bool:
    """Whether rows meet a matrix that fits them and dense deltas, as in most calls: nothing to refuse or to change.

    If not, `check_tensors`, `check_weight` and `check_features` say what is wrong, if anything is.
    """
    return are_alike(x, base, deltas, bias, dims=2) and x.dim() > 1 and x.shape[-1] == base.shape[1]


def are_alike(x: Tensor, base: Tensor, deltas: Deltas, bias: Tensor | None, dims: int) -> bool:
    """Whether all are tensors that agree as `check_weight` says, no format among them: the quick test before it."""
    if not (isinstance(x, Tensor) and isinstance(base, Tensor) and (bias is None or isinstance(bias, Tensor))):
        return False
    if not isinstance(deltas, list):
        return False
    dtype, device, shape = x.dtype, x.device, base.shape
    if dtype not in DTYPES or len(shape) != dims or base.dtype != dtype or base.device != device:
        return False
    for delta in deltas:
        if not isinstance(delta, Tensor) or delta.dtype != dtype or delta.device != device or delta.shape != shape:
            return False
    return True


def check_features(function: str, x: Tensor, base: Tensor) -> None:
    """The last axis of x is what a linear layer's base multiplies."""
    if x.dim() == 0 or x.shape[-1] != base.shape[1]:
        raise ValueError(
            f"{function}: x must be [..., {base.shape[1]}] for base {tuple(base.shape)}, got {tuple(x.shape)}"
        )


def check_weight(function: str, x: Tensor, base: Tensor, deltas: Sequence[Delta], dims: int) -> None:
    """base, deltas and x agree on shape, dtype and device. What holds for one part of a stack holds for all."""
    dtype, device, shape = x.dtype, x.device, base.shape
    if dtype not in DTYPES:
        raise TypeError(f"{function}: x must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    if len(shape) != dims:
        raise ValueError(f"{function}: base must have {dims} dimensions, got shape {tuple(shape)}")
    for k, weight in enumerate((base, *_checked(deltas))):
        if isinstance(weight, Format):
            _check_format(function, k - 1, weight, dtype, device, shape)
            continue
        if weight.dtype == dtype and weight.device == device and weight.shape == shape:
            continue
        name = f"deltas[{k - 1}]" if k else "base"
        if weight.dtype != dtype:
            alike = all(isinstance(w, Format) or w.dtype == weight.dtype for w in (base, *_checked(deltas)))
            why = f" (all weights are: convert the input, or the model with .to({dtype}))" if alike else ""
            raise TypeError(f"{function}: {name} must be {dtype} like x, got {weight.dtype}{why}")
        if weight.device != device:
            raise ValueError(f"{function}: {name} must be on {device} like x, got {weight.device}")
        raise ValueError(f"{function}: {name} must be {tuple(shape)} like base, got {tuple(weight.shape)}")


def _check_format(
    function: str, k: int, format: Format, dtype: torch.dtype, device: torch.device, shape: torch.Size
) -> None:
    kind = type(format).__name__
    if format.shape != shape:
        raise ValueError(
            f"{function}: deltas[{k}] must be {tuple(shape)} like base, got {tuple(format.shape)} ({kind})"
        )
    own = format.own_dtype
    for field, value in format.tensors.items():
        if value.device != device:
            raise ValueError(f"{function}: deltas[{k}] must be on {device} like x, got {value.device} ({kind}.{field})")
        if value.dtype != dtype and value.is_floating_point() and field not in own:
            raise TypeError(f"{function}: deltas[{k}] must be {dtype} like x, got {value.dtype} ({kind}.{field})")


def _checked(deltas: Sequence[Delta]) -> Sequence[Delta]:
    return [deltas.like] if isinstance(deltas, Stack) else deltas


def check_tensors(function: str, x: Tensor, base: Tensor, deltas: Sequence[Delta], bias: Tensor | None) -> None:
    """Everything that must be a Tensor is one."""
    for k, value in enumerate((x, base, bias, *_checked(deltas))):
        if (
            not isinstance(value, Tensor)
            and not (k == 2 and value is None)
            and not (k > 2 and isinstance(value, Format))
        ):
            name = ("x", "base", "bias")[k] if k < 3 else f"deltas[{k - 3}]"
            rule = "a Tensor" if k < 3 else "a Tensor or a format"
            raise TypeError(f"{function}: {name} must be {rule}, got {type(value).__name__}")


def check_coeffs(
    function: str, coeffs: Tensor, base_coeffs: Tensor | None, num_deltas: int, x: Tensor, mixed: bool
) -> int | None:
    """T (None without tasks), from coefficients of the right shape, type and device."""
    if not isinstance(coeffs, Tensor):
        raise TypeError(f"{function}: coeffs must be a Tensor, got {type(coeffs).__name__}")
    if not coeffs.is_floating_point():
        raise TypeError(f"{function}: coeffs must be a floating-point tensor, got {coeffs.dtype}")
    if coeffs.device != x.device:
        raise ValueError(f"{function}: coeffs must be on {x.device} like x, got {coeffs.device}")
    shape = coeffs.shape
    if len(shape) != (2 if mixed else 1) or shape[-1] != num_deltas:
        want = f"[T, {num_deltas}], one row a task" if mixed else f"[{num_deltas}], one number a delta"
        raise ValueError(f"{function}: coeffs must be {want}, got {tuple(shape)} (tasks given: {mixed})")
    num_tasks = shape[0] if mixed else None
    if base_coeffs is not None:
        if base_coeffs.requires_grad:
            raise ValueError(f"{function}: base_coeffs must not require a gradient: it is data, 1 or 0 a task")
        if tuple(base_coeffs.shape) != (num_tasks if mixed else 1,):
            raise ValueError(
                f"{function}: base_coeffs must be [{num_tasks if mixed else 1}], got {tuple(base_coeffs.shape)}"
            )
    return num_tasks


def check_bias(function: str, bias: Tensor, out_features: int, num_tasks: int | None, x: Tensor) -> None:
    """bias is [O], or with tasks [T, O] or [T + 1, O]."""
    if bias.dtype != x.dtype:
        raise TypeError(f"{function}: bias must be {x.dtype} like x, got {bias.dtype}")
    if bias.device != x.device:
        raise ValueError(f"{function}: bias must be on {x.device} like x, got {bias.device}")
    _check_table(function, "bias", bias, out_features, num_tasks)


ACTIVATIONS = (None, "relu", "relu6", "silu", "gelu")


def check_epilogue(
    function: str,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str | None,
    channels: int,
    num_tasks: int | None,
    x: Tensor,
) -> None:
    """scale and shift are tables as bias may be, of any floating-point dtype; activation is one we have."""
    for name, table in (("scale", scale), ("shift", shift)):
        if table is None:
            continue
        if not isinstance(table, Tensor):
            raise TypeError(f"{function}: {name} must be a Tensor, got {type(table).__name__}")
        if not table.is_floating_point():
            raise TypeError(f"{function}: {name} must be a floating-point tensor, got {table.dtype}")
        if table.device != x.device:
            raise ValueError(f"{function}: {name} must be on {x.device} like x, got {table.device}")
        _check_table(function, name, table, channels, num_tasks)
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{function}: activation must be one of {', '.join(map(str, ACTIVATIONS))}, got {activation!r}"
        )


def _check_table(function: str, name: str, table: Tensor, channels: int, num_tasks: int | None) -> None:
    legal: list[tuple[int, ...]] = [(channels,)]
    if num_tasks is not None:
        legal += [(num_tasks, channels), (num_tasks + 1, channels)]
    if table.shape not in legal:
        raise ValueError(f"{function}: {name} must be {' or '.join(map(str, legal))}, got {tuple(table.shape)}")


def check_pairs(function: str, pairs: Sequence[tuple[int, int]], num_tasks: int | None, num_deltas: int) -> list[int]:
    """Flat positions t * K + k in coeffs."""
    flat = []
    for task, delta in pairs:
        if not (0 <= task < (num_tasks or 1) and 0 <= delta < num_deltas):
            raise ValueError(
                f"{function}: pairs must be (task, delta) in [0, {num_tasks or 1}) x [0, {num_deltas}), "
                f"got ({task}, {delta})"
            )
        flat.append(task * num_deltas + delta)
    return flat


def is_transformed() -> bool:
    """Whether a ``torch.func`` transform is running, or forward-mode AD, which would lose tangents without a word."""
    if not torch._C._are_functorch_transforms_active():
        return forward_ad._current_level >= 0
    stack = torch._C._functorch.get_interpreter_stack() or []
    return any(level.key() != torch._C._functorch.TransformType.Functionalize for level in stack)


def refuse_transforms(function: str, reference: str = "") -> NoReturn:
    """The kernels have no rules for `is_transformed`."""
    raise RuntimeError(
        f"{function}: torch.func and forward-mode AD need {reference}the network that TapsModel.merge(task) gives; the "
        "kernels have no rules for them"
    )


def group(function: str, tasks: TaskBatch | Tensor | Sequence[int], num_tasks: int, x: Tensor) -> TaskBatch:
    """tasks as a TaskBatch over coeffs' T tasks, on x's device."""
    if isinstance(tasks, TaskBatch):
        if tasks.num_tasks != num_tasks:
            raise ValueError(
                f"{function}: tasks must be a TaskBatch of {num_tasks} tasks, one a row of coeffs, "
                f"got one of {tasks.num_tasks}"
            )
        return tasks.to(x.device)
    if isinstance(tasks, str) or (isinstance(tasks, Sequence) and any(isinstance(t, str) for t in tasks)):
        raise TypeError(f"{function}: tasks must be integer ids, got {tasks!r} (names belong to TapsModel)")
    return TaskBatch.from_ids(tasks, num_tasks, device=x.device)


def rows_per_sample(function: str, x: Tensor, batch: int, batch_dim: int, axes: int) -> int:
    """``inner``: consecutive flattened rows that belong to one sample (see `taps_fast._ops`).

    ``axes`` is the number of leading axes of x that are flattened into rows. A negative ``batch_dim`` counts from x's
    last axis.
    """
    along = batch_dim + x.dim() if batch_dim < 0 else batch_dim
    if not 0 <= along < axes:
        raise ValueError(
            f"{function}: batch_dim must be one of the {axes} axes of x before its features, got {batch_dim} "
            f"(x {tuple(x.shape)})"
        )
    size = x.shape[along]
    if batch == 0 or size % batch:
        if size == 0 and batch == 0:
            return 1
        raise ValueError(
            f"{function}: tasks must divide the batch: rows % ids == 0, "
            f"got {batch} ids (x {tuple(x.shape)} has {size} rows along axis {along})"
        )
    inner = size // batch
    for axis in range(along + 1, axes):
        inner = inner * x.shape[axis]
    return max(inner, 1)  # without rows it says nothing


def check_conv(
    function: str, x: Tensor, base: Tensor, stride: IntPair, padding: IntPair | str, dilation: IntPair, groups: int
) -> tuple[Tensor, list[int], list[int], list[int], int]:
    """x [N, C, H, W] and the four settings of a convolution as lists; "same" may have padded x."""
    if groups >= 1 and x.shape[1] != base.shape[1] * groups and not (x.shape[1] % groups or base.shape[0] % groups):
        raise ValueError(
            f"{function}: x must have {base.shape[1] * groups} channels, got {x.shape[1]} (x {tuple(x.shape)}, "
            f"base {tuple(base.shape)}, groups={groups})"
        )
    if groups < 1 or x.shape[1] != base.shape[1] * groups or base.shape[0] % groups:
        raise ValueError(
            f"{function}: groups must split x's {x.shape[1]} channels into base's {base.shape[1]} and divide its "
            f"{base.shape[0]} outputs, got {groups} (x {tuple(x.shape)}, base {tuple(base.shape)})"
        )
    strides, dilations = _pair(function, "stride", stride, 1), _pair(function, "dilation", dilation, 1)
    x, pads = _padding(function, x, base, padding, strides, dilations)
    for size, pad, kernel, step in zip(x.shape[2:], pads, base.shape[2:], dilations, strict=True):
        if size + 2 * pad < step * (kernel - 1) + 1:
            raise ValueError(
                f"{function}: padding must make x at least as large as the kernel, got {padding} "
                f"(x {tuple(x.shape)}, base {tuple(base.shape)}, dilation {dilation})"
            )
    return x, strides, pads, dilations, groups


def output_size(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """Height and width of a convolution's result."""
    sides = zip(size, kernel, stride, padding, dilation, strict=True)
    return [(n + 2 * pad - step * (taps - 1) - 1) // every + 1 for n, taps, every, pad, step in sides]


def row_taps(
    shape: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int, images_last: bool, last: bool
) -> int:
    """How many input pixels make the row that an output pixel of a convolution is a product with; 0: none do.

    One, where it lies in memory as it is: 1 x 1, without groups and padding, on channels last (``images_last``). More
    are copied side by side, if weights lie so too (``last``) and nothing is dilated.
    """
    taps = math.prod(shape[2:])
    if groups != 1 or not images_last:
        return 0
    if taps == 1:
        return int(not any(padding))
    return taps if last and max(dilation) == 1 else 0


def layout(x: Tensor) -> torch.memory_format:
    """Channels last if x is that and not contiguous as well; else contiguous."""
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _pair(name: str, argument: str, value: IntPair, least: int) -> list[int]:
    pair = [value, value] if isinstance(value, int) else list(value)
    if len(pair) == 1:
        pair *= 2
    if len(pair) != 2 or pair[0] < least or pair[1] < least:
        raise ValueError(f"{name}: {argument} must be one or two integers >= {least}, got {value}")
    return pair


def _padding(
    name: str, x: Tensor, base: Tensor, padding: IntPair | str, stride: list[int], dilation: list[int]
) -> tuple[Tensor, list[int]]:
    """x and numeric padding; "same" pads an even-sized kernel's odd remainder on the far side, as PyTorch does."""
    if not isinstance(padding, str):
        return x, _pair(name, "padding", padding, 0)
    if padding == "valid":
        return x, [0, 0]
    if padding != "same":
        raise ValueError(f"{name}: padding must be integers, 'same' or 'valid', got {padding!r}")
    if stride != [1, 1]:
        raise ValueError(f"{name}: padding 'same' must go with stride 1, got stride {stride}")
    total = [d * (k - 1) for d, k in zip(dilation, base.shape[2:], strict=True)]
    near, far = [t // 2 for t in total], [t - t // 2 for t in total]
    if near != far:
        x = F.pad(x, (0, far[1] - near[1], 0, far[0] - near[0]))
    return x, near
