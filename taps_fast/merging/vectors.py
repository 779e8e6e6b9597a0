"""`TaskVectors`: a base and K deltas for each of its tensors, which every merging method starts from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from .. import store
from .._names import counted, covers, nearest
from .checkpoints import FINGERPRINT, Checkpoint, Source
from .fold import fold

MOST_NAMED = 3  # tensors that an error names


class TaskVectors:
    """A base's tensors and, for each that a checkpoint changed, K deltas ``checkpoint - base``.

    Attributes:
        tasks: the K checkpoints' names.
        base: every tensor that is not ``own``, by name.
        deltas: K tensors for each name that is merged, in the base's dtype.
        kept: names that are the base's in every merged model: tensors that no checkpoint changed, and integers and
            booleans (such as ``num_batches_tracked``), which no coefficient can weigh.
        own: the tensors of each task that are not merged (its head), by task and name.

    A delta is `checkpoint - base` rounded once to their dtype. Running statistics of norms are tensors like others.

    >>> vectors = TaskVectors({"w": torch.zeros(2)}, {"w": [torch.ones(2), torch.full((2,), 3.0)]}, ["a", "b"])
    >>> vectors.fold(torch.tensor([1.0, 0.5]))["w"]
    tensor([2.5000, 2.5000])
    """

    def __init__(
        self,
        base: Mapping[str, Tensor],
        deltas: Mapping[str, Sequence[Tensor]],
        tasks: Sequence[str],
        own: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        self.base = dict(base)
        self.deltas = {name: list(each) for name, each in deltas.items()}
        self.tasks = list(tasks)
        self.own = {task: dict((own or {}).get(task, {})) for task in self.tasks}
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"TaskVectors: tasks must be different names, got {self.tasks}")
        for name, each in self.deltas.items():
            if name not in self.base or len(each) != len(self.tasks):
                raise ValueError(
                    f"TaskVectors: deltas must be {len(self.tasks)} for a tensor of base, got {len(each)} for {name!r}"
                )

    @classmethod
    def from_checkpoints(
        cls,
        base: Source,
        checkpoints: Sequence[Source] | Mapping[str, Source],
        *,
        own: Iterable[str] = (),
        progress: Callable[[str], None] | None = None,
    ) -> TaskVectors:
        """Reads a base and K fine-tuned checkpoints of it, a tensor at a time.

        Args:
            base: a safetensors or PyTorch file (read with ``weights_only``), a ``save_pretrained`` folder, or a
                state dict.
            checkpoints: K of the same kinds; a mapping names the tasks (default: "0", "1", ...).
            own: names that belong to each task and are not merged, such as ``"head"``: globs, each with what lies
                below it. The tensors may differ in shape and need not be in the base.
            progress: called with each tensor's name as it is read.

        Returns:
            Task vectors whose memory is the base and K deltas, shared with nobody: what is given as a state dict is
            copied. While reading, one tensor of one checkpoint more.

        Raises:
            ValueError: tensors that differ in name, shape or dtype (the first are named), a delta that is not
                finite, a checkpoint that says it is of another base, ``own`` that names no tensor.
            TypeError: what is none of these kinds, such as a module.
            FileNotFoundError: a file or folder that is not there.
        """
        named = checkpoints if isinstance(checkpoints, Mapping) else {str(i): c for i, c in enumerate(checkpoints)}
        first = Checkpoint(base)
        others = {task: Checkpoint(source) for task, source in named.items()}
        patterns = _patterns(own, {name: None for c in (first, *others.values()) for name in c.names})
        names = [n for n in first.names if not _matches(n, patterns)]
        for other in others.values():
            _same_names(first, other, [n for n in other.names if not _matches(n, patterns)], names)
        merged: dict[str, Tensor] = {}
        deltas: dict[str, list[Tensor]] = {}
        for name in names:
            if progress is not None:
                progress(name)
            merged[name] = start = first.own(name)
            each = [_delta(name, start, other) for other in others.values()]
            if start.is_floating_point() and any(bool(delta.any()) for delta in each):
                deltas[name] = each
        _same_base(others, merged)
        mine = {t: {n: c.own(n) for n in c.names if _matches(n, patterns)} for t, c in others.items()}
        return cls(merged, deltas, list(others), mine)

    def __len__(self) -> int:
        """K."""
        return len(self.tasks)

    def __repr__(self) -> str:
        own = ", ".join(f"{task!r}: {len(mine)}" for task, mine in self.own.items() if mine)
        return (
            f"TaskVectors(tasks={self.tasks}, {counted(len(self.deltas), 'tensor')} merged, {len(self.kept)} kept"
            f"{f', own {{{own}}}' if own else ''})"
        )

    @property
    def names(self) -> list[str]:
        """The tensors that are merged; a table of coefficients [L, K] has their order."""
        return list(self.deltas)

    @property
    def kept(self) -> list[str]:
        """The tensors that are the base's in every merged model; see above for which."""
        return [name for name in self.base if name not in self.deltas]

    def index(self, task: str) -> int:
        """The place of a task, which is its coefficient's."""
        if task not in self.tasks:
            raise ValueError(f"TaskVectors: task must be one of {', '.join(self.tasks)}, got {task!r}")
        return self.tasks.index(task)

    def fold(
        self,
        coeffs: Tensor | float | Sequence[float],
        *,
        parts: Mapping[str, Tensor] | None = None,
        masks: Mapping[str, Tensor] | None = None,
        names: Sequence[str] | None = None,
    ) -> dict[str, Tensor]:
        """A merged state dict: base + mask ∘ Σ_k coeffs·delta, and copies of the kept tensors.

        Args:
            coeffs: one number, [K], [L, K] or with parts [L, P, K]; see `fold`.
            parts, masks: by name, one for each merged tensor.
            names: only these of the merged tensors, in this order, and none of the kept.

        Raises:
            ValueError, TypeError: as `fold`.
        """
        chosen = self.names if names is None else list(names)
        table = torch.as_tensor(coeffs, dtype=None if isinstance(coeffs, Tensor) else torch.float32)
        if table.dim() == 0:
            table = table.expand(len(self.tasks))
        if table.dim() > 1 and len(table) != len(chosen):
            raise ValueError(f"fold: coeffs must be a row for each of {len(chosen)} tensors, got {tuple(table.shape)}")
        state = copies({name: self.base[name] for name in self.kept} if names is None else {})
        groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for l, name in enumerate(chosen):
            groups.setdefault((self.base[name].dtype, self.base[name].device), []).append(l)
        for rows in groups.values():
            some = [chosen[l] for l in rows]
            whole = table.dim() == 1 or len(rows) == len(table) == len(chosen)
            weights = fold(
                [self.base[n] for n in some],
                [self.deltas[n] for n in some],
                table if whole else table[rows],
                parts=None if parts is None else [parts[n] for n in some],
                masks=None if masks is None else [masks[n] for n in some],
            )
            state |= dict(zip(some, weights, strict=True))
        return state

    def expert(self, task: str) -> dict[str, Tensor]:
        """The state dict of one fine-tuned model: base + delta, and its own tensors."""
        one = torch.zeros(len(self.tasks))
        one[self.index(task)] = 1.0
        return self.fold(one) | copies(self.own[task])

    def map(self, change: Callable[[str, list[Tensor]], Sequence[Tensor]]) -> TaskVectors:
        """Task vectors with ``change(name, deltas)`` for the deltas of each tensor, one tensor at a time."""
        with torch.no_grad():
            deltas = {name: list(change(name, each)) for name, each in self.deltas.items()}
        tasks = self.tasks
        if deltas and len(next(iter(deltas.values()))) != len(tasks):
            return TaskVectors(self.base, deltas, ["merged"])
        return TaskVectors(self.base, deltas, tasks, self.own)

    def fingerprint(self) -> str:
        """The identity of the base, without what is ``own``."""
        return store.fingerprint(self.base)

    def to(self, device: torch.device | str) -> TaskVectors:
        """The same on another device."""
        return self.moved(lambda t: t.to(device))

    def moved(self, move: Callable[[Tensor], Tensor]) -> TaskVectors:
        """The same with ``move(tensor)``, in another place or dtype, for every tensor."""
        return TaskVectors(
            {n: move(t) for n, t in self.base.items()},
            {n: [move(t) for t in each] for n, each in self.deltas.items()},
            self.tasks,
            {task: {n: move(t) for n, t in mine.items()} for task, mine in self.own.items()},
        )


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same in memory of its own; names of one tensor still name one."""
    made = {id(t): t.clone() for t in {id(t): t for t in tensors.values()}.values()}
    return {name: made[id(t)] for name, t in tensors.items()}


def _patterns(own: Iterable[str], names: Iterable[str]) -> list[str]:
    """Globs of names; each must match something."""
    patterns = [own] if isinstance(own, str) else list(own)
    for pattern in patterns:
        if not any(covers(pattern, name) for name in names):
            tops = list(dict.fromkeys(name.partition(".")[0] for name in names))
            raise ValueError(
                f"TaskVectors.from_checkpoints: own must match a tensor, got {pattern!r} "
                f"({nearest(pattern.removesuffix('.*'), tops)})"
            )
    return patterns


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(covers(pattern, name) for pattern in patterns)


def _same_names(base: Checkpoint, other: Checkpoint, found: Sequence[str], wanted: Sequence[str]) -> None:
    for what, missing in (
        ("have every tensor of the base", [n for n in wanted if n not in set(found)]),
        ("have no tensor that the base lacks", [n for n in found if n not in set(wanted)]),
    ):
        if missing:
            more = f" and {len(missing) - MOST_NAMED} more" if len(missing) > MOST_NAMED else ""
            verb = "none" if what.startswith("have every") else "them"
            raise ValueError(
                f"TaskVectors.from_checkpoints: {other.label} must {what}, got {verb} of "
                f"{', '.join(map(repr, missing[:MOST_NAMED]))}{more} (base: {base.label}; own= excludes names)"
            )


def _delta(name: str, start: Tensor, other: Checkpoint) -> Tensor:
    tensor = other.get(name)
    for what, wanted, got in (
        ("shape", tuple(start.shape), tuple(tensor.shape)),
        ("dtype", start.dtype, tensor.dtype),
    ):
        if wanted != got:
            raise ValueError(
                f"TaskVectors.from_checkpoints: {name!r} must have the base's {what}, {wanted}, got {got} "
                f"({other.label})"
            )
    if not start.is_floating_point():
        return start
    tensor = tensor.to(start.device)
    delta = tensor - start
    if not bool(delta.isfinite().all()):
        delta[tensor == start] = 0  # such as the -inf of an attention mask
        if wrong := int((~delta.isfinite()).sum()):
            raise ValueError(
                f"TaskVectors.from_checkpoints: {name!r} must differ from the base by finite numbers, got {wrong} that "
                f"are not ({other.label})"
            )
    return delta.contiguous()


def _same_base(others: Mapping[str, Checkpoint], base: Mapping[str, Tensor]) -> None:
    said = {task: c.metadata[FINGERPRINT] for task, c in others.items() if FINGERPRINT in c.metadata}
    if said:
        mine = store.fingerprint(base)
        for task, theirs in said.items():
            if theirs != mine:
                raise ValueError(
                    f"TaskVectors.from_checkpoints: {others[task].label} must be of this base, {mine}, got one of "
                    f"{theirs}"
                )
