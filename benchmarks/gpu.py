"""`make gpu`: builds, tests and measures on a CUDA machine, without a network, and writes one file of results.

    python -m benchmarks.gpu            all of it, nine minutes at most
    python -m benchmarks.gpu --minutes 5

Needs PyTorch 2.10 with CUDA, Triton 3.6, numpy, pytest, and a C compiler where Triton builds its launcher with one; for
the CUDA C++ kernels nvcc and a C++ compiler. Whatever else is not installed is named and left out. When the time is up
the results are written all the same, with what did not run. It succeeds only if every Triton kernel was launched on the
device, every test was reached and none failed, no test marked ``gpu`` was skipped for another reason, and each
benchmarked cell of ours ran on a kernel and was right. That a prediction of `benchmarks.targets` does not hold is
written down and is no failure.
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

CHECKOUT = Path(__file__).parents[1]
WORK = CHECKOUT / "build" / "gpu"
NEEDED = {"torch": (2, 10), "triton": (3, 6), "numpy": (), "pytest": ()}
SUITES = ("gpu",)
"""Of `benchmarks.workloads`: what the time does not allow is named in the results."""
TARGETS = "targets"
"""`benchmarks.targets`, which comes before them."""
SECONDS = "0.05"
NOT_STARTED, CUT_SHORT = -1, 124
"""Instead of an exit status: the time was up before it, or while it ran."""
LEGAL = (0, NOT_STARTED, CUT_SHORT)
MOST_PROCESSES, THREADS = 15, "1"
"""That run the tests, and threads of each: a core each. Tests that need several threads set their number themselves."""
PATH = os.pathsep.join([str(CHECKOUT), str(CHECKOUT / "tests")])
"""Where tests find the package, which is not installed, and the plugin; also in processes that they start elsewhere."""
GRACE = 20.0
"""Seconds that a test may go on when the time of the tests is up."""
MINUTES, BUILD, BENCH = 9.0, 0.3, 150.0
"""Of a whole run; the share of it that the build may take; seconds of it that the tests leave to the benchmark."""
NAMED = 20
"""Tests whose names are written: the slowest, and the first of those that were not reached."""
Report = dict[str, Any]
Done = TypeVar("Done")


def missing(version_of: Callable[[str], str | None], has_device: Callable[[], bool]) -> list[str]:
    """What keeps this machine from running at all."""
    found = []
    for name, least in NEEDED.items():
        version = version_of(name)
        if version is None:
            found.append(f"{name} is not installed")
        elif tuple(int(n) for n in re.findall(r"\d+", version)[: len(least)]) < least:
            found.append(f"{name} must be {'.'.join(map(str, least))} or newer, found {version}")
    if not found and _triton_compiles() and not _compiler("CC", "gcc", "clang"):
        found.append(f"there is no C compiler, with which Triton {version_of('triton')} builds its launcher: gcc")
    if not found and not has_device():
        found.append("PyTorch sees no CUDA device")
    return found


def _compiler(variable: str, *names: str) -> str | None:
    return next(filter(None, map(shutil.which, (os.environ.get(variable, ""), *names))), None)


def _triton_compiles() -> bool:
    spec = importlib.util.find_spec("triton")
    driver = Path(spec.origin).parent / "backends/nvidia/driver.py" if spec and spec.origin else None
    return driver is not None and driver.is_file() and "compile_module_from_src" in driver.read_text()


def _version_of(name: str) -> str | None:
    return importlib.import_module(name).__version__ if importlib.util.find_spec(name) else None


def _has_device() -> bool:
    import torch

    return torch.cuda.is_available()


def run(command: Sequence[str], seconds: float, **env: str) -> subprocess.CompletedProcess[str]:
    """A step, with what it prints; 124 if it takes longer than it may, and then nothing that it started lives on."""
    WORK.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile("w+", dir=WORK) as log:  # not a pipe, which a grandchild could hold open
        code = _wait(_start(command, log, **env), seconds)
        log.seek(0)
        return subprocess.CompletedProcess(command, code, log.read())


def _start(command: Sequence[str], log: IO[str], **env: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command, cwd=CHECKOUT, env=os.environ | env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int:
    try:
        return process.wait(max(seconds, 1))
    except subprocess.TimeoutExpired:
        return CUT_SHORT
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def build(seconds: float) -> Report:
    """The extensions. One that setup.py finds this machine cannot have is left out by name; else it is a failure."""
    if not _compiler("CXX", "c++", "g++"):
        left_out = dict.fromkeys(("_C", "_C_cuda"), "there is no C++ compiler: c++")
        return {"exit": 0, "log": "", "left_out": left_out, "failed": {}}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--parallel", "2"]  # both at once
    done = run(command, seconds, TAPS_FAST_EXT="auto")
    notes = {p.name.removesuffix("_error.txt"): p.read_text().strip() for p in CHECKOUT.glob("taps_fast/*_error.txt")}
    failed = {name: note for name, note in notes.items() if not note.startswith("Unavailable:")}
    return {"exit": done.returncode, "log": done.stdout[-2000:], "left_out": notes, "failed": failed}


def tests(left_out: Container[str]) -> list[str]:
    """All of them; where the CPU has no kernels, the files that need a device or use one where there is one."""
    if "_C" not in left_out:
        return ["tests"]
    files = sorted((CHECKOUT / "tests").glob("test_*.py"))
    device = (p for p in files if p.name.startswith("test_triton_") or "pytest.mark.gpu" in p.read_text())
    return [str(path.relative_to(CHECKOUT)) for path in device]


def test(seconds: float, processes: int, files: Sequence[str]) -> list[Report]:
    """The suite, in as many processes as the machine has room for; each ends by itself when the time is up, or when
    they have taken all that is in the queue."""
    deadline = time.monotonic() + seconds
    queue, reports = WORK / "queue", [WORK / f"tests-{n}.json" for n in range(processes)]
    shutil.rmtree(queue, ignore_errors=True)
    queue.mkdir(parents=True)
    for stale in WORK.glob("tests-*.json"):
        stale.unlink()
    running = []
    for report in reports:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "launches", "--report", str(report)]
        command += ["--continue-on-collection-errors"]  # one file's failure is reported, and hides no other's
        command += ["--seconds", str(seconds), "--queue", str(queue), *files]
        with report.with_suffix(".log").open("w") as log:
            env = {"PYTHONPATH": PATH, "TAPS_FAST_EXT": "auto", "OMP_NUM_THREADS": THREADS}
            running.append(_start(command, log, **env))
    try:
        for process in running:
            _wait(process, deadline + GRACE - time.monotonic())
    finally:
        for process in running:
            _end(process)
    return [_report(path) for path in reports]


def _report(path: Path) -> Report:
    """What a process wrote, which may have ended before it had collected anything."""
    found: Report = json.loads(path.read_text()) if path.is_file() else {"exit": CUT_SHORT}
    collected = path.with_suffix(".collected.json")
    return found | ({"collected": json.loads(collected.read_text())} if collected.is_file() else {})


def bench(seconds: float, out: Path) -> Report:
    """Predictions and the benchmark's layers while time is left, each in a process that counts its launches."""
    deadline = time.monotonic() + seconds
    for stale in (out, *WORK.glob("launches-*.json"), WORK / f"{TARGETS}.json"):
        stale.unlink(missing_ok=True)
    launches: collections.Counter[str] = collections.Counter()
    exits: dict[str, int] = {}
    for suite in (TARGETS, *SUITES):
        left = deadline - time.monotonic()
        if left < 10:
            exits[suite] = NOT_STARTED
            continue
        done = run([sys.executable, "-m", "benchmarks.gpu", "--suite", suite, "--out", str(out)], left)
        exits[suite] = done.returncode
        print(done.stdout[-6000:], flush=True)
        counted = WORK / f"launches-{suite}.json"
        if counted.is_file():
            launches.update(json.loads(counted.read_text()))
    records = [json.loads(line) for line in out.read_text().splitlines()] if out.is_file() else []
    targets = WORK / f"{TARGETS}.json"
    found = json.loads(targets.read_text()) if targets.is_file() else []
    return {"exits": exits, "launches": launches, "records": records, "targets": found}


