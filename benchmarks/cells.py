"""One cell: a workload and all who can do it, checked, timed in the same rounds, and held against the limit."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from . import peers, serving, timing  # noqa: F401  (peers and serving register providers)
from .layers import LayerProblem
from .limits import Limits, bound
from .models import NetworkProblem
from .providers import Provider, choice, find
from .results import Record
from .workloads import LAYERS, SUITES, Workload, workloads

Problem = LayerProblem | NetworkProblem


def problem(workload: Workload, device: str) -> Problem:
    """The workload's tensors."""
    return NetworkProblem(workload, device) if workload.op == "network" else LayerProblem(workload, device)


def mode(p: Problem) -> contextlib.AbstractContextManager[None]:
    """What a problem's calls run in: they record for autograd in training alone."""
    return torch.set_grad_enabled(p.train)


def every(*ops: str) -> Iterator[tuple[str, tuple[Workload, Provider]]]:
    """All that runs on a CPU, by name: what pytest-benchmark is given."""
    for workload in workloads(list(SUITES)):
        for provider in find():
            if workload.op in ops and provider.fits(workload) and provider.absent(workload, "cpu") is None:
                yield f"{workload.name}-{provider.name}", (workload, provider)


def rotated(workload: Workload, p: Problem, device: str) -> list[Problem]:
    """``p``, and as many more over other weights as keep each from the cache; a network is one as it is."""
    count = timing.weight_sets(p.weight_bytes(), workload.cold and workload.op != "network", device)
    return [p, *(p.again() for _ in range(count - 1))]


def alone(workload: Workload, provider: str, device: str) -> timing.Call:
    """The call of one provider, holding nothing that others need."""
    p = problem(workload, device)
    (only,) = [q for q in find([provider]) if q.fits(workload)]
    train = p.train
    with mode(p):
        built = only.build(p)
    p.keep(built.weights)

    def call() -> None:
        with torch.set_grad_enabled(train):
            built.run()

    return call


def peak_bytes(workload: Workload, provider: str, device: str) -> int | None:
    """Peak memory of one provider in a process that has it alone; two samples of two tasks load its code before."""
    small = replace(workload, samples=2, tasks=workload.tasks and min(workload.tasks, 2))
    warm = functools.partial(alone, small, provider, device)
    return timing.peak_bytes(alone, workload, provider, device, device=device, warm=warm)


def run(
    workload: Workload,
    providers: Iterable[Provider],
    device: str,
    limits: Limits,
    environment: Record,
    *,
    seconds: float,
    memory: bool = True,
) -> list[Record]:
    """One record for each provider that is made for the workload, also where it is absent, fails or is wrong.

    Args:
        seconds: what the timing of one provider may take.
        memory: whether workloads that ask for it get their peak memory measured.
    """
    p = problem(workload, device)
    with mode(p):
        return _run(workload, p, providers, device, limits, environment, seconds, memory)


def _run(
    workload: Workload,
    p: Problem,
    providers: Iterable[Provider],
    device: str,
    limits: Limits,
    environment: Record,
    seconds: float,
    memory: bool,
) -> list[Record]:
    sets = rotated(workload, p, device)
    records, calls = [], {}
    flops = p.flops()
    for provider in providers:
        if not provider.fits(workload):
            continue
        record = environment | _described(workload, p) | _named(provider, workload, device) | {"sets": len(sets)}
        record |= {"model_bytes": p.bytes(provider.kind == "merged"), "model_flops": flops}
        reason = provider.absent(workload, device)
        if reason is not None:
            records.append(record | {"status": "absent", "reason": reason})
            continue
        try:
            built = [provider.build(q) for q in sets]
            built[0].check()
        except AssertionError as error:
            records.append(record | {"status": "wrong", "reason": str(error)})
            continue
        except Exception as error:  # of whatever library: it is listed with its reason
            first = str(error).strip().partition("\n")[0]
            records.append(record | {"status": "failed", "reason": f"{type(error).__name__}: {first}"})
            continue
        record |= {"status": "ok", "stored_bytes": timing.storage_bytes(built[0].weights)}
        if memory and workload.memory and provider.memory:
            record["peak_bytes"] = peak_bytes(workload, provider.name, device)
        records.append(record)
        calls[provider.name] = [b.run for b in built]
        if device != "cpu" and not p.train:
            records.append(_graphed(record, calls))
    stats = timing.measure(calls, seconds, device)
    for record in records:
        took = stats.get(record["provider"] + "@graph" * record["graph"]) if record["status"] == "ok" else None
        if took is not None:
            record |= {"median_ms": took.median, "p20_ms": took.p20, "p80_ms": took.p80, "rounds": took.rounds}
    _set_limits(records, workload, limits, getattr(torch, workload.dtype))
    return [_EMPTY | record for record in records]


_EMPTY: Record = dict.fromkeys(
    ("reason", "median_ms", "p20_ms", "p80_ms", "rounds", "peak_bytes", "stored_bytes", "limit_ms", "limit_bound")
)


def _graphed(record: Record, calls: dict[str, list[timing.Call]]) -> Record:
    """The same provider replayed as a CUDA graph."""
    record = record | {"graph": True}
    try:
        calls[record["provider"] + "@graph"] = [timing.graph(call) for call in calls[record["provider"]]]
    except RuntimeError as error:
        torch.cuda.synchronize()
        first = str(error).partition("\n")[0]
        record |= {"status": "failed", "reason": f"cannot be captured: {first}", "stored_bytes": None}
    return record


def _set_limits(records: list[Record], workload: Workload, limits: Limits, dtype: torch.dtype) -> None:
    """The limit of each record. A plain product of this very shape that beats the large GEMM's rate sets the rate."""
    floors = [
        r["median_ms"] / r["model_flops"]
        for r in records
        if r["kind"] == "floor" and r["median_ms"] and r["model_flops"]
    ]
    for record in records:
        size, flops = record["model_bytes"], record["model_flops"]
        by_flops = min([flops / limits.flops(dtype), *(f * flops / 1e3 for f in floors)])
        limit = bound(size / limits.bandwidth(size, workload.cold and workload.op != "network"), by_flops)
        record |= {"limit_ms": limit.ms, "limit_bound": limit.bound}


def _described(workload: Workload, p: Problem) -> Record:
    return {
        "workload": workload.name,
        "op": workload.op,
        "layer": workload.layer,
        "phase": workload.phase,
        "shape": [] if workload.op == "network" else list(LAYERS[workload.layer].shape),
        "rows": workload.rows,
        "samples": workload.samples,
        "tasks": workload.tasks,
        "deltas": len(p.deltas) if isinstance(p, LayerProblem) else None,
        "mix": workload.mix,
        "gates": workload.gates,
        "dtype": workload.dtype,
        "cold": workload.cold,
    }


def _named(provider: Provider, workload: Workload, device: str) -> Record:
    backend = algorithm = None
    if provider.name == "taps_fast" and (chosen := choice(workload, device)) is not None:
        backend, algorithm = chosen
    elif "[" in provider.name:
        backend, algorithm = provider.name[:-1].partition("[")[2].split("/")
    return {
        "provider": provider.name,
        "kind": provider.kind,
        "backend": backend,
        "algorithm": algorithm,
        "graph": False,
    }
