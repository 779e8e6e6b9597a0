"""Accuracy against parameters: TAPS beside other ways of adapting one pretrained network.

    python -m benchmarks.accuracy                       measures what the results file lacks, then makes the table anew
    python -m benchmarks.accuracy --validation          the same for the trials on other seeds
    python -m benchmarks.accuracy --only 'LoRA*'        these methods alone
    python -m benchmarks.accuracy --minutes 9           begins no cell after 9 minutes; run it again to go on
    python -m benchmarks.accuracy --check               changes nothing; 1 if a table is not what the results say
    python -m benchmarks.accuracy --plot accuracy.png   draws accuracy against parameters

A cell is one task, seed and method. All start from the same weights and the same new head, and see the same images in
the same order, under the demo's optimiser, learning rates and number of steps (`taps_fast/demo/train.py`). The seed
chooses the split, the head and the order. The accuracy is that of the last step; nothing is chosen by test images.

"by size" is ``model.penalty(task, lam, by="size")``. "LoRA like …" is PEFT's, with as many parameters as that method
has for the same task and seed (`benchmarks/lora.py` says where).
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from taps_fast import TapsModel
from taps_fast.demo import train
from taps_fast.demo.data import TASKS, Task, load

from . import lora, results

FOLDER = results.FOLDER / "accuracy"
PAGE = results.CHECKOUT / "benchmarks" / "README.md"
EPOCHS, IMAGE_SIZE = 5, 64

Record = dict[str, Any]
Outcome = tuple[nn.Module, Record]


class Method(NamedTuple):
    """One way of adapting the network."""

    run: Callable[[nn.Module, Task, train.Plan, Record], Outcome]
    lam: float = 0.0
    by: str = "layer"
    like: str | None = None
    """The method whose record, of the same task and seed, ``run`` is given: for its size or its open layers."""


def head_only(base: nn.Module, task: Task, plan: train.Plan, like: Record) -> Outcome:
    return train.head_only(base, task, plan, _quiet), {"parameters": 0}


def full(base: nn.Module, task: Task, plan: train.Plan, like: Record) -> Outcome:
    return train.full(base, task, plan, _quiet), {"parameters": _size(_without_head(base))}


def norms(base: nn.Module, task: Task, plan: train.Plan, like: Record) -> Outcome:
    """Batch norms and the head move."""
    model = train.with_head(base, task, plan).requires_grad_(False).train()
    moving = [p for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
    head = list(model.get_submodule(train.HEAD).parameters())
    for parameter in (*moving, *head):
        parameter.requires_grad_(True)
    train.fit(model, [{"params": [*moving, *head]}], task, plan, _quiet)
    return model, {"parameters": _size(moving)}


def taps(base: nn.Module, task: Task, plan: train.Plan, like: Record) -> Outcome:
    return _counted(train.taps(base, task, plan, _quiet), task)


def reopened(base: nn.Module, task: Task, plan: train.Plan, like: Record) -> Outcome:
    """The layers that were open in the end, from the start and without scores."""
    return _opened(base, task, plan, [gate == "1" for gate in like["gates"]])


def smallest(base: nn.Module, task: Task, plan: train.Plan, like: Record) -> Outcome:
    """The smallest layers, to 40 % of the parameters, from the start and without scores."""
    layers = list(TapsModel(base, head=train.HEAD).conversion.layers.values())
    spent = 0.4 * _size(_without_head(base)) - sum(
        p.numel() for m in base.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()
    )
    opened = [False] * len(layers)
    for i in sorted(range(len(layers)), key=lambda i: layers[i].base.numel()):
        spent -= layers[i].base.numel()
        opened[i] = spent >= 0
    return _opened(base, task, plan, opened)


def _opened(base: nn.Module, task: Task, plan: train.Plan, opened: Sequence[bool]) -> Outcome:
    model = TapsModel(base, head=train.HEAD).train()
    torch.manual_seed(plan.seed)
    model.add_task(task.name, classes=task.classes)
    for layer, stays in zip(model.conversion.layers.values(), opened, strict=True):
        if not stays:
            layer.close(task.name)
    weights, scores = model.task_parameters(task.name)
    for score in scores["params"]:
        score.requires_grad_(False)
    train.fit(model, [weights], task, plan, _quiet)
    return _counted(model, task)


def _counted(model: TapsModel, task: Task) -> Outcome:
    """The parameters of TAPS are those of open deltas and of norms."""
    gates = [layer.is_open(task.name) for layer in model.conversion.layers.values()]
    sharing = model.sharing()
    weights = sum(layer.parameters for layer in sharing.open_layers(task.name))
    counts = {"parameters": weights + sharing.tasks[task.name].norm_parameters, "open": sum(gates)}
    return model, {**counts, "layers": len(gates), "gates": "".join("01"[gate] for gate in gates)}


def low_rank(base: nn.Module, task: Task, plan: train.Plan, like: Record) -> Outcome:
    """As many parameters as ``like``; without it, 34 % of the network's, the mean of TAPS λ=1."""
    start = lora.plain(train.with_head(base, task, plan))
    budget = like.get("parameters", int(0.34 * _size(_without_head(base))))
    model, counted, rank = lora.adapted(start, train.HEAD, budget, plan.seed)
    train.fit(model.train(), [{"params": [p for p in model.parameters() if p.requires_grad]}], task, plan, _quiet)
    return model, {"parameters": counted, "rank": rank}


