"""Which backend and algorithm runs a problem, and why not another. Nothing falls back silently.

`select` takes the first row of the table whose backend can run the problem and pays at its size; an explicit backend or
algorithm narrows the table and never widens it. `explain` prints the whole table with its reasons.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from . import _ext, _tuned
from ._problem import Problem


class BackendError(RuntimeError):
    """An explicitly chosen backend or algorithm cannot run this problem."""


class Choice(NamedTuple):
    backend: str
    algorithm: str


def _reference(problem: Problem) -> Iterator[str]:
    return iter(())


def _cpu(problem: Problem) -> Iterator[str]:
    if problem.op != "linear" and not problem.depthwise:
        yield "has convolution kernels for depthwise ones on channels last alone: the vendor's are used through aten"
    if problem.device != "cpu":
        yield f"runs on the CPU, the tensors are on {problem.device}"
    if _ext.CPU_ERROR is not None:
        yield _ext.CPU_ERROR


def _aten(problem: Problem) -> Iterator[str]:
    if problem.op != "conv2d":
        yield "serves convolutions only"


def _linear(problem: Problem) -> Iterator[str]:
    if problem.op != "conv2d":
        yield "serves convolutions only"
    elif not problem.row_taps:
        yield (
            "needs a convolution whose pixels or patches are rows: without groups, x on channels last, and 1 x 1 "
            "without padding or, with base on channels last too, undilated"
        )
    elif select(as_rows(problem)).backend == "reference":
        yield "has no kernels for the rows: delta_linear would run by the reference"


def as_rows(problem: Problem) -> Problem:
    """The linear problem that a convolution with ``row_taps`` is: a row for each pixel of its result."""
    shape, rows = (problem.shape[0], math.prod(problem.shape[1:])), problem.rows * problem.pixels
    return problem._replace(op="linear", shape=shape, rows=rows, row_taps=0, pixels=1, channels_last=False)


STREAM_ROWS, STREAM_ROWS_FLOAT32 = 16, 64
"""Rows up to which the C++ kernel's launch and loads beat Triton's; the second of a mixed batch of float32.

Beyond 16 each weight is read again for every further 16 rows. In float32, whose products keep the ordinary units busy
whichever way, that costs little: 8 and 64 rows of 8 tasks, 768 x 3072, took 54 and 165 µs on an H200, "split" 98 and
164 (benchmarks/results/gpu-nvidia-h200.json).
"""
STREAM_DELTAS = 255
"""Deltas whose addresses fit one launch: kMaxSources - 1 of csrc/cuda/stream.h."""


def _cuda(problem: Problem) -> Iterator[str]:
    if problem.op != "linear":
        yield "has no convolution kernels"
    if problem.device != "cuda":
        yield f"runs on CUDA devices, the tensors are on {problem.device}"
    if problem.dtype == torch.float64:
        yield f"computes float32, bfloat16 and float16, the tensors are {problem.dtype}"
    if problem.grad:
        yield "computes no gradients: a call that needs them belongs to one backend"
    if problem.num_deltas > STREAM_DELTAS:
        yield f"takes at most {STREAM_DELTAS} deltas, got {problem.num_deltas}"
    if max(problem.rows, *problem.shape) >= 2**30:
        yield f"counts rows and features in 30 bits, got {problem.rows} rows and weight {problem.shape}"
    if (reason := _ext.cuda_refusal(problem.gpu)) is not None:
        yield reason


def _triton(problem: Problem) -> Iterator[str]:
    if problem.device != "cuda":
        yield f"runs on CUDA devices, the tensors are on {problem.device}"
        return
    try:
        from .kernels import conv2d, linear
    except ImportError as error:
        yield f"Triton cannot be imported: {error}"
        return
    yield from (linear if problem.op == "linear" else conv2d).not_supported_reasons(problem)


def _scratch(problem: Problem) -> Iterator[str]:
    if problem.op != "linear":
        yield "serves delta_linear only"
        return
    try:
        from .kernels import merge
    except ImportError:
        return  # said by _triton
    if problem.num_tasks is not None:
        reason = merge.scratch_refusal(problem.shape[:2], problem.num_tasks, problem.dtype.itemsize)
        if reason is not None:
            yield reason


def _few_rows(problem: Problem) -> bool:
    if problem.op == "conv2d":
        return _small_images(problem)
    return problem.rows < _crossover(problem).rows * max(problem.num_tasks or 1, 1)


def _streams(problem: Problem) -> bool:
    """Not weights whose rows are not contiguous: the kernel would copy all of them at each call."""
    if problem.turned:
        return False
    more = problem.dtype == torch.float32 and _mixed(problem)
    return problem.rows <= (STREAM_ROWS_FLOAT32 if more else STREAM_ROWS)


IMPLICIT_DELTAS = 4
"""Deltas of 16 bits from which the implicit product of a mixed batch pays however many pixels a task has.

