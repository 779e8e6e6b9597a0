"""Which networks TapsModel adapts, and whether what it makes of them is right. A CSV, and a page made of it.

python -m benchmarks.conversion                       what is not in the CSV yet; one process a network
python -m benchmarks.conversion 'timm:resnet*' --again
python -m benchmarks.conversion --page                only the page

Networks are those of the installed timm and transformers, with random weights in float64, so that a wrong answer
cannot hide in rounding. Of timm: all of less than 10 million parameters, and one of each class that has none.
Each is checked in four ways: gates closed, the model is the base; gates open, it is what `merge` returns; a mixed
batch is what each of its samples gives in a batch of its own; and the deltas do change the output.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import multiprocessing
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, get_type_hints

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from taps_fast import TapsModel

from . import architectures
from .architectures import Architecture

FOLDER = Path(__file__).parent / "results"
RESULTS, PAGE = FOLDER / "conversion.csv", Path(__file__).parent / "conversion.md"
TASKS = ("a", "b")
MIXED = ["a", "b", "base", "a"]
TOLERANCE = 1e-8
"""Of the largest output; float64 leaves 1e-12, one delta that is not applied 1e-3."""
SECONDS = 400
SPREADS = (2.0, 1.0, 0.5)
"""Standard deviations of a layer's outputs, of which the first is taken that the network stands: see `_liven`."""
EXCLUSIONS = 8
"""How many times an error's advice to exclude a layer is followed."""


INFINITE = "random deltas give NaN"
EXCLUDE = re.compile(r"(?:ValueError|RuntimeError): ([\w.]+): .*exclude it from the conversion")
Name = tuple[str, str, str]
"""Library, family and name."""


class Outcome(NamedTuple):
    """One network. ``verdict``:

    * right: all four checks passed
    * excluded: the same, once the layers that an error named were excluded, as it said
    * refused: TapsModel, or its mixed forward, raised an error that says why
    * wrong: an output differs and nobody was told
    * not run: the network itself did not run on our input (or takes too long)
    """

    library: str
    family: str
    name: str
    parameters: int
    verdict: str
    layers: int = 0
    """With a gate."""
    norms: int = 0
    """One a task."""
    skipped: int = 0
    refused: int = 0
    """Modules with parameters that stay shared."""
    share: float = 0.0
    """Of the parameters, those a task can change."""
    reason: str = ""


def examine(architecture: Architecture) -> Outcome | None:
    """Builds, adapts and checks one network; None: it is too large."""
    torch.set_num_threads(1)
    name = architecture.library, architecture.family, architecture.name
    why = ""
    for spread in SPREADS:
        torch.manual_seed(0)
        try:
            model, inputs = architecture.build()
            model = model.eval().double()
            inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
            _liven(model, spread)
            base = outputs(model, inputs)
        except architectures.TooLarge:
            return None
        except Exception as error:  # of any library
            return Outcome(*name, 0, "not run", reason=_line(error))
        size = sum(p.numel() for p in model.parameters())
        why = unfit(model, inputs, base)
        outcome = Outcome(*name, size, "not run", reason=why) if why else _examined(name, model, size, inputs, base)
        if outcome.verdict != "not run":
            return outcome
    return outcome


def unfit(model: nn.Module, inputs: dict[str, Tensor], base: list[Tensor]) -> str:
    """Why nothing can be said of a network with these weights; "" where something can."""
    if not all(torch.isfinite(t).all() for t in base):
        return "random weights give NaN"
    if difference(base, outputs(model, inputs)) > 0:
        return "the network itself answers differently when asked again"
    nudged = {k: v * (1 + 2**-52) if v.is_floating_point() else v for k, v in inputs.items()}
    if difference(outputs(model, nudged), base) > TOLERANCE:
        return "random weights let rounding errors grow beyond the tolerance"
    return ""


def _examined(name: Name, model: nn.Module, size: int, inputs: dict[str, Tensor], base: list[Tensor]) -> Outcome:
    """What TapsModel makes of it; if need be without the layers that it says to exclude, such as one for a table of
    positions, which no sample belongs to."""
    exclude: list[str] = []
    first = outcome = _adapted(name, model, size, inputs, base)
    for _ in range(EXCLUSIONS):
        named = EXCLUDE.search(outcome.reason)
        if outcome.verdict != "refused" or named is None:
            break
        exclude = sorted({*exclude, re.sub(r"(?<=\.)\d+(?=\.)", "*", named[1])})
        outcome = _adapted(name, model, size, inputs, base, exclude)
    if not exclude or outcome.verdict != "right":
        return first if outcome.verdict != "wrong" else outcome
    return outcome._replace(verdict="excluded", reason=f"exclude={exclude}")


