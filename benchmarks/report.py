"""Tables and pictures of the committed results. Nothing here measures, and nothing there is typed by hand.

    python -m benchmarks.report             rewrites the tables in the READMEs, and the pictures
    python -m benchmarks.report --check     changes nothing; 1 if a table is not what the results say

A table stands between ``<!-- benchmarks:NAME -->`` and ``<!-- /benchmarks:NAME -->``.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from . import results
from .results import CHECKOUT, FOLDER, Record
from .workloads import SELECTIONS, SUITES, unknown

PAGES = (CHECKOUT / "README.md", CHECKOUT / "benchmarks" / "README.md")
MARKED = re.compile(r"(<!-- benchmarks:(\w+) -->\n)(.*?)(<!-- /benchmarks:\2 -->)", re.DOTALL)
MIB = 2**20

NETWORKS = ("serve", "prepared")
PREPARED = {workload.name for workload in SUITES["prepared"]()}

Cell = list[Record]
"""The records of one workload."""


def cells(records: Iterable[Record], suite: str) -> list[Cell]:
    """The cells of a suite that were measured, in its order."""
    found: dict[str, Cell] = {w.name: [] for w in SUITES[suite]()}
    for record in records:
        if record["workload"] in found and not record["graph"]:
            found[record["workload"]].append(record)
    return [cell for cell in found.values() if ours(cell) is not None]


def by(cell: Cell, provider: str) -> Record | None:
    """A provider's record, if it has a number."""
    return next((r for r in cell if r["provider"] == provider and r["status"] == "ok"), None)


def ours(cell: Cell) -> Record | None:
    """What a user gets who asks for nothing in particular; in the suite of prepared networks, who prepared one."""
    return by(cell, "taps_fast-prepared" if any(r["workload"] in PREPARED for r in cell) else "taps_fast")


def best(cell: Cell, *kinds: str) -> Record | None:
    """The fastest of these kinds."""
    return min((r for r in cell if r["kind"] in kinds and r["status"] == "ok"), key=_median, default=None)


def speedup(cell: Cell, other: Record | None) -> float | None:
    """How many times faster ours is; below 1 it is slower."""
    mine = ours(cell)
    return None if other is None or mine is None else other["median_ms"] / mine["median_ms"]


