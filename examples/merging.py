"""Four image tasks, fully fine-tuned from one network and merged back into one by each method.

    python examples/merging.py [--steps 40] [--epochs 5] [--out examples/merging_results.md]

Beside each method runs the way it is published, written out in plain PyTorch in this file: whole state dicts or flat
vectors for the static methods; for the trained ones a chain of K sums a tensor in autograd, one task after the other.
Accuracy is on the test images; trained methods see those without labels, as in their papers (aTLAS: training labels).
Needs the demo's packages: pip install '.[demo]' in a checkout. Norms keep the pretrained statistics while fine-tuning.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import functools
import gc
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from taps_fast import merging
from taps_fast.demo import data, train
from taps_fast.merging import TaskVectors

HEAD = train.HEAD
State = dict[str, Tensor]
States = dict[str, State]  # by task


def fine_tuned(base: nn.Module, task: data.Task, plan: train.Plan) -> nn.Module:
    """Every weight moves, under AdamW and one cycle; norms stay in eval mode."""
    model = copy.deepcopy(base).eval().requires_grad_()
    torch.manual_seed(plan.seed)
    setattr(model, HEAD, nn.Linear(model.get_submodule(HEAD).in_features, task.classes))
    steps = plan.epochs * train.STEPS
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    for x, y in batches(task.train, train.BATCH, steps, plan.seed):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        schedule.step()
    return model.requires_grad_(False)


def batches(split: data.Split, size: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(split.labels), (size,), generator=draw)
        yield split.images[rows], split.labels[rows]


# The published ways, restated. ``theirs_*`` take the base, the fine-tuned state dicts and the shared tensors' names.


def theirs_arithmetic(base: State, tuned: States, names: list[str], scale: float = 0.3) -> State:
    vectors = [{n: state[n] - base[n] for n in names} for state in tuned.values()]
    total = {n: sum(v[n] for v in vectors) for n in names}
    return {n: base[n] + scale * total[n] for n in names}


def flat(base: State, tuned: States, names: list[str]) -> tuple[Tensor, Tensor]:
    vectors = [torch.cat([(state[n] - base[n]).flatten() for n in names]) for state in tuned.values()]
    return torch.cat([base[n].flatten() for n in names]), torch.stack(vectors)


def unflat(vector: Tensor, base: State, names: list[str]) -> State:
    parts = vector.split([base[n].numel() for n in names])
    return {n: part.view_as(base[n]) for n, part in zip(names, parts, strict=True)}


def trimmed(tau: Tensor, density: float = 0.2) -> Tensor:
    limit = tau.abs().kthvalue(tau.shape[1] - int(density * tau.shape[1]), 1, keepdim=True).values
    return tau * (tau.abs() > limit)


def theirs_ties(base: State, tuned: States, names: list[str]) -> State:
    start, tau = flat(base, tuned, names)
    tau = trimmed(tau)
    sign = tau.sum(0).sign()
    tau = torch.where(tau.sign() == sign, tau, torch.zeros_like(tau))
    return unflat(start + tau.sum(0) / (tau != 0).sum(0).clamp(min=1), base, names)


def theirs_lines(base: State, tuned: States, names: list[str]) -> State:
    total = theirs_arithmetic(base, tuned, names, 1.0)
    depth = merging.block_depths(names)
    last = max(depth.values())
    return {n: base[n] + (0.1 + 0.4 * depth[n] / last) * (total[n] - base[n]) for n in names}


def theirs_tall(base: State, tuned: States, names: list[str]) -> States:
    start, tau = flat(base, tuned, names)
    total = tau.sum(0)
    masks = [tau[k].abs() > 0.4 * (total - tau[k]).abs() for k in range(len(tau))]
    return {t: unflat(start + m * total, base, names) for t, m in zip(tuned, masks, strict=True)}


def theirs_consensus(base: State, tuned: States, names: list[str]) -> State:
    start, tau = flat(base, tuned, names)
    total = tau.sum(0)
    votes = sum((tau[k].abs() > 0.4 * (total - tau[k]).abs()).int() for k in range(len(tau)))
    return unflat(start + 0.3 * (votes >= 2) * total, base, names)


def theirs_emr(base: State, tuned: States, names: list[str]) -> States:
    start, tau = flat(base, tuned, names)
    sign = tau.sum(0).sign()
    unified = sign * torch.where(tau.sign() == sign, tau.abs(), torch.zeros_like(tau)).amax(0)
    found = {}
    for task, vector in zip(tuned, tau, strict=True):
        part = unified * (vector * unified > 0)
        found[task] = unflat(start + vector.abs().sum() / part.abs().sum() * part, base, names)
    return found


def theirs_fusion(base: State, tuned: States, names: list[str]) -> State:
    start, tau = flat(base, tuned, names)
    share = tau.abs() / tau.abs().sum(0).clamp(min=1e-30)
    return unflat(start + (share * tau).sum(0), base, names)


def theirs_doge(base: State, tuned: States, names: list[str], scale: float, steps: int) -> State:
    merged = {n: base[n] for n in names}
    matrices = [n for n in names if base[n].dim() > 1]
    _, tau = flat(base, tuned, matrices)
    masks = [
        unflat((t.abs() >= t.abs().kthvalue(len(t) - int(0.3 * len(t))).values).float(), base, matrices) for t in tau
    ]
    for name in matrices:
        vectors = torch.stack([(state[name] - base[name]).flatten(1) for state in tuned.values()])
        lam = scale / vectors.norm(dim=(1, 2), keepdim=True)
        rank, share = min(vectors.shape[1:]), min(vectors.shape[1:]) // len(tuned)
        left = torch.cat([torch.linalg.svd(v, full_matrices=False)[0][:, :share] for v in vectors], 1)
        space = torch.linalg.svd(left, full_matrices=False)[0][:, : rank // 6]
        delta = torch.zeros_like(vectors[0], requires_grad=True)
        optimizer = torch.optim.Adam([delta], lr=1e-4)
        for _ in range(steps):
            total = sum(
                (v * v - v * (lam * vectors).sum(0) - v * (lam * delta).sum(0)).sum(1).square().sum() for v in vectors
            )
            optimizer.zero_grad()
            total.backward()
            delta.grad -= space @ space.T @ delta.grad
            optimizer.step()
        kept = torch.stack([m[name].flatten(1) for m in masks])
        merged[name] = base[name] + (lam * kept * (vectors + delta.detach())).sum(0).view_as(base[name])
    return merged


class Chain:
    """Coefficients trained over K sums a tensor, each task's model run on its own."""

    def __init__(
        self, model: nn.Module, base: State, tuned: States, names: list[str], layer: bool, init: float
    ) -> None:
        self.model, self.base, self.names, self.layer = copy.deepcopy(model), base, names, layer
        self.model.set_submodule(HEAD, nn.Identity())
        self.heads = {t: [state[f"{HEAD}.{n}"].clone() for n in ("weight", "bias")] for t, state in tuned.items()}
        self.deltas = [{n: state[n] - base[n] for n in names} for state in tuned.values()]
        self.coeffs = torch.full((len(names), len(tuned)) if layer else (len(tuned),), init, requires_grad=True)

    def weights(self, clamp: bool = True) -> State:
        c = self.coeffs.clamp(0, 1) if clamp else self.coeffs
        merged = {}
        for l, name in enumerate(self.names):
            weight = self.base[name]
            for k, delta in enumerate(self.deltas):
                weight = weight + (c[l, k] if self.layer else c[k]) * delta[name]
            merged[name] = weight
        return merged

    def run(self, weights: State, task: str, x: Tensor) -> Tensor:
        return F.linear(functional_call(self.model, weights, x), *self.heads[task])

    def states(self, clamp: bool = True) -> States:
        with torch.no_grad():
            weights = self.weights(clamp)
        own = {t: {f"{HEAD}.{n}": v.detach() for n, v in zip(("weight", "bias"), h, strict=True)}
               for t, h in self.heads.items()}  # fmt: skip
        return {task: weights | own[task] for task in self.heads}