def _suite(name: str, out: Path) -> int:
    """What `bench` starts: one suite, with Triton's launches counted except while they are timed."""
    sys.path.insert(0, str(CHECKOUT / "tests"))
    from launches import Launches

    from . import run as runner
    from . import targets, timing

    launches, rounds_of = Launches().install(), timing.rounds_of

    def uncounted(*args: Any) -> dict[str, list[float]]:
        with launches.paused():
            return rounds_of(*args)

    timing.rounds_of = uncounted
    if name == TARGETS:
        code = targets.main(["--out", str(WORK / f"{TARGETS}.json")])
    else:
        code = runner.main([name, "--device", "cuda", "--no-memory", "--seconds", SECONDS, "--out", str(out)])
    (WORK / f"launches-{name}.json").write_text(json.dumps(launches))
    return code


def unreached(report: Report) -> list[str]:
    """Tests that no process finished, also those that one was killed in, in the order in which they are taken."""
    finished = {name for process in report["tests"] for name in process.get("finished", ())}
    collected = dict.fromkeys(name for process in report["tests"] for name in process.get("collected", ()))
    return [name for name in collected if name not in finished]


def not_run(report: Report) -> list[str]:
    """What the time did not allow."""
    lost = unreached(report)
    found = [f"{len(lost)} tests, of which the first is {lost[0]}"] if lost else []
    words = {NOT_STARTED: "benchmark {} was not started", CUT_SHORT: "benchmark {} was cut short"}
    return found + [words[code].format(name) for name, code in report["bench"]["exits"].items() if code in words]


