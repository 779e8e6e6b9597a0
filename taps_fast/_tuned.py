"""What is tuned for a chip, as data: `tuned.json`, which `python -m benchmarks.tune` rewrites for the GPU it runs on.

* ``crossovers``: up to how many rows a task a second product ("split") is the better way, by op, chip and dtype. Until
  a chip is measured, the number follows from its assumed bandwidth and rate::

      rows = tensors·bytes an element·rate / (2·bandwidth)

  "linear" moves three tensors if it sums instead ("merge"): it reads the base and the delta and writes the weight,
  where a second product costs two flops a row. For "conv2d" a row is an output pixel, and the question is up to where
  both products wait for the base and the delta, one tensor each: from there on the vendor's better rate may count.
  Its float32 entries assume tf32, which PyTorch allows convolutions by default.
* ``configs``: tile sizes of the Triton kernels, by kernel, chip, bytes an element and rows; see `kernels/_configs.py`.

A chip that has no entry uses that of the one that it is like, or of "other".
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

PATH = Path(__file__).with_name("tuned.json")
OTHER = "other"
LIKE = {"sm_103": "sm_100"}
"""Chips of one generation, with the same units and shared memory; of these only one was looked at."""
TENSORS = {"linear": 3, "conv2d": 1}
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


class Crossover(NamedTuple):
    """Up to ``rows`` a task, split; ``source`` says where the number is from."""

    rows: int
    source: str


def save(data: dict[str, list[dict[str, Any]]], path: Path = PATH) -> None:
    """One entry a line, so that a new measurement is a readable change."""
    parts = []
    for name, entries in data.items():
        lines = ",\n".join(f"    {json.dumps(entry)}" for entry in entries)
        parts.append(f'  "{name}": [\n{lines}\n  ]')
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def arch_of(capability: tuple[int, int]) -> str:
    """ "sm_90" for (9, 0)."""
    return f"sm_{capability[0]}{capability[1]}"


def arch(index: int | None = None) -> str:
    """The chip of a CUDA device, the current one unless said."""
    if not torch.cuda.is_available():
        return OTHER
    properties = torch.cuda.get_device_properties(index)  # which torch.compile knows, as it does not the capability
    return arch_of((properties.major, properties.minor))


def crossover(op: str, arch: str, dtype: torch.dtype) -> Crossover:
    """
    Raises:
        KeyError: an op or dtype without an entry.
    """
    own = CROSSOVERS.get((op, arch, dtype)) or CROSSOVERS.get((op, LIKE.get(arch, OTHER), dtype))
    return own or CROSSOVERS[op, OTHER, dtype]


def crossovers(entries: list[dict[str, Any]]) -> dict[tuple[str, str, torch.dtype], Crossover]:
    """The entries by op, chip and dtype: the measurement where there is one, else the model."""
    found = {}
    for e in entries:
        key = e["op"], e["arch"], getattr(torch, e["dtype"])
        if e["measured"] is None:
            rates = f"{e['tb_per_s']} TB/s and {e['tflops']} TFLOP/s"
            found[key] = Crossover(modelled_rows(e), f"modelled for {e['arch']} from {rates}, not measured")
        else:
            found[key] = Crossover(e["measured"], f"measured on {e['device']}, {e['date']}")
    return found


def modelled_rows(entry: dict[str, Any]) -> int:
    """The formula of this file."""
    bytes_moved, flops = TENSORS[entry["op"]] * ITEMSIZE[entry["dtype"]], 2
    rows: float = bytes_moved * entry["tflops"] / (flops * entry["tb_per_s"])
    return round(rows)


DATA: dict[str, list[dict[str, Any]]] = json.loads(PATH.read_text())
CROSSOVERS = crossovers(DATA["crossovers"])