def _adapted(
    name: Name,
    model: nn.Module,
    size: int,
    inputs: dict[str, Tensor],
    base: list[Tensor],
    exclude: Sequence[str] = (),
) -> Outcome:
    """What TapsModel makes of ``model``, checked."""
    try:
        adapted = TapsModel(model, TASKS, exclude=exclude)
    except (ValueError, RuntimeError) as error:
        return Outcome(*name, size, "refused", reason=_line(error))
    found = adapted.conversion
    changed = sum(layer.base.numel() for layer in found.layers.values())
    changed += sum(p.numel() for norm in found.norms.values() for p in norm.base.parameters())
    outcome = Outcome(
        *name,
        size,
        "right",
        len(found.layers),
        len(found.norms),
        len(found.of("skipped")),
        len(found.of("refused")),
        changed / max(size, 1),
    )
    try:
        reason = check(adapted, inputs, base)
    except (ValueError, RuntimeError, TypeError) as error:
        return outcome._replace(verdict="refused", reason=_line(error))
    if reason == INFINITE:
        return Outcome(*name, size, "not run", reason=reason)
    return outcome._replace(verdict="wrong", reason=reason) if reason else outcome


def check(adapted: TapsModel, inputs: dict[str, Tensor], base: list[Tensor]) -> str | None:
    """What is wrong, or None."""
    gates(adapted, 0.0)
    for task in TASKS:
        if (off := difference(outputs(adapted, inputs, tasks=task), base)) > TOLERANCE:
            return f"gates closed, the output differs from the base's by {off:.1e}"
    gates(adapted, 0.2)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for task in TASKS:
            for group in adapted.task_parameters(task)[:1]:
                for parameter in group["params"]:
                    noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                    parameter += 0.3 * (parameter.numel() / max(len(parameter), 1)) ** -0.5 * noise
    for task in TASKS:
        opened = outputs(adapted, inputs, tasks=task)
        if not all(torch.isfinite(t).all() for t in opened):
            return INFINITE
        if (off := difference(opened, outputs(adapted.merge(task).eval(), inputs))) > TOLERANCE:
            return f"gates open, the output differs from the merged network's by {off:.1e}"
        if adapted.conversion.layers and difference(opened, base) < 1e-6:
            return "the deltas change nothing"
    mixed = outputs(adapted, inputs, tasks=MIXED)
    axes = [batch_axis(t) for t in mixed]
    for i, task in enumerate(MIXED):
        alone = outputs(adapted, {k: sample(v, i) for k, v in inputs.items()}, tasks=task)
        for part, own, axis in zip(mixed, alone, axes, strict=True):
            if axis is not None:
                off = difference([part.select(axis, i)], [own.select(axis, 0)])
                if off > TOLERANCE:
                    return f"in a mixed batch, sample {i} differs from itself alone by {off:.1e}"
    return "no output has a batch axis" if not any(a is not None for a in axes) else None


def sample(t: Tensor, i: int) -> Tensor:
    """Sample i of an input, as a batch of one."""
    axis = batch_axis(t)
    return t if axis is None else t.narrow(axis, i, 1)


def outputs(model: Callable[..., object], inputs: dict[str, Tensor], **options: object) -> list[Tensor]:
    """The floating-point tensors that a model returns."""
    positional = {k: v for k, v in inputs.items() if k.isdigit()}
    named = {k: v for k, v in inputs.items() if not k.isdigit()}
    with torch.no_grad():
        result = model(*positional.values(), **named, **options)
    if hasattr(result, "to_tuple"):
        result = result.to_tuple()
    return [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.is_floating_point()]


