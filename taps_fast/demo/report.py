"""What the demo prints at its end: the table of tasks, and one mixed batch against separate merged models."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..model import TapsModel
from ..sharing import readable_bytes
from .data import Task

ROUNDS = 15


class Result(NamedTuple):
    """One line of the table. Accuracies are fractions of ``tested`` test images."""

    task: str
    tested: int
    head: float
    taps: float
    full: float
    open_layers: int
    layers: int
    parameters: int
    of_base: float
    folder_bytes: int


def table(results: Sequence[Result]) -> str:
    """One line a task, and one that says where TAPS won and where it lost."""
    title = ("task", "test images", "head only", "TAPS", "full tuning", "layers open", "parameters added", "on disk")
    rows = [title] + [
        (
            r.task,
            str(r.tested),
            f"{r.head:.1%}",
            f"{r.taps:.1%}",
            f"{r.full:.1%}",
            f"{r.open_layers}/{r.layers}",
            f"{r.parameters:,} ({r.of_base:.0%})",
            readable_bytes(r.folder_bytes),
        )
        for r in results
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*lines, _against("full tuning", results), _against("head only", results)])


def _against(what: str, results: Sequence[Result]) -> str:
    """Points of accuracy that TAPS gains or loses on each task."""
    other = [r.full if what == "full tuning" else r.head for r in results]
    points = [f"{r.task} {100 * (r.taps - b):+.1f}" for r, b in zip(results, other, strict=True)]
    return f"TAPS against {what}, points: {', '.join(points)}"


def compare(model: TapsModel, tasks: Sequence[Task], count: int, device: torch.device) -> str:
    """One batch of ``count`` test images of all tasks in turn: the prepared model, against one merged model a task.

    The merged models are the harder rival: ordinary modules without a gate. Each runs its own images, and gathering
    those and putting the logits back in place belongs to its time, as sorting by task does to the mixed batch's.
    """
    ids = torch.arange(count, device=device) % len(tasks)
    images = torch.stack([tasks[i % len(tasks)].test.images[i // len(tasks)] for i in range(count)])
    images = images.to(device, memory_format=torch.channels_last)
    rows = [(ids == t).nonzero().flatten() for t in range(len(tasks))]
    merged = [model.merge(task.name).eval() for task in tasks]
    widest = max(task.classes for task in tasks)

    def together() -> Tensor:
        y: Tensor = model(images, tasks=ids)
        return y[:, :widest]  # beyond are the base's own classes, -inf for every task

    def apart() -> Tensor:
        y = images.new_full((count, widest), -torch.inf)
        for task, module, index in zip(tasks, merged, rows, strict=True):
            y[index, : task.classes] = module(images[index])
        return y

    with torch.inference_mode():
        prepared = model.eval().prepare_inference(images[: len(tasks)])
        ours, theirs = together(), apart()
        seconds = _medians([together, apart], device)
    finite = theirs.isfinite()
    difference = (ours - theirs)[finite].abs().max()
    same = int((ours.argmax(-1) == theirs.argmax(-1)).sum())
    held = [_held([model]) + prepared.table_bytes, _held(merged)]
    model.unprepare()
    return "\n".join(
        [
            f"One mixed batch of {count} images of {len(tasks)} tasks, against {len(tasks)} separate merged models:",
            f"  largest logit difference  {difference:.1e} (logits up to {theirs[finite].abs().max():.1f}); "
            f"the same class for {same} of {count} images",
            f"  time                      {seconds[0] * 1e3:.1f} ms against {seconds[1] * 1e3:.1f} ms, "
            f"{seconds[0] / seconds[1]:.2f} times (medians of {ROUNDS} interleaved rounds)",
            f"  weights in memory         {readable_bytes(held[0])} against {readable_bytes(held[1])}, "
            f"{held[0] / held[1]:.2f} times",
        ]
    )


def _medians(functions: Sequence[Callable[[], Tensor]], device: torch.device) -> list[float]:
    """Median seconds of each. They take turns, so that what else the machine does meets all alike."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(ROUNDS):
        for function, mine in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            mine.append(time.perf_counter() - start)
    return [statistics.median(mine) for mine in times]


def _held(modules: Iterable[nn.Module]) -> int:
    """Bytes of all parameters and buffers; what modules share counts once."""
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