def kernels() -> set[str]:
    """The name of every Triton kernel of the library."""
    return {
        name
        for path in (CHECKOUT / "kernels").glob("*.py")
        for name in re.findall(r"^@triton\.jit.*\ndef (\w+_kernel)\(", path.read_text(), re.MULTILINE)
    }


def verdict(report: Report, expected: set[str]) -> list[str]:
    """Why this run is no success; empty if it is one."""
    reasons = [f"{name} was not built: {note}" for name, note in report["build"]["failed"].items()]
    if report["build"]["exit"] != 0:
        reasons.append(f"the build ended with {report['build']['exit']}")
    launched: collections.Counter[str] = collections.Counter()
    gpu: dict[str, str] = {}
    collected = next((process["collected"] for process in report["tests"] if "collected" in process), [])
    for n, process in enumerate(report["tests"]):
        if process["exit"] != 0:
            reasons.append(f"tests, process {n}: pytest ended with {process['exit']}, see build/gpu/tests-{n}.log")
        if process.get("collected", collected) != collected:
            found = f"{len(process['collected'])} tests, another {len(collected)} or in another order"
            reasons.append(f"tests, process {n}: collected {found}, so that they cannot share them")
        launched.update(process.get("launches", {}))
        gpu |= process.get("gpu", {})
        if "nvcc" in process.get("left_out", {}).values() and "_C_cuda" not in report["build"]["left_out"]:
            reasons.append(f"tests, process {n}: the CUDA C++ kernels were left out, though they were built")
    if lost := unreached(report):
        reasons.append(f"{len(lost)} of {len(collected)} tests were not reached")
    if not gpu:
        reasons.append("no test marked gpu ran")
    reasons += [f"{name}: {outcome}" for name, outcome in gpu.items() if outcome != "passed"]
    reasons += [f"{name}: failed" for p in report["tests"] for name in p.get("failed", {}) if name not in gpu]
    reasons += [f"{name} was never launched on the device by a test" for name in sorted(expected - launched.keys())]
    ran = report["bench"]
    reasons += [f"benchmark {name} ended with {code}" for name, code in ran["exits"].items() if code not in LEGAL]
    ours = [r for r in ran["records"] if r["provider"] == "taps_fast" and not r["graph"]]
    if not any(r["status"] == "ok" for r in ours):
        reasons.append("the benchmark measured nothing of ours")
    for r in ours:
        if r["status"] != "ok":
            reasons.append(f"{r['workload']}: {r['status']}: {r['reason']}")
        elif r["op"] == "linear" and r["backend"] not in ("triton", "cuda"):
            reasons.append(f"{r['workload']}: ran on {r['backend']}, not on a kernel")
    if not sum(ran["launches"].values()):
        reasons.append("no kernel was launched while the benchmark ran")
    return reasons


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--suite", choices=(TARGETS, *SUITES), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args(argv)
    if reasons := missing(_version_of, _has_device):
        print("gpu: nothing was run: " + "; ".join(reasons), file=sys.stderr)
        return 2
    if chosen.suite:
        return _suite(chosen.suite, chosen.out)
    WORK.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * chosen.minutes
    report: Report = {"seconds": {}}
    report["build"], report["seconds"]["build"] = _timed(build, BUILD * 60 * chosen.minutes)
    print("built; " + "; ".join(f"{n} left out: {why}" for n, why in report["build"]["left_out"].items()), flush=True)
    processes = max(1, min(MOST_PROCESSES, (os.cpu_count() or 1) - 1))
    files = tests(report["build"]["left_out"])
    left = end - time.monotonic() - BENCH * min(1.0, chosen.minutes / MINUTES)
    report["tests"], report["seconds"]["tests"] = _timed(test, left - GRACE, processes, files)
    left = end - time.monotonic()
    report["bench"], report["seconds"]["bench"] = _timed(bench, left - 10, WORK / "bench.jsonl")
    print(*(f"{step} took {seconds} s" for step, seconds in report["seconds"].items()), sep=", ")
    for what in not_run(report):
        print(f"not run: {what}")
    reasons = verdict(report, kernels())
    path = write(report, reasons)
    for process in report["tests"]:
        for name, said in process.get("failed", {}).items():
            print(f"\n{name}\n{said}")
    for reason in reasons:
        print(f"gpu: {reason}", file=sys.stderr)
    print(f"{'FAILED' if reasons else 'all passed'}; written to {path}")
    return 1 if reasons else 0


