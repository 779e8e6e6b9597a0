"""Everything that can compute a layer's workload: ours, what a user could write instead, and what bounds both.

A provider is a function from a problem to a call without arguments. All of them read the ids in that call: the
grouping of a batch is part of what is timed. What a provider prepares once (merged weights) is not.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import taps_fast
from taps_fast import _problem
from taps_fast._dispatch import TABLE, Choice, _Row, reasons_against, select
from taps_fast._problem import Problem, output_size

from .layers import LayerProblem
from .workloads import LAYERS, Workload, unknown

Forward = Callable[[], Tensor]

KINDS = ("ours", "baseline", "merged", "floor", "other")
"""ours; a baseline over base and deltas; a baseline over weights merged beforehand; less work than was asked for
(no deltas at all), for the overhead; and other models of as many parameters. The two baselines are raced."""


@dataclass(frozen=True)
class Ready:
    """A provider on a problem: what is timed, the weights it keeps, and what raises if it is wrong."""

    run: Callable[[], object]
    weights: Sequence[Tensor]
    check: Callable[[], None]


@dataclass(frozen=True)
class Provider:
    name: str
    kind: str
    build: Callable[..., Ready]
    fits: Callable[[Workload], bool]
    """Whether it is made for a workload: op, phase, one weight or a batch of tasks."""
    absent: Callable[[Workload, str], str | None]
    """What keeps it from running here, or None."""
    quick: bool
    """False: not in quick runs, because preparing it takes long."""
    memory: bool
    """False: it keeps what another keeps, and its peak memory is not measured again."""


PROVIDERS: list[Provider] = []
"""Of one name, different operations have a provider each."""


def installed(module: str, package: str | None = None) -> Callable[[Workload, str], str | None]:
    """For providers from elsewhere: one that is not installed is listed as absent."""

    def absent(workload: Workload, device: str) -> str | None:
        if importlib.util.find_spec(module) is None:
            return f"not installed: pip install {package or module}"
        return None

    return absent


def provider(
    name: str,
    kind: str,
    ops: Sequence[str],
    *,
    phase: str | None = None,
    mixed: bool | None = None,
    only: Callable[[Workload], bool] = lambda workload: True,
    absent: Callable[[Workload, str], str | None] = lambda workload, device: None,
    quick: bool = True,
    memory: bool = True,
) -> Callable[[Callable[..., Ready]], Callable[..., Ready]]:
    """Registers a provider; ``phase``, ``mixed`` (with or without tasks) and ``only`` say what it is made for."""

    def fits(workload: Workload) -> bool:
        return (
            workload.op in ops
            and phase in (None, workload.phase)
            and mixed in (None, workload.tasks is not None)
            and only(workload)
        )

    def register(build: Callable[..., Ready]) -> Callable[..., Ready]:
        PROVIDERS.append(Provider(name, kind, build, fits, absent, quick, memory))
        return build

    return register


def find(names: Sequence[str] = ()) -> list[Provider]:
    """The providers named, or all.

    Raises:
        UnknownName: one that does not exist.
    """
    known = {p.name for p in PROVIDERS}
    for name in names:
        if name not in known:
            raise unknown("provider", name, known)
    return [p for p in PROVIDERS if not names or p.name in names]


def layer(name: str, kind: str, ops: Sequence[str] = ("linear", "conv2d"), **options: object) -> Callable:
    """Registers a layer provider: a function from a problem to its forward and the weights it keeps."""

    def decorate(make: Callable[[LayerProblem], tuple[Forward, Sequence[Tensor]]]) -> Callable:
        def build(p: LayerProblem) -> Ready:
            forward, weights = make(p)
            timed: Callable[[], object] = functools.partial(p.differentiate, forward) if p.train else forward
            return Ready(timed, weights, lambda: p.check(p.differentiate(forward)))

        provider(name, kind, ops, **options)(build)
        return make

    return decorate


# Ours.


def _ours(backend: str | None, algorithm: str) -> Callable[[LayerProblem], tuple[Forward, Sequence[Tensor]]]:
    def make(p: LayerProblem) -> tuple[Forward, Sequence[Tensor]]:
        return _delta_op(p, p.base, p.deltas, backend=backend, algorithm=algorithm), [p.base, *p.deltas]

    return make


def _delta_op(p: LayerProblem, base: Tensor, deltas: Sequence[Tensor], **options: object) -> Forward:
    options |= {"tasks": p.ids, "pairs": p.pairs} | (p.conv if p.layer.op == "conv2d" else {})
    op = taps_fast.delta_conv2d if p.layer.op == "conv2d" else taps_fast.delta_linear
    table = None if p.train else p.table()
    return lambda: op(p.x, base, deltas, p.table() if table is None else table, **options)


def choice(workload: Workload, device: str) -> Choice | None:
    """The backend and algorithm that ``taps_fast`` takes by itself; a network has one for each layer."""
    return None if workload.op == "network" else select(_described(workload, device))


def _described(workload: Workload, device: str) -> Problem:
    layer, dtype = LAYERS[workload.layer], getattr(torch, workload.dtype)
    train = workload.phase == "train"
    deltas = workload.deltas if workload.tasks is None else workload.tasks if train else len(workload.open_tasks())
    problem = Problem(workload.op, device, dtype, layer.shape, workload.rows, deltas, workload.tasks, train)
    if workload.op != "conv2d":
        return problem
    conv = dict(layer.conv)
    stride, padding, dilation = ([size] * 2 for size in (conv["stride"], conv["padding"], 1))
    pixels = output_size(layer.size, layer.shape[2:], stride, padding, dilation)
    last = layer.channels_last
    problem = problem._replace(groups=conv["groups"], pixels=math.prod(pixels), channels_last=last)
    if not hasattr(_problem, "row_taps"):  # an older commit to compare with
        return problem
    return problem._replace(row_taps=_problem.row_taps(layer.shape, padding, dilation, conv["groups"], last, last))


def _explicit(row: _Row) -> Callable[[Workload, str], str | None]:
    def absent(workload: Workload, device: str) -> str | None:
        if choice(workload, device) == (row.backend, row.algorithm):
            return "what taps_fast takes by itself"
        reasons = list(reasons_against(row, _described(workload, device)))
        return "; ".join(reasons) or None

    return absent


layer("taps_fast", "ours")(_ours(None, "auto"))
for _row in TABLE:
    if _row.backend != "reference":  # which judges; it is not in the race
        _ops = ("conv2d",) if _row.backend == "aten" else ("linear", "conv2d")
        layer(f"taps_fast[{_row.backend}/{_row.algorithm}]", "ours", _ops, absent=_explicit(_row), memory=False)(
            _ours(_row.backend, _row.algorithm)
        )


@layer("taps_fast-baked", "ours", phase="forward", mixed=True)
def _baked(p: LayerProblem) -> tuple[Forward, Sequence[Tensor]]:
    """Each open task's whole weight in place of its delta: as much memory, half the bytes read."""
    whole = [p.summed(k + 1) for k in range(len(p.deltas))]
    coefficients = (p.slot == 0).float()
    return _delta_op(p, p.base, whole, base_coeffs=coefficients), [p.base, *whole]