It multiplies each image twice, while merging convolves all images with the base and with each delta. Eight images of
eight tasks, 3 x 3, took 55 µs for 279 at 256 channels of 14 x 14 and 56 for 354 at 512 of 7 x 7, on an H200
(benchmarks/results/gpu-nvidia-h200.json).
"""


def _small_images(problem: Problem) -> bool:
    """Whether the implicit product of a mixed batch is wanted: few pixels a task or many deltas, loads 16 bytes wide.

    A task in the batch has at least an image.
    """
    if not _mixed(problem) or problem.row_taps == 1 or not problem.channels_last:
        return False
    if problem.shape[1] * problem.dtype.itemsize % 16:
        return False
    if problem.dtype.itemsize == 2 and problem.num_deltas >= IMPLICIT_DELTAS:
        return True
    tasks = min(max(problem.num_tasks or 1, 1), max(problem.rows, 1))
    return problem.rows * problem.pixels < _crossover(problem).rows * tasks


def _crossover(problem: Problem) -> _tuned.Crossover:
    return _tuned.crossover(problem.op, _tuned.arch(problem.gpu), problem.dtype)


def _split_why(problem: Problem) -> str:
    rows, source = _crossover(problem)
    if problem.op == "conv2d":
        return (
            "an implicit product for each image with its task's deltas alone; by itself in mixed batches on channels "
            f"last of fewer than {rows} output pixels a task ({source}), or in 16 bits of {IMPLICIT_DELTAS} deltas "
            "or more"
        )
    return f"two products into one accumulator: bound by bytes while rows a task < {rows} ({source})"


def _merge_why(problem: Problem) -> str:
    rows, source = _crossover(problem)
    return f"weights summed into scratch, then the vendor GEMM: from {rows} rows a task ({source})"


ROWS_WEIGHTS = (1 << 13, 1 << 19)
"""Weights from which a 1 x 1 convolution is faster as rows: in a mixed batch, and where one weight serves all.

Measured on two cores with AVX-512 (benchmarks/mixed_conv.py). With fewer weights the vendor's convolution of a large
map wins; with more, it loses by packing the weight for each call.
"""


PATCH_ROWS, PATCH_WEIGHTS, PATCH_BYTES = 256, 1 << 18, 1 << 26
"""Where the patches of a mixed batch are copied into rows on a CPU: up to so many rows for the base and for each delta,
from so many weights, and while the copy is no larger.

The vendor's convolution packs a weight for each call, whose few pixels do not pay for it; the sum of a base and deltas
is packed here anyway. Measured as `ROWS_WEIGHTS` is.
"""


def _patches_pay(problem: Problem) -> bool:
    # While tracing, asking for the number of images would pin the traced program to it.
    if problem.device != "cpu" or problem.grad or not _mixed(problem) or torch.compiler.is_compiling():
        return False
    pixels, weights = problem.rows * problem.pixels, math.prod(problem.shape)
    copied = pixels * weights // problem.shape[0] * problem.dtype.itemsize
    packed = 1 if problem.num_tasks == 1 else 1 + problem.num_deltas
    return pixels <= PATCH_ROWS * packed and weights >= PATCH_WEIGHTS and copied <= PATCH_BYTES


def _mixed(problem: Problem) -> bool:
    return problem.num_tasks is not None and problem.num_deltas > 0


def _pixels_pay(problem: Problem) -> bool:
    if problem.row_taps > 1:
        return _patches_pay(problem)
    return math.prod(problem.shape) >= ROWS_WEIGHTS[0 if _mixed(problem) else 1]


def vendor_alone(shape: Sequence[int]) -> bool:
    """Whether one weight of this shape is the vendor's business, whatever the images: `select` would say so too."""
    return math.prod(shape[2:]) > 1 or math.prod(shape) < ROWS_WEIGHTS[1]


def _weights_differ(problem: Problem) -> bool:
    """A depthwise convolution of one weight is the vendor's business."""
    return problem.op == "linear" or _mixed(problem)


class _Row(NamedTuple):
    backend: str
    algorithm: str
    preferred: Callable[[Problem], bool]
    """Whether "auto" may take this row."""
    why: str | Callable[[Problem], str]
    against: Callable[[Problem], Iterator[str]] | None = None
    """Reasons of its own, beside those of the backend, why it cannot run a problem."""


_REASONS: dict[str, Callable[[Problem], Iterator[str]]] = {
    "cpu": _cpu,
    "cuda": _cuda,
    "triton": _triton,
    "linear": _linear,
    "aten": _aten,
    "reference": _reference,
}