def to_limit(record: Record) -> float:
    """The share of the limit's speed that was reached; 1 is the limit."""
    return record["limit_ms"] / record["median_ms"]


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the least-squares line through (x, y)."""
    x_mean, y_mean = (statistics.fmean(p[i] for p in points) for i in (0, 1))
    spread = sum((x - x_mean) ** 2 for x, _ in points)
    return sum((x - x_mean) * (y - y_mean) for x, y in points) / spread if spread else 0.0


def _median(record: Record) -> float:
    return record["median_ms"]


def _times(ratio: float | None, name: str | None = None) -> str:
    """A speed-up; bold where we lose."""
    if ratio is None:
        return "–"
    text = f"{ratio:.2f}" if ratio >= 1 else f"**{ratio:.2f}**"
    return f"{text} {name}" if name else text


def _ms(record: Record | None) -> str:
    return "–" if record is None else f"{record['median_ms']:.3f} ({record['p20_ms']:.3f}–{record['p80_ms']:.3f})"


def _mib(size: int | None) -> str:
    return "–" if size is None else f"{size / MIB:,.0f}"


def _rows(header: str, rows: Iterable[Sequence[str]]) -> list[str]:
    columns = header.split(" | ")
    return [
        f"| {header} |",
        "|" + "---|" * len(columns),
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def layers(suite: str) -> Callable[[list[Record]], list[str]]:
    """The table of a suite of single layers (and norms): one row a workload."""

    def table(records: list[Record]) -> list[str]:
        def row(cell: Cell) -> list[str]:
            mine, rival, merged = ours(cell), best(cell, "baseline"), best(cell, "merged")
            assert mine is not None
            floor = best(cell, "floor")
            return [
                f"`{mine['workload']}`",
                _ms(mine),
                _times(speedup(cell, rival), rival and rival["provider"]),
                _times(speedup(cell, merged), merged and merged["provider"]),
                "–" if floor is None else f"{mine['median_ms'] / floor['median_ms']:.2f}",
                f"{to_limit(mine):.0%} ({mine['limit_bound']})",
            ]

        header = (
            "workload | ours, ms (p20–p80) | × best of base + deltas | × best of merged | time / base only | of limit"
        )
        return _rows(header, (row(cell) for cell in cells(records, suite)))

    return table


def networks(suite: str) -> Callable[[list[Record]], list[str]]:
    """The table of whole networks in inference: one row a workload and provider."""

    def table(records: list[Record]) -> list[str]:
        def rows() -> Iterator[list[str]]:
            for cell in cells(records, suite):
                mine = ours(cell)
                for r in sorted((r for r in cell if r["status"] == "ok"), key=_median):
                    yield [
                        r["layer"],
                        str(r["samples"]),
                        str(r["tasks"]),
                        str(r["gates"]),
                        r["provider"],
                        f"{1e3 * r['samples'] / r['median_ms']:.1f}",
                        _times(r["median_ms"] / mine["median_ms"]) if r is not mine else "",
                        _mib(r["stored_bytes"]),
                        _mib(r["peak_bytes"]),
                    ]

        header = "network | images | tasks | open gates | by | images/s | ours is × | weights, MiB | peak, MiB"
        return _rows(header, rows())

    return table


def learn(records: list[Record]) -> list[str]:
    """Whole networks in training: one row a network and provider."""

    def rows() -> Iterator[list[str]]:
        for cell in cells(records, "learn"):
            for r in sorted((r for r in cell if r["status"] == "ok"), key=_median):
                faster = _times(r["median_ms"] / ours(cell)["median_ms"]) if r["provider"] != "taps_fast" else ""
                yield [r["layer"], str(r["gates"]), r["provider"], _ms(r), faster, _mib(r["peak_bytes"])]

    return _rows("network | open gates | by | step, ms (p20–p80) | ours is × | peak, MiB", rows())


def series(records: list[Record]) -> dict[tuple[str, object, str], list[Record]]:
    """The scaling suite as lines: (layer, gates, provider) to its records by number of tasks."""
    lines: dict[tuple[str, object, str], list[Record]] = {}
    for cell in cells(records, "scaling"):
        for r in cell:
            if r["status"] == "ok":
                lines.setdefault((r["layer"], r["gates"], r["provider"]), []).append(r)
    return {key: sorted(line, key=lambda r: r["tasks"]) for key, line in lines.items() if len(line) > 1}


def scaling(records: list[Record]) -> list[str]:
    """Tasks 1 to 64 at a fixed batch: one row a line of the picture."""

    def rows() -> Iterator[list[str]]:
        for (layer, gates, provider), line in series(records).items():
            first, last = line[0], line[-1]
            peaks = [(r["tasks"], r["peak_bytes"] / MIB) for r in line if r["peak_bytes"] is not None]
            yield [
                layer,
                str(gates),
                provider,
                f"{first['median_ms']:.3f}",
                f"{last['median_ms']:.3f}",
                f"{1e3 * slope([(r['tasks'], r['median_ms']) for r in line]):+.1f}",
                _mib(first["peak_bytes"]),
                _mib(last["peak_bytes"]),
                f"{slope(peaks):+.2f}" if len(peaks) > 1 else "–",
            ]

    header = "layer | open % | by | ms, fewest tasks | ms, most | µs a task | peak MiB, fewest | most | MiB a task"
    return _rows(header, rows())


def summary(records: list[Record]) -> list[str]:
    """One row a suite: geometric means, and how many cells we lose."""

    def rows() -> Iterator[list[str]]:
        for suite in SUITES:
            found = cells(records, suite)
            if suite in SELECTIONS or not found:
                continue
            row = [suite, str(len(found))]
            for kind in ("baseline", "merged"):
                ratios = [s for s in (speedup(c, best(c, kind)) for c in found) if s is not None]
                lost = sum(s < 1 for s in ratios)
                mean = math.exp(statistics.fmean(map(math.log, ratios))) if ratios else None
                row += [_times(mean), f"{lost} of {len(ratios)}" if ratios else "–"]
            limits = [to_limit(ours(c)) for c in found]
            yield [*row, f"{statistics.median(limits):.0%}"]

    header = "suite | workloads | × best of base + deltas | lost | × best of merged | lost | of limit (median)"
    return _rows(header, rows())


def machine(records: list[Record]) -> list[str]:
    """Where and with what the numbers were taken."""
    lines = []
    for r in {(r["sha"], r["dirty"], str(r["versions"]), r["threads"]): r for r in records}.values():
        versions = ", ".join(f"{name} {version}" for name, version in r["versions"].items())
        tree = r["sha"][:10] + (" with changes" if r["dirty"] else "")
        lines.append(f"{r['threads']} threads, {versions}; commit {tree}, {r['date'][:10]}, load {r['load']}")
    return [f"- {line}" for line in lines]


def absent(records: list[Record]) -> list[str]:
    """Who could not run, and why: once a reason."""
    found: Counter[tuple[str, str, str]] = Counter()
    for r in records:
        if r["status"] != "ok":
            reason = r["reason"].replace("|", "\\|")
            found[r["provider"] + " (graph)" * r["graph"], r["status"], reason] += 1
    rows = ([name, status, str(n), reason] for (name, status, reason), n in sorted(found.items()))
    return _rows("provider | what | workloads | why", rows)


TABLES: dict[str, Callable[[list[Record]], list[str]]] = {
    "summary": summary,
    "machine": machine,
    **{name: networks(name) for name in NETWORKS},
    "learn": learn,
    "scaling": scaling,
    "absent": absent,
    **{name: layers(name) for name in SUITES if name not in (*NETWORKS, "learn", "scaling", *SELECTIONS)},
}
GPU = "gpu"
"""The one table that is made from what `benchmarks.gpu` wrote, the others being of CPUs."""


def gpu(records: list[Record]) -> list[str]:
    """One row a workload: calls one after another, and as a replayed graph, in which the host takes no part."""

    def replayed(workload: str, provider: str) -> Record | None:
        same = (r for r in records if r["graph"] and r["status"] == "ok" and r["workload"] == workload)
        return next((r for r in same if r["provider"] == provider), None)

    def row(cell: Cell) -> list[str]:
        mine, rival, merged = ours(cell), best(cell, "baseline"), best(cell, "merged")
        assert mine is not None
        graph, floor = replayed(mine["workload"], "taps_fast"), replayed(mine["workload"], "base")
        return [
            f"`{mine['workload']}`",
            f"{1e3 * mine['median_ms']:.0f}" + (f", {mine['backend']}/{mine['algorithm']}" if mine["backend"] else ""),
            _times(speedup(cell, rival), rival and rival["provider"]),
            _times(speedup(cell, merged), merged and merged["provider"]),
            "–" if graph is None else f"{1e3 * graph['median_ms']:.0f}",
            "–" if graph is None or floor is None else f"{graph['median_ms'] / floor['median_ms']:.2f}",
        ]

    header = "workload | ours, µs | × best of base + deltas | × best of merged | replayed, µs | over the base's replay"
    return _rows(header, (row(cell) for cell in cells(records, GPU)))


def filled(page: str, devices: dict[str, list[Record]], gpus: dict[str, list[Record]]) -> str:
    """``page`` with every table made anew.

    Raises:
        UnknownName: a marker that names no table.
    """

    def table(match: re.Match[str]) -> str:
        if match[2] not in (*TABLES, GPU):
            raise unknown("table", match[2], (*TABLES, GPU))
        make, found = (gpu, gpus) if match[2] == GPU else (TABLES[match[2]], devices)
        parts = [["", f"**{name}**", "", *make(records), ""] for name, records in found.items()]
        lines = [line for part in parts for line in part] or ["", "No results yet.", ""]
        return match[1] + "\n".join(lines) + "\n" + match[4]

    return MARKED.sub(table, page)


def load(paths: Sequence[Path]) -> dict[str, list[Record]]:
    """Records by device."""
    devices: dict[str, list[Record]] = {}
    for path in paths:
        for record in results.read(path):
            devices.setdefault(record["device"], []).append(record)
    return devices


def load_gpus(paths: Iterable[Path]) -> dict[str, list[Record]]:
    """The same of files of `benchmarks.gpu`."""
    return {found["device"]: found["records"] for found in (json.loads(path.read_text()) for path in paths)}


def main(argv: Sequence[str] | None = None, pages: Sequence[Path] = PAGES) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "files", nargs="*", type=Path, help="what benchmarks.run wrote (default: all results in benchmarks/results)"
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 if a table is not what the results say"
    )
    parser.add_argument(
        "--plots", type=Path, default=FOLDER, metavar="FOLDER", help="where pictures go (default: %(default)s)"
    )
    chosen = parser.parse_args(argv)
    try:
        devices = load(chosen.files or sorted(FOLDER.glob("*.jsonl")))
        gpus = load_gpus([] if chosen.files else sorted(FOLDER.glob("gpu-*.json")))
        new = {page: filled(page.read_text(), devices, gpus) for page in pages}
    except ValueError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    stale = [page for page, text in new.items() if page.read_text() != text]
    if chosen.check:
        for page in stale:
            print(f"{page.name} is stale: run python -m benchmarks.report", file=sys.stderr)
        return 1 if stale else 0
    for page in stale:
        page.write_text(new[page])
    try:
        from . import plots
    except ImportError as error:
        print(f"no pictures: {error}; pip install matplotlib", file=sys.stderr)
    else:
        for name, records in devices.items():
            for path in plots.draw(name, records, chosen.plots):
                print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