def theirs_trained(
    method: str, model: nn.Module, base: State, tuned: States, names: list[str], stream: Callable[[], Iterator]
) -> States:
    if method == "AdaMerging++":
        start, tau = flat(base, tuned, names)
        tau = trimmed(tau)
        kept = tau * (tau.sign() == tau.sum(0).sign())
        own = {t: {n: v for n, v in s.items() if n.startswith(HEAD)} for t, s in tuned.items()}
        tuned = {t: unflat(start + v, base, names) | own[t] for t, v in zip(tuned, kept, strict=True)}
    tinting, atlas = method.startswith("Tinting"), method == "aTLAS"
    chain = Chain(model, base, tuned, names, method != "AdaMerging, task-wise", 0.0 if atlas else 0.3)
    groups = [{"params": [chain.coeffs], "lr": 1e-2}]
    if tinting:
        experts = {t: {n: s[n] for n in names} for t, s in tuned.items()}
        first = {t: [v.clone() for v in head] for t, head in chain.heads.items()}
        mine = [v.requires_grad_() for head in chain.heads.values() for v in head]
        groups.append({"params": mine, "lr": 1e-3})
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-2 if atlas else 0.0)
    for batch in stream():
        weights, total = chain.weights(not atlas), torch.zeros(())
        for task, x in batch.items():
            if atlas:
                total = total + F.cross_entropy(chain.run(weights, task, x[0]), x[1])
                continue
            y = chain.run(weights, task, x)
            p = y.softmax(-1)
            if tinting:
                with torch.no_grad():
                    teacher = F.linear(functional_call(chain.model, experts[task], x), *first[task]).softmax(-1)
                losses = F.cross_entropy(y, teacher.argmax(-1), reduction="none")
                if method == "Tinting++":
                    losses = losses[~((p.argmax(-1) != teacher.argmax(-1)) & (p.amax(-1) > teacher.amax(-1)))]
                total = total + (losses.mean() if len(losses) else 0.0 * y.sum())
            else:
                total = total - (p * p.log()).sum(-1).mean()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    return chain.states(not atlas)