METHODS = {
    "head only": Method(head_only),
    "norms": Method(norms),
    **{f"TAPS λ={lam:g}": Method(taps, lam) for lam in (0.1, 0.3, 0.5, 1.0)},
    **{f"TAPS by size λ={lam:g}": Method(taps, lam, "size") for lam in (0.5, 0.7, 1.0)},
    "the smallest layers, open from the start": Method(smallest),
    "full": Method(full),
    **{
        f"LoRA like {like}": Method(low_rank, like=like)
        for like in ("TAPS by size λ=0.7", "TAPS λ=1", "TAPS λ=0.3", "TAPS λ=0.1")
    },
}
TRIALS = {
    "full": Method(full),
    "TAPS λ=1": Method(taps, 1.0),
    "the layers of TAPS λ=1, open from the start": Method(reopened, like="TAPS λ=1"),
    "the smallest layers, open from the start": Method(smallest),
    **{f"TAPS by size λ={lam:g}": Method(taps, lam, "size") for lam in (1.0, 0.7, 0.5)},
    "LoRA": Method(low_rank),
}
"""Why TAPS loses what it loses, and what to do about it."""


class Study(NamedTuple):
    """A results file, its table's name in the page, and what is in it."""

    file: Path
    table: str
    seeds: tuple[int, ...]
    methods: dict[str, Method]


TEST = Study(FOLDER / "demo.jsonl", "accuracy", (3, 4, 5), METHODS)
VALIDATION = Study(FOLDER / "validation.jsonl", "accuracy:validation", (13, 14), TRIALS)


def _without_head(base: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in base.named_parameters() if not name.startswith(train.HEAD + ".")]