# Base and deltas.


@layer("materialise", "baseline")
def _materialise(p: LayerProblem) -> tuple[Forward, Sequence[Tensor]]:
    """W + D summed anew for each task: what the public TAPS layer does."""
    return functools.partial(p.by_group, p.with_sum), [p.base, *p.deltas]


@layer("materialise-buffer", "baseline", phase="forward", mixed=True)
def _buffer(p: LayerProblem) -> tuple[Forward, Sequence[Tensor]]:
    """The same into one buffer."""
    scratch = torch.empty_like(p.base)

    def one(slot: int, x: Tensor) -> Tensor:
        weight = torch.add(p.base, p.deltas[slot - 1], out=scratch) if slot else p.base
        return p.product(x, weight)

    return lambda: p.by_group(one), [p.base, *p.deltas, scratch]


@layer("materialise-flat", "baseline", mixed=False)
def _flat(p: LayerProblem) -> tuple[Forward, Sequence[Tensor]]:
    """W + (c @ D): one product over stacked deltas, where a chain reads and writes the weight K times."""
    stacked = torch.stack(p.deltas).view(len(p.deltas), -1)

    def forward() -> Tensor:
        return p.product(p.x, p.base + (p.gates.to(p.dtype) @ stacked).view_as(p.base))

    return forward, [p.base, stacked]


@layer("base+delta", "baseline", mixed=True)
def _two(p: LayerProblem) -> tuple[Forward, Sequence[Tensor]]:
    """One base product for all rows, then one for each open task's."""

    def forward() -> Tensor:
        y = p.product(p.x, p.base)
        for slot, rows in p.groups():
            if slot:
                part = p.product(p.x[rows], p.deltas[slot - 1])
                part = part * p.gates[slot - 1].to(p.dtype) if p.train else part
                if isinstance(rows, slice):
                    y = y.add_(part)
                else:
                    y.index_add_(0, rows, part)
        return y

    return forward, [p.base, *p.deltas]


def segments(p: LayerProblem) -> tuple[Tensor, Tensor, Tensor]:
    """Sorted order of the samples, their slots, and rows before the end of each slot (int32), on the device."""
    slots, order = p.slot[p.ids].sort(stable=True)
    rows = p.x[0, ..., 0].numel()
    # Not counted by bincount, which asks the device for the largest and cannot be captured.
    ends = torch.searchsorted(slots, torch.arange(len(p.deltas) + 1, device=slots.device), right=True)
    return order, slots, (ends * rows).int()


def unsorted(p: LayerProblem, y: Tensor, order: Tensor) -> Tensor:
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return y.unflatten(0, p.x.shape[:-1])[back]


