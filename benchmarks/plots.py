"""The pictures of one device's results."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from .report import MIB, best, by, cells, ours, series, speedup, to_limit
from .results import Record

COLOURS = {
    "taps_fast": "#0b5fa5",
    "taps_fast-baked": "#5aa0d8",
    "taps_fast-prepared": "#5aa0d8",
    "base": "#888888",
    "base-folded": "#bbbbbb",
    "merged-copies": "#c0392b",
    "merged-loop": "#c0392b",
}


def draw(device: str, records: list[Record], folder: Path) -> Iterator[Path]:
    """One PNG for each picture that has something to show."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    for name, picture in PICTURES.items():
        figure = picture(records)
        if figure is not None:
            figure.suptitle(f"{device}, {records[0]['threads']} threads", fontsize=9)
            path = folder / f"{slug}-{name}.png"
            figure.savefig(path, dpi=120, metadata={"Software": None})
            yield path


def _figure(columns: int, width: float = 5.0, height: float = 4.2) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * columns, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def speedups(records: list[Record]) -> Figure | None:
    """Rows x tasks: how many times faster ours is than the best baseline, merged weights included."""
    found = cells(records, "rows")
    shares = sorted({ours(cell)["gates"] for cell in found})
    if not found:
        return None
    figure, axes = _figure(len(shares))
    for axis, share in zip(axes, shares, strict=True):
        mine = {(ours(c)["rows"], ours(c)["tasks"]): c for c in found if ours(c)["gates"] == share}
        rows, tasks = (sorted({key[i] for key in mine}) for i in (0, 1))
        grid = [
            [speedup(c, best(c, "baseline", "merged")) if (c := mine.get((m, t))) else None for t in tasks]
            for m in rows
        ]
        values = [[float("nan") if v is None else v for v in line] for line in grid]
        axis.imshow(values, cmap="RdBu", norm=LogNorm(0.25, 4), aspect="auto")
        for i, line in enumerate(grid):
            for j, value in enumerate(line):
                if value is not None:
                    axis.text(j, i, f"{value:.2f}", ha="center", va="center")
        axis.set_xticks(range(len(tasks)), [str(t) for t in tasks])
        axis.set_yticks(range(len(rows)), [str(m) for m in rows])
        axis.set(xlabel="tasks", ylabel="rows", title=f"768 → 3072, {share} % of gates open")
    return figure


def roofline(records: list[Record]) -> Figure | None:
    """Speed reached against the limit, by flops a byte."""
    plain = [r for r in records if r["status"] == "ok" and not r["graph"] and r["op"] != "network" and r["model_flops"]]
    if not plain:
        return None
    figure, (axis,) = _figure(1, 7)
    for kind, label, colour in (("merged", "best of merged", "#c08030"), ("ours", "taps_fast", "#0b5fa5")):
        chosen = {}
        for r in plain:
            if r["kind"] == kind and (kind == "merged" or r["provider"] == "taps_fast"):
                old = chosen.get(r["workload"])
                chosen[r["workload"]] = r if old is None or r["median_ms"] < old["median_ms"] else old
        points = [(r["model_flops"] / r["model_bytes"], to_limit(r)) for r in chosen.values()]
        axis.scatter(*zip(*points, strict=True), s=14, label=label, color=colour, alpha=0.7) if points else None
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set(xscale="log", ylim=(0, None), xlabel="modelled flops a byte", ylabel="share of the limit's speed")
    axis.legend()
    return figure


def memory(records: list[Record]) -> Figure | None:
    """Peak memory by tasks."""
    return _lines(records, "peak memory, MiB", lambda r: None if r["peak_bytes"] is None else r["peak_bytes"] / MIB)


def scaling(records: list[Record]) -> Figure | None:
    """Time by tasks."""
    return _lines(records, "ms", lambda r: r["median_ms"])


def _lines(records: list[Record], label: str, value: Callable[[Record], float | None]) -> Figure | None:
    panels: dict[tuple[str, int | str], dict[str, list[tuple[int, float]]]] = {}
    for (layer, gates, provider), line in series(records).items():
        points = [(r["tasks"], found) for r in line if (found := value(r)) is not None]
        if len(points) > 1 and "[" not in provider:
            panels.setdefault((layer, gates), {})[provider] = points
    if not panels:
        return None
    figure, axes = _figure(len(panels))
    for axis, ((layer, gates), lines) in zip(axes, panels.items(), strict=True):
        for provider, points in lines.items():
            wide = 2.5 if provider == "taps_fast" else 1.0
            axis.plot(
                *zip(*points, strict=True), marker="o", label=provider, color=COLOURS.get(provider), linewidth=wide
            )
        tasks = sorted({t for points in lines.values() for t, _ in points})
        values = [v for points in lines.values() for _, v in points]
        axis.set(xscale="log", xlabel="tasks", ylabel=label, title=f"{layer}, {gates} % of gates open")
        axis.set_xticks(tasks, [str(t) for t in tasks])
        axis.set_xticks([], minor=True)
        if max(values) > 5 * min(values):
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
        else:
            axis.set_ylim(0, None)
        axis.legend(fontsize=7)
    return figure


def training(records: list[Record]) -> Figure | None:
    """Peak memory of one training step."""
    found = cells(records, "learn")
    if not found:
        return None
    figure, (axis,) = _figure(1, 8)
    providers = ("taps_fast", "materialise", "full-fine-tuning")
    for i, provider in enumerate(providers):
        peaks = [(r["peak_bytes"] or 0) / MIB if (r := by(cell, provider)) else 0 for cell in found]
        places = [j + 0.27 * (i - 1) for j in range(len(found))]
        axis.bar(places, peaks, 0.25, label=provider, color=COLOURS.get(provider))
    names = [f"{ours(c)['layer']}, {ours(c)['gates']}" for c in found]
    axis.set_xticks(range(len(found)), names)
    axis.set(ylabel="peak memory of a step, MiB")
    axis.legend()
    return figure


PICTURES: dict[str, Callable[[list[Record]], Figure | None]] = {
    "speedup": speedups,
    "limit": roofline,
    "memory": memory,
    "training": training,
    "scaling": scaling,
}