def resident(line: str) -> int:
    with open("/proc/self/status") as file:
        return int(re.search(rf"^{line}:\s*(\d+) kB", file.read(), re.MULTILINE)[1]) << 10


def watched(run: Callable[[], object]) -> tuple[object, float, float]:
    """The result, seconds, and MiB of memory at most beyond what there was (nan where the system cannot say)."""
    gc.collect()
    linux = os.path.isfile("/proc/self/clear_refs")
    if linux and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # or the next method finds what the last one left
    before = resident("VmRSS") if linux else 0
    if linux:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    start = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - start
    return result, seconds, (resident("VmHWM") - before) / 2**20 if linux else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="of the trained methods")
    parser.add_argument("--images", type=int, default=16, help="of each task in a step")
    parser.add_argument("--epochs", type=int, default=5, help="of fine-tuning, of 12 steps of 32 images each")
    parser.add_argument("--size", type=int, default=64, help="pixels a side")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("merging_results.md"))
    args = parser.parse_args()
    plan = train.Plan(args.epochs, 0.0, args.seed, args.size, torch.device("cpu"))
    tasks = {name: data.load(name, args.size, args.seed) for name in data.TASKS}
    network = train.backbone(plan).requires_grad_(False).to(memory_format=torch.contiguous_format)
    base = network.state_dict()
    start = time.perf_counter()
    tuned = {name: fine_tuned(network, task, plan).state_dict() for name, task in tasks.items()}
    print(f"fine-tuned {len(tuned)} networks in {time.perf_counter() - start:.0f} s", flush=True)

    vectors = TaskVectors.from_checkpoints(base, tuned, own=f"{HEAD}.*")
    names = vectors.names

    def accuracies(states: State | States) -> list[float]:
        found = []
        for name, task in tasks.items():
            own = {n: t for n, t in tuned[name].items() if n.startswith(HEAD)}
            state = states[name] if name in states else states
            model = copy.deepcopy(network)
            setattr(model, HEAD, nn.Linear(model.get_submodule(HEAD).in_features, task.classes))
            model.load_state_dict(base | own | state)
            found.append(train.accuracy(model, task.test, plan.device))
        return found

    def stream(labels: bool = False) -> Iterator:
        each = {
            name: batches(task.train if labels else task.test, args.images, args.steps, args.seed)
            for name, task in tasks.items()
        }
        for _ in range(args.steps):
            batch = {name: next(images) for name, images in each.items()}
            yield batch if labels else {name: pair[0] for name, pair in batch.items()}

    def states(merged: merging.MergedModel) -> States:
        return {name: merged.state(name) for name in tasks}

    def masked(merged: merging.MaskedDelta) -> States:
        return {name: merged.state(name) for name in tasks}

    call = functools.partial
    trained = dict(head=HEAD, lr=1e-2)
    ada = call(merging.adamerging, network, vectors, **trained)
    methods: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "task arithmetic, 0.3": (lambda: merging.task_arithmetic(vectors), call(theirs_arithmetic, base, tuned, names)),
        "TIES": (lambda: merging.ties(vectors), call(theirs_ties, base, tuned, names)),
        "LiNeS, 0.1 to 0.5": (lambda: merging.lines(vectors, 0.1, 0.4), call(theirs_lines, base, tuned, names)),
        "Consensus, 0.3": (lambda: merging.consensus(vectors), call(theirs_consensus, base, tuned, names)),
        "DOGE, 100 steps": (
            lambda: merging.doge(vectors, steps=100),
            call(theirs_doge, base, tuned, names, 0.07, 100),
        ),
        "fusion by |Δ|": (lambda: merging.fusion(vectors), call(theirs_fusion, base, tuned, names)),
        "TALL-masks": (lambda: masked(merging.tall_masks(vectors)), call(theirs_tall, base, tuned, names)),
        "EMR": (lambda: masked(merging.emr(vectors)), call(theirs_emr, base, tuned, names)),
        "AdaMerging, task-wise": (lambda: states(ada(stream(), coeffs="task")), None),
        "AdaMerging, layer-wise": (lambda: states(ada(stream())), None),
        "AdaMerging++": (lambda: states(ada(stream(), plus_plus=True)), None),
        "aTLAS": (lambda: states(merging.atlas(network, vectors, stream(True), head=HEAD)), None),
        "Tinting": (lambda: states(merging.tinting(network, vectors, stream(), **trained)), None),
        "Tinting++": (lambda: states(merging.tinting(network, vectors, stream(), plus_plus=True, **trained)), None),
    }
    lines = [
        "# Four tasks merged into one network",
        "",
        f"`python examples/merging.py --steps {args.steps} --images {args.images} --epochs {args.epochs} "
        f"--seed {args.seed}` on {time.strftime('%Y-%m-%d')}: EfficientNet-Lite0 from ImageNet at {args.size} pixels, "
        f"{len(names)} tensors merged, base {sum(t.nbytes for t in base.values()) / 2**20:.0f} MiB, PyTorch "
        f"{torch.__version__}, {torch.get_num_threads()} threads. Accuracy on test images, %. *Published* is the same "
        "method as it is published, restated in that file. Memory is MiB at most beyond base, fine-tuned networks and "
        "task vectors, which are there before.",
        "",
        f"| method | way | {' | '.join(tasks)} | mean | seconds | memory, MiB |",
        f"|---|---|{'---|' * len(tasks)}---|---|---|",
    ]
    print("\n".join(lines[-2:]))

    def row(method: str, way: str, found: list[float], seconds: str = "", memory: str = "") -> None:
        cells = [f"{100 * a:.1f}" for a in (*found, sum(found) / len(found))]
        lines.append(f"| {method} | {way} | {' | '.join(cells)} | {seconds} | {memory} |")
        print(lines[-1], flush=True)

    row("fine-tuned, one network each", "", accuracies({name: tuned[name] for name in tasks}))
    row("base with the tasks' heads", "", accuracies(vectors.fold(0.0)))
    for method, (mine, theirs) in methods.items():
        if theirs is None:
            labelled = call(stream, method == "aTLAS")
            theirs = call(theirs_trained, method, network, base, tuned, names, labelled)
        for way, run in (("ours", mine), ("published", theirs)):
            result, seconds, memory = watched(run)
            row(method, way, accuracies(result), f"{seconds:.2f}", f"{memory:.0f}")
            del result
    args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
