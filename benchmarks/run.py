"""Runs workloads and writes one line of JSON a measurement.

python -m benchmarks.run --quick                    a taste, under a minute
python -m benchmarks.run                            everything, into results/<device>.jsonl
python -m benchmarks.run serve 'vit_s.*' --providers taps_fast merged-loop
python -m benchmarks.run linear --base HEAD~3       this tree against another commit
python -m benchmarks.run --list                     suites, workloads and providers
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from . import compare, results, timing
from .cells import run as run_cell
from .limits import Limits
from .providers import PROVIDERS, find
from .results import CHECKOUT, Record
from .workloads import SUITES, UnknownName, Workload, workloads

SECONDS, QUICK_SECONDS = 0.2, 0.08


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options, also of ``python -m taps_fast bench``."""
    parser.add_argument("workloads", nargs="*", help="suites, layers or patterns of workloads; default: every suite")
    parser.add_argument("--quick", action="store_true", help="the suite `quick` with few rounds; results in build/")
    parser.add_argument("--providers", nargs="+", default=[], metavar="NAME", help="default: all")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's own choice)")
    parser.add_argument("--seconds", type=float, help="how long to time one provider on one workload")
    parser.add_argument("--no-memory", action="store_true", help="leave out the processes that measure peak memory")
    parser.add_argument("--out", type=Path, help="the file of results (default: results/<device>.jsonl)")
    parser.add_argument("--base", metavar="GIT_REF", help="compare with another commit; writes no results")
    parser.add_argument("--list", action="store_true", help="what there is to run")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    return run(parser.parse_args(argv))


def run(chosen: argparse.Namespace) -> int:
    """0: all that was measured is right; 1: some result was wrong or one of ours failed; 2: there is no such thing."""
    try:
        return _run(chosen)
    except UnknownName as error:
        print(f"bench: error: {error}", file=sys.stderr)
        return 2


def _run(chosen: argparse.Namespace) -> int:
    if chosen.list:
        print("\n".join(_listing()))
        return 0
    todo = workloads(chosen.workloads or (["quick"] if chosen.quick else []))
    providers = [p for p in find(chosen.providers) if p.quick or chosen.providers or not chosen.quick]
    threads = timing.pin(chosen.threads)
    seconds = chosen.seconds or (QUICK_SECONDS if chosen.quick else SECONDS)
    if chosen.base:
        return compare.compare(chosen.base, todo, providers, chosen.device, threads, seconds)
    if chosen.device == "cuda":
        torch.backends.cudnn.benchmark = True
    environment, limits = results.environment(chosen.device), Limits(chosen.device)
    path = chosen.out or results.default_path(chosen.device)
    if chosen.quick and chosen.out is None:
        path = CHECKOUT / "build" / "bench" / path.name
    print(f"{environment['device']}, {threads} threads, torch {torch.__version__}, sha {environment['sha'][:10]}")
    if chosen.device == "cpu" and environment["load"] > 1:
        print(f"warning: the machine is busy (load {environment['load']}): read ratios, not times", file=sys.stderr)
    red = 0
    for workload in progress(todo):
        records = run_cell(
            workload, providers, chosen.device, limits, environment, seconds=seconds, memory=not chosen.no_memory
        )
        print("\n".join(table(workload, records)), flush=True)
        results.write(path, records, whole=not chosen.providers and not chosen.quick)
        red += sum(r["status"] == "wrong" or (r["status"] == "failed" and r["kind"] == "ours") for r in records)
    print(f"\nwritten to {path}" + (f"; {red} RED" if red else ""))
    return 1 if red else 0


def progress(todo: Sequence[Workload]) -> Iterator[Workload]:
    """The workloads, with a bar on the terminal."""
    width, shown = 30, sys.stderr.isatty()
    for i, workload in enumerate(todo):
        if shown:
            bar = "#" * (i * width // len(todo))
            print(f"\r\033[K[{bar:<{width}}] {i + 1}/{len(todo)} {workload.name}", end="", file=sys.stderr, flush=True)
        yield workload
        if shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def table(workload: Workload, records: Sequence[Record]) -> Iterator[str]:
    """What one workload's records say, ours first, the rest by time."""
    ours = next((r for r in records if r["provider"] == "taps_fast" and r["status"] == "ok" and not r["graph"]), None)
    yield f"\n{workload.name}"
    done = [r for r in records if r["status"] == "ok"]
    for r in sorted(done, key=lambda r: (r is not ours, r["median_ms"])):
        name = r["provider"] + " (graph)" * r["graph"]
        if r is ours and r["backend"]:
            name += f" = {r['backend']}/{r['algorithm']}"
        line = f"  {name:<32} {r['median_ms']:9.3f} ms [{r['p20_ms']:.3f}, {r['p80_ms']:.3f}]"
        line += f"  {r['limit_ms'] / r['median_ms']:5.0%} of limit ({r['limit_bound']})"
        if ours is not None and r is not ours:
            line += f"  {r['median_ms'] / ours['median_ms']:5.2f} x ours"
        if r["peak_bytes"] is not None:
            line += f"  {r['peak_bytes'] / 2**20:.0f} MiB"
        yield line
    for r in records:
        if r["status"] in ("failed", "wrong"):
            yield f"  {r['provider'] + ' (graph)' * r['graph']:<32} {r['status'].upper()}: {r['reason']}"
    if away := [r["provider"] for r in records if r["status"] == "absent"]:
        yield f"  absent (reasons are in the results): {', '.join(away)}"


def _listing() -> Iterator[str]:
    for name, suite in SUITES.items():
        yield f"{name}: {(suite.__doc__ or name).strip()}"
        for workload in suite():
            yield f"  {workload.name}"
    yield "providers:"
    for name, kind in dict((p.name, p.kind) for p in PROVIDERS).items():
        yield f"  {name} ({kind})"


if __name__ == "__main__":
    sys.exit(main())