def _size(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def _quiet(_: str) -> None:
    pass


def measure(study: Study, task: str, seed: int, name: str, found: Sequence[Record]) -> Record:
    """One cell. ``found``: the cells there are, among which is the one that the method is to be like."""
    method = study.methods[name]
    plan = train.Plan(EPOCHS, method.lam, seed, IMAGE_SIZE, torch.device("cpu"), method.by)
    base, data = train.backbone(plan), load(task, IMAGE_SIZE, seed)
    like = next((r for r in found if key(r) == (task, seed, method.like)), {})
    if method.like is not None and not like:
        raise ValueError(
            f"accuracy: {name} must come after {method.like}, got no result of it (without --only it does)"
        )
    start = time.perf_counter()
    model, counts = method.run(base, data, plan, like)
    seconds = time.perf_counter() - start
    return {
        **results.environment("cpu"),
        "task": task,
        "seed": seed,
        "method": name,
        "accuracy": train.accuracy(model, data.test, plan.device),
        "tested": len(data.test.labels),
        "of": _size(_without_head(base)),
        "epochs": EPOCHS,
        "seconds": round(seconds, 1),
        **counts,
    }


def key(record: Record) -> tuple[Any, ...]:
    return record["task"], record["seed"], record["method"]


def read(study: Study = TEST) -> list[Record]:
    return [json.loads(line) for line in study.file.read_text().splitlines()] if study.file.is_file() else []


def fraction(record: Record) -> float:
    """Parameters that the task adds, its head apart, over those of the network without its head."""
    return record["parameters"] / record["of"]


class Line(NamedTuple):
    """A method's means over tasks and seeds. ``against``: its accuracy less that of full fine-tuning for the same task
    and seed; ``error``: the standard error of that mean, from the seeds' own means."""

    method: str
    by_task: dict[str, float]
    mean: float
    against: float
    error: float
    fraction: float


def summary(study: Study, records: Sequence[Record]) -> list[Line]:
    """Whole methods alone, fewest parameters first."""
    accuracy = {key(r): r["accuracy"] for r in records}
    lines = []
    for name in study.methods:
        mine = [r for r in records if r["method"] == name]
        if len(mine) == len(TASKS) * len(study.seeds):
            by_task = {t: statistics.fmean(r["accuracy"] for r in mine if r["task"] == t) for t in TASKS}
            gaps = [
                statistics.fmean(accuracy[t, seed, name] - accuracy.get((t, seed, "full"), math.nan) for t in TASKS)
                for seed in study.seeds
            ]
            error = statistics.stdev(gaps) / len(gaps) ** 0.5
            size = statistics.fmean(map(fraction, mine))
            lines.append(Line(name, by_task, statistics.fmean(by_task.values()), statistics.fmean(gaps), error, size))
    return sorted(lines, key=lambda line: line.fraction)


def table(study: Study, records: Sequence[Record]) -> str:
    """The lines between the markers of benchmarks/README.md."""
    lines = summary(study, records)
    if not lines:
        return "No results yet.\n"
    header = ["method", *TASKS, "mean", "against full", "parameters of the network"]
    rows = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for line in lines:
        against = "–" if math.isnan(line.against) else f"{100 * line.against:+.2f} ± {100 * line.error:.2f}"
        cells = [f"{100 * accuracy:.2f}" for accuracy in (*line.by_task.values(), line.mean)]
        rows.append("| " + " | ".join([line.method, *cells, against, f"{line.fraction:.1%}"]) + " |")
    return "\n".join(rows) + "\n"


def filled(page: str) -> str:
    """The page with both tables as the results say."""
    for study in (TEST, VALIDATION):
        marked = re.compile(f"(<!-- {study.table} -->\n)(.*?)(<!-- /{study.table} -->)", re.DOTALL)
        lines = table(study, read(study))
        page = marked.sub(lambda match, lines=lines: match[1] + lines + match[3], page)
    return page


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--validation", action="store_true", help="the trials instead")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="methods, with * (all)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no cell after so many")
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if a table is stale")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it and measure nothing")
    chosen = parser.parse_args(argv)
    if chosen.check:
        stale = filled(PAGE.read_text()) != PAGE.read_text()
        print(f"{PAGE.name} is {'stale: run python -m benchmarks.accuracy' if stale else 'as the results say'}")
        return int(stale)
    study = VALIDATION if chosen.validation else TEST
    if chosen.plot is not None:
        from taps_fast.train import Point, tradeoff

        tradeoff([Point(line.method, line.fraction, line.mean) for line in summary(study, read(study))], chosen.plot)
        print(chosen.plot)
        return 0
    end = time.monotonic() + 60 * chosen.minutes
    names = [name for name in study.methods if fnmatch.fnmatchcase(name, chosen.only)]
    cells = [(task, seed, name) for name in names for seed in study.seeds for task in TASKS]
    missing = [cell for cell in cells if cell not in set(map(key, read(study)))]
    study.file.parent.mkdir(parents=True, exist_ok=True)
    for done, cell in enumerate(missing):
        if time.monotonic() > end:
            print(f"{len(missing) - done} cells are left: run it again")
            break
        record = measure(study, *cell, read(study))
        with open(study.file, "a") as file:
            file.write(json.dumps(record) + "\n")
        print(
            f"{', '.join(map(str, cell))}: {record['accuracy']:.2%}, {fraction(record):.1%}, {record['seconds']} s",
            flush=True,
        )
    PAGE.write_text(filled(PAGE.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