def difference(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest difference, of the largest element."""
    if len(got) != len(wanted) or any(a.shape != b.shape for a, b in zip(got, wanted, strict=True)):
        return float("inf")
    worst = 0.0
    for a, b in zip(got, wanted, strict=True):
        if a.numel():
            off = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs()).max()
            size = torch.where(b.isfinite(), b.abs(), 0.0).max()
            worst = max(worst, float(off / size.clamp_min(1e-30)))
    return worst


def batch_axis(t: Tensor) -> int | None:
    """The first axis as long as the batch."""
    return next((a for a, n in enumerate(t.shape) if n == len(MIXED)), None)


def gates(adapted: TapsModel, score: float) -> None:
    """Sets every score."""
    for layer in adapted.conversion.layers.values():
        for parameter in layer.scores.values():
            parameter.data.fill_(score)


def _liven(model: nn.Module, spread: float) -> None:
    """Weights large enough that a sample is felt to the end: ``spread`` is about what a layer makes of inputs of 1.

    Parameters that start at zero (last norms of blocks, layer scales) would hide what is behind them, and small
    weights, of norms too, would let the samples fade into the biases.
    """
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() and parameter.abs().max() < 1e-3:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        for module in model.modules():
            weight = module._parameters.get("weight")
            if weight is None:
                continue
            if isinstance(module, (nn.Linear, nn.Conv2d)) and weight.numel() > 1:
                weight *= (spread / (weight[0].numel() ** 0.5 * weight.std())).clamp_min(1.0)
            elif "Norm" in type(module).__name__:
                weight *= weight.square().mean().rsqrt().clamp_min(1.0)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]


def _child(pipe, architecture: Architecture) -> None:
    pipe.send(examine(architecture))


def examine_apart(architecture: Architecture) -> Outcome | None:
    """The same in a process of its own, so that one that crashes or hangs is an outcome too."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(theirs, architecture))
    child.start()
    theirs.close()
    name = architecture.library, architecture.family, architecture.name
    try:
        if not ours.poll(SECONDS):
            return Outcome(*name, 0, "not run", reason=f"more than {SECONDS} seconds")
        return ours.recv()
    except EOFError:
        return Outcome(*name, 0, "not run", reason="its process died")
    finally:
        child.kill()
        child.join()


def read() -> dict[tuple[str, str], Outcome]:
    """The CSV, by library and name."""
    if not RESULTS.is_file():
        return {}
    with RESULTS.open(newline="") as file:
        rows = csv.DictReader(file)
        kinds = get_type_hints(Outcome)
        outcomes = [Outcome(**{name: kinds[name](value) for name, value in row.items()}) for row in rows]
    return {(o.library, o.name): o for o in outcomes}


def write(outcomes: dict[tuple[str, str], Outcome]) -> None:
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(Outcome._fields)
        rows.writerows(o._replace(share=round(o.share, 4)) for _, o in sorted(outcomes.items()))


VERDICTS = ("right", "excluded", "refused", "wrong", "not run")


def page(outcomes: Sequence[Outcome]) -> str:
    """What the CSV says, in Markdown."""
    return "\n".join(_page(sorted(outcomes))) + "\n"


def _page(outcomes: Sequence[Outcome]) -> Iterator[str]:
    yield "# Which networks TapsModel adapts"
    yield ""
    yield "Made by `python -m benchmarks.conversion` (which says what is checked) from `results/conversion.csv`."
    yield ""
    yield "| library | networks | " + " | ".join(VERDICTS) + " | right or excluded, of those that ran |"
    yield "|---" * (len(VERDICTS) + 3) + "|"
    for library in sorted({o.library for o in outcomes}):
        count = Counter(o.verdict for o in outcomes if o.library == library)
        ran = sum(count[v] for v in VERDICTS[:4])
        share = f"{(count['right'] + count['excluded']) / ran:.1%}" if ran else "–"
        yield f"| {library} | {count.total()} | " + " | ".join(str(count[v]) for v in VERDICTS) + f" | {share} |"
    yield ""
    yield "Not right, and why:"
    yield ""
    yield "| library | network | verdict | reason |"
    yield "|---|---|---|---|"
    for o in outcomes:
        if o.verdict != "right":
            yield f"| {o.library} | {o.name} | {o.verdict} | {o.reason.replace('|', chr(92) + '|')} |"
    yield ""
    yield "Right or excluded, by family, with the least share of its parameters that a task can change:"
    yield ""
    yield "| library | family | networks | share |"
    yield "|---|---|---|---|"
    families: dict[tuple[str, str], list[Outcome]] = {}
    for o in outcomes:
        if o.verdict in ("right", "excluded"):
            families.setdefault((o.library, o.family), []).append(o)
    for (library, family), members in families.items():
        yield f"| {library} | {family} | {len(members)} | {min(o.share for o in members):.0%} |"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.conversion",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("patterns", nargs="*", default=["*"], help="library:name, with * (default: all)")
    parser.add_argument("--again", action="store_true", help="also what is in the CSV already")
    parser.add_argument("--page", action="store_true", help="only make the page anew")
    chosen = parser.parse_args(argv)
    done = read()
    if not chosen.page:
        todo = [
            a
            for a in architectures.every()
            if any(fnmatch.fnmatchcase(f"{a.library}:{a.name}", p) for p in chosen.patterns)
            and (chosen.again or (a.library, a.name) not in done)
        ]
        for i, architecture in enumerate(todo, 1):
            outcome = examine_apart(architecture)
            if outcome is None:
                continue
            print(f"{i}/{len(todo)} {outcome.library}:{outcome.name} {outcome.verdict} {outcome.reason}", flush=True)
            done = read() | {(outcome.library, outcome.name): outcome}
            write(done)
    PAGE.write_text(page(list(done.values())))
    return int(any(o.verdict == "wrong" for o in done.values()))


if __name__ == "__main__":
    sys.exit(main())
