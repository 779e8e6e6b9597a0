"""Finding the axis of each layer's input that carries the batch, by running the base on one and two samples.

Forwards on samples made from the user's input: ``[a]``, ``[a, a]``, ``[a, b]``, ``[b, a]``, and ``[a, b]`` twice
more. From the first to the second, the batch axis is the one that doubles. From the second to the third, the entries
along it that change are those of sample b: the second half where a sample's entries are consecutive (windows cut out of
each image), every second one where samples alternate. The fourth must change them once more: entries that stay are in
an order of their own, sorted by what they hold. In the last two, all that a task could change of one sample, first b
and then a, is changed: what every module that tells tasks apart returns for it. Where that reaches the other sample, a
mixed batch would give it something else than a batch of its own, and is refused.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ._prepare import own_forwards
from ._slices import Slicing, dims_of
from .nn.context import Layout, Selection
from .nn.layer import TapsLayer
from .nn.per_task import PerTask

if TYPE_CHECKING:
    from ._running import RunningModel

ONE_AT_A_TIME = threading.RLock()
_MIXED = "samples are mixed in its input"
Calls = dict[str, list[Any]]
"""What was seen at each call of each module, by path."""


def batch_of(args: Any, kwargs: Any, batch: int, batch_dim: int | None = None) -> list[int | None]:
    """The batch axis of each tensor in the input (None: it has none), given that there are ``batch`` samples.

    ``batch_dim`` is said by the user. Without it, an axis counts where it is the only one of that size, or the
    first of an image [N, C, H, W].
    """
    axes: list[int | None] = []
    for leaf in tree_flatten((args, kwargs))[0]:
        fits = [a for a in range(leaf.dim()) if leaf.shape[a] == batch] if isinstance(leaf, Tensor) else []
        if len(fits) > 1:
            first = batch_dim % leaf.dim() if batch_dim is not None else 0 if leaf.dim() == 4 else None
            if first not in fits:
                raise ValueError(
                    f"TapsModel.probe: the batch axis of an input must be known, got {tuple(leaf.shape)} with "
                    f"{len(fits)} axes of size {batch} (call model.probe(..., batch_dim=...) once)"
                )
            fits = [first]
        axes.append(fits[0] if fits else None)
    if all(axis is None for axis in axes):
        raise ValueError(
            f"TapsModel: tasks must have one id a sample, got {batch} ids and no input with an axis of this size"
        )
    return axes


def probe_first(model: RunningModel, args: Any, kwargs: Any, batch: int) -> None:
    """Probes a model with its first mixed batch; threads that bring one meanwhile wait."""
    with ONE_AT_A_TIME:
        if not model.probed:
            probe(model, args, kwargs, batch_of(args, kwargs, batch))


def probe(model: RunningModel, args: Any, kwargs: Any, axes: list[int | None]) -> None:
    """Sets the layouts (and the multiply-adds) of every module of ``model`` that tells tasks apart, and `meeting`."""
    leaves, spec = tree_flatten((args, kwargs))
    located = model.conversion.located()
    with ONE_AT_A_TIME, undisturbed(model), own_forwards(model):
        try:
            model.eval()
            pairs = [(t, t) if a is None else samples(t, a) for t, a in zip(leaves, axes, strict=True)]
            one, twice, two, turned = ((batched(pairs, axes, which), spec) for which in ([0], [0, 0], [0, 1], [1, 0]))
            largest = _Largest()
            shapes, single = run(model, one, largest.see)
            grown, double = run(model, twice, lambda path, call, x, y: _digest(x, shapes, path, call))
            mixed, differing = run(model, two, lambda path, call, x, y: _digest(x, shapes, path, call))
            swapped, _ = run(model, turned, lambda path, call, x, y: _digest(x, shapes, path, call))
            _locate(located, shapes, grown, mixed, swapped)
            found = {path: [digest for _, digest in calls] for path, calls in mixed.items()}
            disturbed = [disturb(model, two, Neighbour(located, found, which)) for which in ([0, 1], [1, 0])]
        except Exception as error:
            raise ValueError(
                "TapsModel.probe: the model must run on one and on two samples of its input, got "
                f"{type(error).__name__}: {error} (call model.probe(...) with an input that it takes so)"
            ) from error
    numel = sum(leaf.numel() // leaf.shape[a] for leaf, a in zip(leaves, axes, strict=True) if a is not None)
    output_axes, apart = _outputs(single, double, differing, [output for output, _ in disturbed])
    given, made = (sum(t.nbytes for t in part if isinstance(t, Tensor)) for part in (one[0], tree_leaves(single)))
    work = largest.all_bytes / max(2 * given + 4 * made, 1)
    if _by_their_batch(model):
        output_axes = None  # a task's samples belong together
    model.slicing = Slicing(axes, dims_of(leaves), output_axes, largest.bytes / max(numel, 1), work)
    mixing = [path for path in shapes if _MIXED in (located[path].refusal or "")]
    mixing += [first for _, first in disturbed if first is not None]
    model.meeting = mixing[0] if mixing else None if apart else "its output"
    model.probed = True


def _locate(located: dict[str, Any], *forwards: Calls) -> None:
    """Layouts and multiply-adds, or why there are none, from the first four forwards."""
    shapes = forwards[0]
    for path, module in located.items():
        if isinstance(module, TapsLayer):
            module.macs = sum(outputs for _, outputs in shapes.get(path, [])) * module.fan_in
        layouts: dict[int, Layout] = {}
        refusal: str | None = None
        calls = [seen.get(path, []) for seen in forwards]
        for (shape, _), (double, before), (_, after), (_, swapped) in zip(*calls, strict=False):
            found = _layout(shape, double, before, after, swapped)
            if isinstance(found, Layout) and layouts.setdefault(len(shape), found) != found:
                found = "it is called several times, with the batch in different places"
            if isinstance(found, str):
                refusal = f"the probe could not tell: {found}"
        if refusal is None and len(set(map(len, calls))) > 1:
            refusal = "the probe could not tell: its calls depend on the batch"
        # At once and when all is known: forwards may be running in other threads.
        module.layouts, module.refusal = layouts if refusal is None else {}, refusal


def _layout(
    shape: tuple[int, ...], double: tuple[int, ...], before: Tensor | None, after: Tensor | None, swapped: Tensor | None
) -> Layout | str:
    """The layout that explains what was seen at one call, or why none does."""
    if shape == double:
        return f"its input {shape} does not grow with the batch; exclude it from the conversion"
    axis = _grown(shape, double)
    if (
        axis is None
        or before is None
        or after is None
        or swapped is None
        or not before.shape == after.shape == swapped.shape
    ):
        return f"its input goes from {shape} to {double} when the batch doubles"
    changed = ((before != after) & ~(before.isnan() & after.isnan())).nonzero().flatten().tolist()
    repeats = shape[axis]
    if 0 < len(changed) <= repeats and equal(after, swapped):
        return f"its input {double} has the samples' rows in an order that depends on them"
    outer, alternating = all(i >= repeats for i in changed), all(i % 2 for i in changed)
    if outer and repeats == 1:
        return Layout(axis, None)
    if outer != alternating:
        return Layout(axis, outer)
    if outer:
        return f"its input {double} is the same for different samples"
    if len(changed) > repeats:
        return f"{_MIXED} {double}"
    return f"its input {double} has the entries of samples in an order that is not known"


def _grown(shape: tuple[int, ...], double: tuple[int, ...]) -> int | None:
    """The only axis whose size doubled, if that is all that changed."""
    if len(shape) != len(double):
        return None
    changed = [a for a in range(len(shape)) if shape[a] != double[a]]
    return changed[0] if len(changed) == 1 and double[changed[0]] == 2 * shape[changed[0]] else None


def _digest(x: Tensor, shapes: Calls, path: str, call: int) -> tuple[tuple[int, ...], Tensor | None]:
    """x's shape, and one number for each entry along its batch axis: a random projection, so that no change cancels."""
    seen = shapes.get(path, [])
    axis = _grown(seen[call][0], tuple(x.shape)) if call < len(seen) else None
    return tuple(x.shape), None if axis is None else projected(x, axis)


