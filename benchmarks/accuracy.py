"""Accuracy against parameters: TAPS beside other ways of adapting one pretrained network.

    python -m benchmarks.accuracy                       measures what the results file lacks, then makes the table anew
    python -m benchmarks.accuracy --minutes 9           begins no cell after 9 minutes; run it again to go on
    python -m benchmarks.accuracy --check               changes nothing; 1 if the table is not what the results say
    python -m benchmarks.accuracy --plot accuracy.png   draws accuracy against parameters

A cell is one task, seed and method. All start from the same weights and the same new head, and see the same images in
the same order, under the demo's optimiser, learning rates and number of steps (`taps_fast/demo/train.py`). The seed
chooses the split, the head and the order. The accuracy is that of the last step; nothing is chosen by test images.

"low rank" is LoRA, W + B·A on the kernel as a matrix [O, C/groups·kh·kw], in our own few lines, because PEFT cannot
adapt this network: its low-rank convolution is made by calling the layer's class, which here takes other arguments.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from taps_fast.demo import train
from taps_fast.demo.data import TASKS, Task, load

from . import results

FILE = results.FOLDER / "accuracy" / "demo.jsonl"
PAGE = results.CHECKOUT / "benchmarks" / "README.md"
MARKED = re.compile(r"(<!-- accuracy -->\n)(.*?)(<!-- /accuracy -->)", re.DOTALL)
SEEDS = (3, 4, 5)
LAMBDAS = (0.1, 0.3, 0.5, 1.0)  # 0.5 is the demo's
METHODS = ("head only", "norms", *(f"TAPS λ={lam:g}" for lam in LAMBDAS), "full")
LOW_RANK = {f"low rank λ={lam:g}": f"TAPS λ={lam:g}" for lam in (1.0, 0.1, 0.3)}
"""Each low-rank method, and the one whose number of parameters it takes."""
EPOCHS, IMAGE_SIZE = 5, 64

Record = dict[str, Any]
Outcome = tuple[nn.Module, Record]


class LowRank(nn.Module):
    """weight + B·A: A [rank, I] as ``nn.Linear`` starts, B [O, rank] zero."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, weight[0].numel()))
        self.up = nn.Parameter(torch.zeros(len(weight), rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).view_as(weight)


def head_only(base: nn.Module, task: Task, plan: train.Plan) -> Outcome:
    return train.head_only(base, task, plan, _quiet), {"parameters": 0}


def full(base: nn.Module, task: Task, plan: train.Plan) -> Outcome:
    return train.full(base, task, plan, _quiet), {"parameters": _size(_without_head(base))}


def taps(base: nn.Module, task: Task, plan: train.Plan) -> Outcome:
    """Its parameters are those of open deltas and of norms."""
    model = train.taps(base, task, plan, _quiet)
    sharing = model.sharing()
    opened = sharing.open_layers(task.name)
    weights, norms = sum(layer.parameters for layer in opened), sharing.tasks[task.name].norm_parameters
    return model, {"parameters": weights + norms, "open": len(opened), "layers": len(sharing.layers)}


def norms(base: nn.Module, task: Task, plan: train.Plan, budget: int = 0) -> Outcome:
    """Batch norms and the head move; with ``budget`` also low-rank deltas, so that norms and deltas have that many
    parameters at most."""
    model = train.with_head(base, task, plan).requires_grad_(False).train()
    moving = [p for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
    counted, rank = _size(moving), 0
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    while budget and counted + sum(_cost(m, rank + 1) for m in layers) <= budget and rank < 512:
        rank += 1
    if rank:
        torch.manual_seed(plan.seed)
        for layer in layers:
            low = LowRank(layer.weight, min(rank, _most(layer)))
            parametrize.register_parametrization(layer, "weight", low)
            moving += low.parameters()
            counted += _size(low.parameters())
    head = list(model.get_submodule(train.HEAD).parameters())
    for parameter in (*moving, *head):
        parameter.requires_grad_(True)
    train.fit(model, [{"params": [*moving, *head]}], task, plan, _quiet)
    return model, {"parameters": counted, "rank": rank}


def _most(layer: nn.Conv2d) -> int:
    """The largest rank whose factors are no larger than the weight; at least 1."""
    weight = layer.weight
    return max(weight.numel() // (len(weight) + weight[0].numel()), 1)


def _cost(layer: nn.Conv2d, rank: int) -> int:
    return min(rank, _most(layer)) * (len(layer.weight) + layer.weight[0].numel())


def _without_head(base: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in base.named_parameters() if not name.startswith(train.HEAD + ".")]


def _size(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def _quiet(_: str) -> None:
    pass


def measure(task: str, seed: int, method: str, found: Sequence[Record]) -> Record:
    """One cell. ``found``: the cells there are, which say how many parameters a low-rank one may have."""
    lam = float(method.partition("λ=")[2] or 0)
    plan = train.Plan(EPOCHS, lam, seed, IMAGE_SIZE, torch.device("cpu"))
    base, data = train.backbone(plan), load(task, IMAGE_SIZE, seed)
    start = time.perf_counter()
    if method in LOW_RANK:
        (like,) = [r for r in found if key(r) == (task, seed, LOW_RANK[method])]
        model, counts = norms(base, data, plan, like["parameters"])
    else:
        ways: dict[str, Callable[..., Outcome]] = {"head only": head_only, "norms": norms, "full": full}
        model, counts = ways.get(method, taps)(base, data, plan)
    seconds = time.perf_counter() - start
    return {
        **results.environment("cpu"),
        "task": task,
        "seed": seed,
        "method": method,
        "accuracy": train.accuracy(model, data.test, plan.device),
        "tested": len(data.test.labels),
        "of": _size(_without_head(base)),
        "epochs": EPOCHS,
        "seconds": round(seconds, 1),
        **counts,
    }


def key(record: Record) -> tuple[Any, ...]:
    return record["task"], record["seed"], record["method"]


def read(path: Path = FILE) -> list[Record]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def fraction(record: Record) -> float:
    """Parameters that the task adds, its head apart, over those of the network without its head."""
    return record["parameters"] / record["of"]


def summary(records: Sequence[Record]) -> list[tuple[str, int, dict[str, float], float, float]]:
    """(method, cells, mean accuracy by task, mean of the tasks, mean fraction of parameters); whole methods alone."""
    lines = []
    for method in (*METHODS, *LOW_RANK):
        mine = [r for r in records if r["method"] == method]
        if len(mine) == len(TASKS) * len(SEEDS):
            by_task = {t: statistics.fmean(r["accuracy"] for r in mine if r["task"] == t) for t in TASKS}
            mean, size = statistics.fmean(by_task.values()), statistics.fmean(map(fraction, mine))
            lines.append((method, len(mine), by_task, mean, size))
    return sorted(lines, key=lambda line: line[4])


def table(records: Sequence[Record]) -> str:
    """The lines between the markers of benchmarks/README.md."""
    lines = summary(records)
    if not lines:
        return "No results yet.\n"
    whole = {method: mean for method, _, _, mean, _ in lines}.get("full")
    header = ["method", *TASKS, "mean", "against full", "parameters of the network"]
    rows = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for method, _, by_task, mean, size in lines:
        against = "–" if whole is None else f"{100 * (mean - whole):+.2f}"
        cells = [f"{100 * accuracy:.2f}" for accuracy in (*by_task.values(), mean)]
        rows.append("| " + " | ".join([method, *cells, against, f"{size:.1%}"]) + " |")
    return "\n".join(rows) + "\n"


def filled(page: str, records: Sequence[Record]) -> str:
    return MARKED.sub(lambda match: match[1] + table(records) + match[3], page)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no cell after so many")
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if the table is stale")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it and measure nothing")
    chosen = parser.parse_args(argv)
    records = read()
    if chosen.check:
        stale = filled(PAGE.read_text(), records) != PAGE.read_text()
        print(f"{PAGE.name} is {'stale: run python -m benchmarks.accuracy' if stale else 'as the results say'}")
        return int(stale)
    if chosen.plot is not None:
        from taps_fast.train import Point, tradeoff

        tradeoff([Point(method, size, mean) for method, _, _, mean, size in summary(records)], chosen.plot)
        print(chosen.plot)
        return 0
    end = time.monotonic() + 60 * chosen.minutes
    # Whole methods first, as the table has them; the low-rank ones need to know how many parameters TAPS had.
    cells = [(task, seed, method) for method in (*METHODS, *LOW_RANK) for seed in SEEDS for task in TASKS]
    missing = [cell for cell in cells if cell not in set(map(key, records))]
    FILE.parent.mkdir(parents=True, exist_ok=True)
    for done, cell in enumerate(missing):
        if time.monotonic() > end:
            print(f"{len(missing) - done} cells are left: run it again")
            break
        record = measure(*cell, records)
        records.append(record)
        with open(FILE, "a") as file:
            file.write(json.dumps(record) + "\n")
        print(f"{', '.join(map(str, cell))}: {record['accuracy']:.2%}, {fraction(record):.1%}, {record['seconds']} s")
    PAGE.write_text(filled(PAGE.read_text(), records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
