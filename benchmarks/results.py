"""One line of JSON a measurement: what is in it, where it is kept, and how it is read back."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import taps_fast

from . import timing
from .workloads import unknown

CHECKOUT = Path(__file__).parents[1]
FOLDER = Path(__file__).parent / "results"

Record = dict[str, Any]

NUMBER = (int, float)
SCHEMA: dict[str, tuple[type, ...]] = {
    # Where and when.
    "date": (str,),
    "sha": (str,),
    "dirty": (bool,),
    "versions": (dict,),
    "device": (str,),
    "threads": (int,),
    "load": (*NUMBER,),
    # What.
    "workload": (str,),
    "op": (str,),
    "layer": (str,),
    "phase": (str,),
    "shape": (list,),
    "rows": (int,),
    "samples": (int,),
    "tasks": (int, type(None)),
    "deltas": (int, type(None)),
    "mix": (str,),
    "gates": (int, str),
    "dtype": (str,),
    "cold": (bool,),
    "sets": (int,),
    # By whom.
    "provider": (str,),
    "kind": (str,),
    "backend": (str, type(None)),
    "algorithm": (str, type(None)),
    "graph": (bool,),
    # How it went: ok, absent (cannot run here), failed (raised) or wrong (the check is red: no number).
    "status": (str,),
    "reason": (str, type(None)),
    "median_ms": (*NUMBER, type(None)),
    "p20_ms": (*NUMBER, type(None)),
    "p80_ms": (*NUMBER, type(None)),
    "rounds": (int, type(None)),
    "peak_bytes": (int, type(None)),
    "stored_bytes": (int, type(None)),
    # The limit.
    "model_bytes": (int,),
    "model_flops": (int,),
    "limit_ms": (*NUMBER, type(None)),
    "limit_bound": (str, type(None)),
}
STATUSES = ("ok", "absent", "failed", "wrong")


def environment(device: str) -> Record:
    """What a number depends on besides its workload."""
    packages = {"python": platform.python_version(), "torch": torch.__version__, "taps_fast": taps_fast.__version__}
    for optional in ("triton", "peft"):
        try:
            packages[optional] = importlib.metadata.version(optional)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "sha": _git("rev-parse", "HEAD") or "unknown",
        # Results, and tables made of them, may differ: they are what a run makes.
        "dirty": bool(_git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!*README.md")),
        "versions": packages,
        "device": timing.device_name(device),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
    }


def _git(*arguments: str) -> str:
    found = subprocess.run(["git", *arguments], cwd=CHECKOUT, capture_output=True, text=True)
    return found.stdout.strip()


def check(record: Record) -> None:
    """
    Raises:
        ValueError: not what `SCHEMA` says; a number beside a status that is not ok.
    """
    if record.keys() != SCHEMA.keys():
        raise ValueError(f"a record must have the fields of SCHEMA, got {sorted(record.keys() ^ SCHEMA.keys())} amiss")
    for name, types in SCHEMA.items():
        # A bool is an int to Python, not to us.
        if not isinstance(record[name], types) or (isinstance(record[name], bool) and bool not in types):
            raise ValueError(f"{name} must be {' or '.join(t.__name__ for t in types)}, got {record[name]!r}")
    if record["status"] not in STATUSES:
        raise ValueError(f"status must be one of {', '.join(STATUSES)}, got {record['status']!r}")
    if (record["status"] == "ok") != (record["median_ms"] is not None):
        raise ValueError(f"median_ms must be there exactly where status is ok, got {record['median_ms']!r}")


def key(record: Record) -> tuple[Any, ...]:
    """What a new measurement replaces."""
    return record["workload"], record["provider"], record["graph"]


def default_path(device: str) -> Path:
    """The committed results of this device."""
    words = (
        f"{timing.device_name(device)} {torch.get_num_threads()}t" if device == "cpu" else timing.device_name(device)
    )
    return FOLDER / f"{re.sub(r'[^a-z0-9]+', '-', words.lower()).strip('-')}.jsonl"


def read(path: Path) -> list[Record]:
    """
    Raises:
        UnknownName: no such file; the text lists those there are.
        ValueError: a line that is not a record.
    """
    if not path.is_file():
        raise unknown("results file", str(path), (p.name for p in FOLDER.glob("*.jsonl")))
    records = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            record = json.loads(line)
            check(record)
        except ValueError as error:
            raise ValueError(f"{path.name}, line {number}: {error}") from None
        records.append(record)
    return records


def write(path: Path, new: Sequence[Record], *, whole: bool = False) -> None:
    """Adds records to a file; they replace those of the same workload and provider.

    ``whole``: they are all that there is of their workloads, so those of any other provider go.
    """
    gone = {r["workload"] for r in new} if whole else set()
    records = {key(r): r for r in (read(path) if path.is_file() else []) if r["workload"] not in gone}
    for record in new:
        check(record)
        records[key(record)] = record
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(records[k], sort_keys=False) for k in sorted(records)]
    path.write_text("\n".join(lines) + "\n")