@layer("base+grouped_mm", "baseline", ("linear",), mixed=True)
def _base_grouped(p: LayerProblem) -> tuple[Forward, Sequence[Tensor]]:
    """One base product, then one ``F.grouped_mm`` over the deltas for all rows behind open gates."""
    stacked = None if p.train or not p.deltas else torch.stack(p.deltas)

    def forward() -> Tensor:
        y = p.product(p.x, p.base)
        if not p.deltas:
            return y
        order, slots, ends = segments(p)
        closed = int((slots == 0).sum())
        order, slots = order[closed:], slots[closed:]
        if not len(order):
            return y
        deltas = torch.stack(p.deltas) if stacked is None else stacked
        part = F.grouped_mm(p.x[order].flatten(0, -2), deltas.transpose(1, 2), offs=ends[1:] - ends[0])
        part = part.unflatten(0, (len(order), *p.x.shape[1:-1]))
        if p.train:
            part = part * p.gates[slots - 1].to(p.dtype).view(-1, *(1,) * (part.dim() - 1))
        return y.index_add_(0, order, part)

    return forward, [p.base, *(p.deltas if stacked is None else [stacked])]


@layer("sum+grouped_mm", "baseline", ("linear",), phase="train", mixed=True)
def _sum_grouped(p: LayerProblem) -> tuple[Forward, Sequence[Tensor]]:
    """W + c·D of all tasks at once, then one ``F.grouped_mm``."""

    def forward() -> Tensor:
        order, _, ends = segments(p)
        weights = p.base + p.gates.to(p.dtype)[:, None, None] * torch.stack(p.deltas)
        y = F.grouped_mm(p.x[order].flatten(0, -2), weights.transpose(1, 2), offs=ends[1:])
        return unsorted(p, y, order)

    return forward, [p.base, *p.deltas]


def _task_by_task(p: LayerProblem) -> Ready:
    """Each task's rows forward and backward on their own, gradients accumulated: a loop over data loaders."""
    deltas, gates = p.deltas, p.gates

    def run() -> dict[str, Tensor | None]:
        y, dx = torch.empty_like(p.dy), torch.empty_like(p.x)
        gates.grad = None
        for delta in deltas:
            delta.grad = None
        for slot, rows in p.groups():
            x = p.x.detach()[rows].requires_grad_()
            part = p.product(x, p.summed(slot))
            part.backward(p.dy[rows])
            y[rows], dx[rows] = part.detach(), x.grad
        return {"y": y, "dx": dx, "dcoeffs": gates.grad} | {f"ddeltas[{k}]": d.grad for k, d in enumerate(deltas)}

    def check() -> None:
        p.check({name: g for name, g in run().items() if g is not None})

    return Ready(run, [p.base, *deltas], check)


provider("task-by-task", "baseline", ("linear", "conv2d"), phase="train", mixed=True)(_task_by_task)


# Weights merged beforehand: one whole weight a task is stored, and a change of a coefficient means merging again.


@layer("merged-loop", "merged", phase="forward")
def _merged_loop(p: LayerProblem) -> tuple[Forward, Sequence[Tensor]]:
    weights = p.merged()
    return lambda: p.by_group(lambda slot, x: p.product(x, weights[slot])), weights


@layer("merged-grouped_mm", "merged", ("linear",), phase="forward", mixed=True)
def _merged_grouped(p: LayerProblem) -> tuple[Forward, Sequence[Tensor]]:
    """The fair one: all tasks in one ``F.grouped_mm``."""
    weights = torch.stack(p.merged())

    def forward() -> Tensor:
        order, _, ends = segments(p)
        return unsorted(p, F.grouped_mm(p.x[order].flatten(0, -2), weights.transpose(1, 2), offs=ends), order)

    return forward, [weights]


@layer("merged-grouped-conv", "merged", ("conv2d",), phase="forward", mixed=True)
def _grouped_conv(p: LayerProblem) -> tuple[Forward, Sequence[Tensor]]:
    """The batch as the groups of one convolution."""
    weights = torch.stack(p.merged())

    def forward() -> Tensor:
        n = p.x.shape[0]
        conv = p.conv | {"groups": n * p.conv["groups"]}
        y = F.conv2d(p.x.reshape(1, -1, *p.x.shape[2:]), weights[p.slot[p.ids]].flatten(0, 1), **conv)
        return y.reshape(n, -1, *y.shape[2:])

    return forward, [weights]


# The floor.


def _base(p: LayerProblem) -> Ready:
    """The plain layer, one weight for all rows: what a layer without tasks costs."""
    weight = p.base.detach().clone().requires_grad_(p.train)

    def train() -> tuple[Tensor, ...]:
        return torch.autograd.grad(p.product(p.x, weight), (p.x, weight), p.dy)

    return Ready(train if p.train else functools.partial(p.product, p.x, weight), [weight], lambda: None)


provider("base", "floor", ("linear", "conv2d"))(_base)