TABLE = (
    _Row("cpu", "blend", _weights_differ, "one product; the weight is summed in float32 while it is packed"),
    _Row("cpu", "split", _weights_differ, "the exact one: nothing but the result is rounded"),
    _Row("cuda", "stream", _streams, "weights stream past the rows once, from one C++ call"),
    _Row("triton", "split", _few_rows, _split_why),
    _Row("triton", "merge", lambda p: True, _merge_why, _scratch),
    _Row("linear", "rows", _pixels_pay, "pixels or their patches are rows of delta_linear: every task in one product"),
    _Row(
        "aten",
        "merge",
        lambda p: True,
        "kernels summed into scratch, then the vendor convolution; the base alone is that convolution",
    ),
    _Row("aten", "split", lambda p: True, "base convolution for all images plus one for each open delta"),
    _Row("reference", "split", lambda p: True, "plain PyTorch: right, not fast"),
    _Row("reference", "blend", lambda p: True, "plain PyTorch: right, not fast"),
)

_OTHER_OP = {"linear": ("linear", "aten"), "conv2d": ("cuda",)}
"""Backends that have nothing for an operation: no error offers them."""
BACKENDS = tuple(_REASONS)
ALGORITHMS = tuple(dict.fromkeys(row.algorithm for row in TABLE))


def reasons_against(row: _Row, problem: Problem) -> Iterator[str]:
    """Why a row of the table cannot run a problem; nothing if it can."""
    if row.against is not None:
        yield from row.against(problem)
    yield from _REASONS[row.backend](problem)


def select(problem: Problem, backend: str | None = None, algorithm: str = "auto") -> Choice:
    """The backend and algorithm that run ``problem``.

    Raises:
        ValueError: a backend or algorithm that does not exist.
        BackendError: the explicit choice cannot run; the text lists the reasons.
    """
    # While tracing, sizes may be symbols, which a cache would pin to one value.
    choose = _select if torch.compiler.is_compiling() else _cached_select
    return choose(problem, backend, algorithm)


def _select(problem: Problem, backend: str | None, algorithm: str) -> Choice:
    if backend is not None and backend not in BACKENDS:
        known = dict.fromkeys(row.backend for row in TABLE if row.backend not in _OTHER_OP[problem.op])
        raise ValueError(f"delta_{problem.op}: backend must be one of {', '.join(known)}, got {backend!r}")
    if algorithm != "auto" and algorithm not in ALGORITHMS:
        known = dict.fromkeys(row.algorithm for row in TABLE if row.backend not in _OTHER_OP[problem.op])
        raise ValueError(f"delta_{problem.op}: algorithm must be auto, {', '.join(known)}, got {algorithm!r}")
    usable: dict[tuple[str, object], bool] = {}
    able: Choice | None = None
    for row in TABLE:
        if (backend or row.backend) != row.backend or (algorithm not in ("auto", row.algorithm)):
            continue
        kind = row.backend, row.against
        if kind not in usable:
            usable[kind] = next(reasons_against(row, problem), None) is None
        # An explicit choice is taken at its word; "auto" also asks whether it pays.
        if usable[kind] and (algorithm != "auto" or row.preferred(problem)):
            return Choice(row.backend, row.algorithm)
        if usable[kind] and able is None:
            able = Choice(row.backend, row.algorithm)
    if backend is not None and able is not None:
        return able
    raise BackendError(
        f"delta_{problem.op}: backend={backend!r}, algorithm={algorithm!r} cannot run this problem\n" + explain(problem)
    )


_cached_select = functools.lru_cache(maxsize=4096)(_select)


def explain(problem: Problem) -> str:
    """Every backend and algorithm for ``problem``, in order of preference, each with why or why not."""
    size = " x ".join(map(str, problem.shape))
    tasks = "one weight" if problem.num_tasks is None else f"tasks {problem.num_tasks}"
    lines = [
        f"{problem.op}: weight {size}, rows {problem.rows}, deltas {problem.num_deltas}, {tasks}, "
        f"{problem.dtype}, {problem.device}"
    ]
    taken = False
    for row in TABLE:
        reasons = list(reasons_against(row, problem))
        if reasons:
            verdict, text = "no ", "; ".join(reasons)
        else:
            chosen = not taken and row.preferred(problem)
            verdict, taken = "-> " if chosen else "yes", taken or chosen
            text = row.why if isinstance(row.why, str) else row.why(problem)
        lines.append(f"  {verdict} {row.backend:<9} {row.algorithm:<6} {text}")
    return "\n".join(lines)


def describe_machine() -> str:
    """What this process can run: versions, devices, extensions, and how to get what is missing."""
    lines = [f"torch {torch.__version__}, {torch.get_num_threads()} threads"]
    lines.append(f"CPU kernels: {_ext.CPU_ERROR or torch.ops.taps_fast.cpu_isa()}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            name, refusal = torch.cuda.get_device_name(index), _ext.cuda_refusal(index)
            lines.append(f"CUDA device {index}: {name}; CUDA kernels: {refusal or 'loaded'}")
    else:
        lines.append("CUDA device: none")
    try:
        import triton

        lines.append(f"Triton {triton.__version__}")
    except ImportError as error:
        lines.append(f"Triton: {error}; pip install 'triton>=3.6'")
    return "\n".join(lines)