def _timed(step: Callable[..., Done], *arguments: Any) -> tuple[Done, float]:
    start = time.monotonic()
    return step(*arguments), round(time.monotonic() - start, 1)


def write(report: Report, reasons: list[str]) -> Path:
    """One file: where, what ran and how long, what was left out, how often each kernel was launched, and every
    measurement."""
    import torch

    from . import results, timing

    lost = unreached(report)
    total: collections.Counter[str] = collections.Counter()
    outcomes: collections.Counter[str] = collections.Counter()
    seconds: collections.Counter[str] = collections.Counter()
    by_file: collections.Counter[str] = collections.Counter()
    for process in report["tests"]:
        total.update(process.get("launches", {}))
        outcomes.update(process.get("outcomes", {}))
        seconds.update(process.get("finished", {}))
    for name, spent in seconds.items():
        by_file[name.partition("::")[0]] += spent
    left_out = {k: v for process in report["tests"] for k, v in process.get("left_out", {}).items()}
    summary = results.environment("cuda") | {
        "cpu": timing.device_name("cpu"),
        "success": not reasons,
        "reasons": reasons,
        "left_out": report["build"]["left_out"] | left_out,
        "outcomes": dict(outcomes),
        "seconds": report["seconds"],
        "test_seconds_by_file": {name: round(spent, 1) for name, spent in by_file.most_common()},
        "slowest_tests": {name: round(spent, 1) for name, spent in seconds.most_common(NAMED)},
        "launches_in_tests": dict(total),
        "launches_in_benchmark": dict(report["bench"]["launches"]),
        "not_run": not_run(report),
        "unreached": {"count": len(lost), "first": lost[:NAMED]},
        "suites": report["bench"]["exits"],
        "targets": report["bench"]["targets"],
        "records": report["bench"]["records"],
    }
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    path = results.FOLDER / f"gpu-{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(summary, indent=1) + "\n")
    return path


if __name__ == "__main__":
    sys.exit(main())
