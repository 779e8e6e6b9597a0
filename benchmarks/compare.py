"""Two commits side by side: the same benchmark code over this tree's taps_fast and another commit's.

Each tree has a process of its own that stays alive; the two take turns, a block of rounds each, so that a change
of the machine's speed meets both.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import timing
from .providers import Provider
from .results import CHECKOUT
from .workloads import UnknownName, Workload, workloads

TURNS = 8


def tree(ref: str) -> Path:
    """``ref`` unpacked and built under build/bench, with this tree's benchmarks in it.

    Raises:
        UnknownName: no such commit.
    """
    found = subprocess.run(
        ["git", "rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}"], cwd=CHECKOUT, capture_output=True, text=True
    )
    if found.returncode:
        raise UnknownName(f"unknown commit {ref!r}; known: whatever git rev-parse takes")
    folder = CHECKOUT / "build" / "bench" / found.stdout.strip()
    if not folder.is_dir():
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        archive = subprocess.Popen(["git", "archive", found.stdout.strip()], cwd=CHECKOUT, stdout=subprocess.PIPE)
        with tarfile.open(fileobj=archive.stdout, mode="r|") as packed:
            packed.extractall(partial, filter="data")
        build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        subprocess.run(build, cwd=partial, check=True, env=os.environ | {"TAPS_FAST_EXT": "require"})
        partial.rename(folder)
    shutil.rmtree(folder / "benchmarks", ignore_errors=True)
    shutil.copytree(Path(__file__).parent, folder / "benchmarks", ignore=shutil.ignore_patterns("results"))
    return folder


class Worker:
    """A process that times cells with the taps_fast of one tree."""

    def __init__(self, folder: Path, device: str, threads: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.compare", device, str(threads)],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **request: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"compare: the process of {self.process.args} ended")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def compare(
    ref: str, todo: Sequence[Workload], providers: Sequence[Provider], device: str, threads: int, seconds: float
) -> int:
    """Prints this tree against ``ref``, provider by provider of ours; 1 if a result of this tree is wrong."""
    base = tree(ref)
    workers = {"base": Worker(base, device, threads), "here": Worker(CHECKOUT, device, threads)}
    red = False
    print(f"{'ms: ' + ref:>12} {'here':>10} {'speed-up':>9}")
    try:
        for workload in todo:
            for provider in providers:
                if provider.kind != "ours" or not provider.fits(workload) or provider.absent(workload, device):
                    continue
                names = {"workload": workload.name, "provider": provider.name}
                problems = {side: worker.ask(**names, seconds=0)["error"] for side, worker in workers.items()}
                red = red or problems["here"] is not None
                if any(problems.values()):
                    print(f"  {problems}  {workload.name} {provider.name}")
                    continue
                times: dict[str, list[float]] = {side: [] for side in workers}
                for _ in range(TURNS):
                    for side, worker in workers.items():
                        times[side] += worker.ask(**names, seconds=seconds / TURNS)["times"]
                before, now = timing.Stats.of(times["base"]), timing.Stats.of(times["here"])
                ratio = before.median / now.median
                print(f"{before.median:12.3f} {now.median:10.3f} {ratio:9.2f}  {workload.name} {provider.name}")
    finally:
        for worker in workers.values():
            worker.close()
    return int(red)


def serve(device: str, threads: int) -> None:
    """Answers requests on stdin: a check first, then blocks of rounds."""
    import torch

    from . import cells
    from .providers import find

    timing.pin(threads)
    asked, built, p = None, None, None
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {"error": None, "times": []}
        try:
            if asked != (request["workload"], request["provider"]):
                built = None
                (workload,) = workloads([request["workload"]])
                p = cells.problem(workload, device)
                (provider,) = [q for q in find([request["provider"]]) if q.fits(workload)]
                with cells.mode(p):
                    built = [provider.build(q) for q in cells.rotated(workload, p, device)]
                    built[0].check()
                asked = request["workload"], request["provider"]
            if request["seconds"]:
                calls = [b.run for b in built or ()]
                with cells.mode(p):
                    answer["times"] = timing.rounds_of({"it": calls}, request["seconds"], device)["it"]
        except Exception as error:
            answer["error"] = f"{type(error).__name__}: {error}"
        if device != "cpu":
            torch.cuda.synchronize()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