def projected(x: Tensor, axis: int) -> Tensor:
    """One number for each entry of x along ``axis``."""
    flat = x.detach().movedim(axis, 0).flatten(1).double()
    weights = torch.rand(flat.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return (flat * weights.to(x.device)).sum(1)


class _Largest:
    """Shapes of one sample's calls, and the bytes that one call of a module reads and writes: the most, and all."""

    bytes = all_bytes = 0

    def see(self, path: str, call: int, x: Tensor, y: Tensor) -> tuple[tuple[int, ...], int]:
        self.bytes = max(self.bytes, x.nbytes + y.nbytes)
        self.all_bytes += x.nbytes + y.nbytes
        return tuple(x.shape), y.numel()


class Neighbour:
    """A forward in which everything a task could change of some samples is changed, and the others are watched.

    ``before`` is what `projected` gave at each call of each module where nothing was changed, ``which`` has a 1 for
    each sample that is changed and a 0 for the others.
    """

    first: str | None = None
    """The first module whose input shows the change in another sample."""

    def __init__(self, located: dict[str, Any], before: Calls, which: Sequence[int]) -> None:
        self.located, self.before, self.which = located, before, which
        self.generator = torch.Generator().manual_seed(1)

    def see(self, path: str, call: int, x: Tensor, y: Tensor) -> None:
        layout, seen = self.located[path].layouts.get(x.dim()), self.before.get(path, [])
        if self.first is not None or layout is None:
            return
        before = seen[call] if call < len(seen) else None
        after = projected(x, layout.axis)
        if before is None or before.shape != after.shape or not kept(before, after, layout, self.which):
            self.first = path

    def change(self, path: str, x: Tensor, y: Tensor) -> Tensor:
        """y with noise of its own size on the samples that are changed."""
        layout = self.located[path].layouts.get(x.dim())
        if layout is None or y.dim() <= layout.axis or y.shape[layout.axis] != x.shape[layout.axis]:
            return y
        size = y.abs().float().mean()
        noise = torch.randn(y.shape, generator=self.generator).to(y.device) * torch.where(size > 0, size, 1.0)
        rows = _entries(layout, y.shape[layout.axis], self.which).view(-1, *(1,) * (y.dim() - layout.axis - 1))
        return torch.where(rows.to(y.device), y + noise.to(y.dtype), y)


def disturb(model: RunningModel, inputs: Any, neighbour: Neighbour, seed: int = 0) -> tuple[Any, str | None]:
    """The model's output, and the first module that shows the change."""
    _, output = run(model, inputs, neighbour.see, neighbour.change, seed=seed)
    return output, neighbour.first


def _entries(layout: Layout, size: int, which: Sequence[int]) -> Tensor:
    """bool [size]: which entries along an axis are of the samples that have a 1 in ``which``."""
    chosen, repeats = torch.tensor(which) == 1, size // len(which)
    return chosen.repeat(repeats) if layout.outer is False else chosen.repeat_interleave(repeats)


def kept(before: Tensor, after: Tensor, layout: Layout, which: Sequence[int]) -> bool:
    """Whether only the samples that have a 1 in ``which`` differ along axis 0."""
    if len(before) % len(which):
        return False
    others = ~_entries(layout, len(before), which).to(before.device)
    return equal(before[others], after[others])


def equal(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def _outputs(single: Any, double: Any, differing: Any, disturbed: list[Any]) -> tuple[list[int] | None, bool]:
    """The batch axis of each tensor in the output (None unless all have one, with each sample's entries together), and
    whether samples stay apart in those that have one."""
    axes: list[int | None] = []
    apart = True
    leaves = [tree_leaves(output) for output in (single, double, differing, *disturbed)]
    for one, twice, *others in zip(*leaves, strict=False):
        tensors = all(isinstance(t, Tensor) for t in (one, twice, *others))
        axis = _grown(tuple(one.shape), tuple(twice.shape)) if tensors else None
        if axis is None or any(t.shape != twice.shape for t in others):
            axes.append(None)
            continue
        same, two, without_b, without_a = (t.movedim(axis, 0) for t in (twice, *others))
        together, alternating = (
            kept(same, two, layout, [0, 1])
            and kept(two, without_b, layout, [0, 1])
            and kept(two, without_a, layout, [1, 0])
            for layout in (Layout(axis, True), Layout(axis, False))
        )
        apart = apart and (together or alternating)
        axes.append(axis if together else None)
    known = [axis for axis in axes if axis is not None]
    return known if {len(found) for found in leaves} == {len(known)} else None, apart


def run(
    model: RunningModel,
    inputs: Any,
    see: Any,
    change: Any = None,
    *,
    seed: int = 0,
    selection: Selection | None = None,
) -> tuple[Calls, Any]:
    """One forward, on the base unless a selection is given, of ``inputs``: leaves, and how they are nested.

    ``see(path, call, x, y)`` is called for every call of every module that tells tasks apart.
    ``change(path, x, y)`` is what the module returns instead. Random numbers are the same in each forward of a seed.
    Returns what was seen, and the model's output.
    """
    calls: Calls = {}
    handles = []
    thread = threading.get_ident()

    def hook_for(path: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            if threading.get_ident() != thread:
                return None
            x = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
            record = calls.setdefault(path, [])
            record.append(see(path, len(record), x, output))
            return None if change is None else change(path, x, output)

        return hook

    try:
        for path, module in model.conversion.located().items():
            handles.append(module.register_forward_hook(hook_for(path), with_kwargs=True))
        leaves, spec = inputs
        # Objects are copied for each forward, which may change them, as a cache of keys and values.
        args, kwargs = tree_unflatten([t if isinstance(t, Tensor) else copy.deepcopy(t) for t in leaves], spec)
        torch.manual_seed(seed)
        previous = model.context.enter(selection or Selection())
        try:
            with _each_by_itself(_by_their_batch(model)):
                output = model.model(*args, **kwargs)
        finally:
            model.context.enter(previous)
    finally:
        for handle in handles:
            handle.remove()
    return calls, output


def _by_their_batch(model: RunningModel) -> list[_BatchNorm]:
    """The base's batch norms without running statistics where each task has its own."""
    own = [module for module in model.conversion.located().values() if isinstance(module, PerTask)]
    norms = [norm for module in own for norm in module.base.modules() if isinstance(norm, _BatchNorm)]
    return [norm for norm in norms if norm.running_mean is None]


@contextlib.contextmanager
def _each_by_itself(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """In this thread ``norms`` divide each entry by its own size: of a mixed batch a task's rows are by themselves."""
    thread = threading.get_ident()

    def forward_of(norm: nn.Module) -> Any:
        ordinary = norm.forward

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != thread:
                return ordinary(x, *args, **kwargs)
            size = x.square().mean(list(range(1, x.dim())), keepdim=True).add(1.0).sqrt()
            return (x / size).to(x.dtype)

        return forward

    held = [vars(norm).get("forward") for norm in norms]
    try:
        for norm in norms:
            norm.__dict__["forward"] = forward_of(norm)
        yield
    finally:
        for norm, before in zip(norms, held, strict=True):
            if before is None:
                norm.__dict__.pop("forward", None)
            else:
                norm.__dict__["forward"] = before


def samples(leaf: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """a and b, where b is the user's own second sample if it differs from the first."""
    a = leaf.detach().narrow(axis, 0, 1)
    others = (leaf.detach().narrow(axis, i, 1) for i in range(1, leaf.shape[axis]))
    b = next((other for other in others if not torch.equal(other, a)), None)
    if b is None:
        b = a + torch.randn_like(a) if a.is_floating_point() else a.roll(1, -1)
    return a, b


def batched(pairs: list[Any], axes: list[int | None], which: Sequence[int]) -> list[Any]:
    """The leaves of an input that has a for each 0 in ``which`` and b for each 1."""
    return [
        pair[0] if axis is None else torch.cat([pair[i] for i in which], axis)
        for pair, axis in zip(pairs, axes, strict=True)
    ]


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """No gradients, and everything as it was afterwards: modes, buffers, random states."""
    modes = {module: module.training for module in model.modules()}
    buffers = [(m, name, b, b.clone()) for m in modes for name, b in m._buffers.items() if b is not None]
    with torch.no_grad(), torch.random.fork_rng():
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training
            for module, name, buffer, before in buffers:
                buffer.data.copy_(before)  # through .data, so that graphs which have saved the buffer stay valid
                module._buffers[name] = buffer
