"""What a network does in training mode alone: buffers of the base that move, samples that meet or change places.

The first forward in training mode finds the former, the first mixed one the latter, each by forwards without gradients
after which everything is as it was.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves

from . import _probe, store
from ._folder import base_tensors
from ._probe import ONE_AT_A_TIME, Neighbour, equal, undisturbed
from ._slices import dims_of
from .nn.context import Layout, Selection
from .nn.per_task import of_base

if TYPE_CHECKING:
    from ._running import RunningModel

_LOOKS = ([0, 0, 0, 0, 1, 1, 1, 1], [0, 1, 0, 1, 0, 1])
"""Which samples are changed. Of random orders 1 in 70 leaves all that are, or are not, among themselves in the first,
1 in 20 in the second."""


def settle(model: RunningModel, selection: Selection, args: Any, kwargs: Any) -> None:
    """Lets modules of the base whose buffers training would move rest in eval mode, and says so.

    Where no module of the base has buffers, as in most networks, it runs nothing.
    """
    with ONE_AT_A_TIME:
        if model.settled:
            return
        inputs = tree_flatten((args, kwargs))
        selection = selection if selection.mix is None else Selection()
        stateful = any(module.training and module._buffers for _, module in of_base(model.model))
        moving = _moving(model, inputs, selection) if stateful else {}
        for path, names in moving.items():
            model.conversion.let_rest(path, model.model.get_submodule(path), names)
        still = _moving(model, inputs, selection) if moving else {}
        model.settled = True
    for path, names in {**moving, **still}.items():
        name, kind = path or "the model", type(model.model.get_submodule(path)).__name__
        what = f"TapsModel: {name} ({kind}) must leave what all tasks share as it is, got one that moves {names}"
        if path in still:
            warnings.warn(f"{what} in each forward, in eval mode too: each moves the base of all tasks", stacklevel=5)
        else:
            warnings.warn(f"{what} in training; from now on it runs in eval mode", stacklevel=5)


def _moving(model: RunningModel, inputs: Any, selection: Selection) -> dict[str, str]:
    """By path: which buffers of each module of the base one forward moves. A cache that grows does not count."""
    held = {
        (path, name): (module, buffer.clone())
        for path, module in of_base(model.model)
        for name, buffer in module._buffers.items()
        if buffer is not None and buffer.layout == torch.strided and buffer.numel()
    }
    found: dict[str, list[str]] = {}
    with undisturbed(model):
        _probe.run(model, inputs, lambda *_: None, selection=selection)
        for (path, name), (module, before) in held.items():
            now = module._buffers.get(name)
            if now is not None and now.shape == before.shape and not equal(before, now.to(before.device)):
                found.setdefault(path, []).append(name)
    return {path: ", ".join(names) for path, names in found.items()}


def look(model: RunningModel, args: Any, kwargs: Any, count: int) -> None:
    """Sets `meeting_in_training`: as `probe`, in the modes that the modules are in, with random orders in mind.

    Eight samples and six: what is changed of some, in the input and in all that a task could change, must be seen at
    their own places alone.
    """
    leaves, spec = tree_flatten((args, kwargs))
    with ONE_AT_A_TIME, undisturbed(model):
        if model.looked:
            return
        try:
            slicing = model.slicing
            alike = slicing is not None and dims_of(leaves) == slicing.input_dims
            axes = slicing.input_axes if slicing is not None and alike else _probe.batch_of(args, kwargs, count)
            pairs = [(t, t) if a is None else _probe.samples(t, a) for t, a in zip(leaves, axes, strict=True)]
            same = [(_probe.batched(pairs, axes, [0] * len(which)), spec) for which in _LOOKS]
            changed = [(_probe.batched(pairs, axes, which), spec) for which in _LOOKS]
            seen = [_seen(model, inputs, seed) for seed, inputs in enumerate(same)]
            for seed, which in enumerate(_LOOKS):
                calls, output = seen[seed]
                neighbour = Neighbour(model.conversion.located(), calls, which)
                other, first = _probe.disturb(model, changed[seed], neighbour, seed)
                if first is None and not _apart(output, other, seen[1 - seed][1], which):
                    first = "its output"
                # What is not the same twice, such as random numbers that are not torch's, tells nothing.
                if first is not None and _repeats(seen[seed], _seen(model, same[seed], seed)):
                    model.meeting_in_training = first
                    break
        except Exception as error:
            warnings.warn(
                "TapsModel: samples of a mixed batch must stay apart in training mode too, got a model that cannot be "
                f"run on {len(_LOOKS[0])} samples to see it: {type(error).__name__}: {error}",
                stacklevel=3,
            )
        model.looked = True


def _seen(model: RunningModel, inputs: Any, seed: int) -> tuple[dict[str, list[Any]], Any]:
    """What `Neighbour` compares with, and the output, where nothing is changed."""
    located = model.conversion.located()

    def see(path: str, call: int, x: Tensor, y: Tensor) -> Tensor | None:
        layout = located[path].layouts.get(x.dim())
        return None if layout is None else _probe.projected(x, layout.axis)

    return _probe.run(model, inputs, see, seed=seed)


def _apart(before: Any, after: Any, of_others: Any, which: Sequence[int]) -> bool:
    """Whether only the samples that are changed differ in every tensor that has an axis for samples.

    ``of_others`` is the output of another number of samples: the axis in which it differs is theirs.
    """
    for old, new, other in zip(*map(tree_leaves, (before, after, of_others)), strict=False):
        if not all(isinstance(t, Tensor) for t in (old, new, other)) or old.dim() != other.dim():
            continue
        axes = [a for a in range(old.dim()) if old.shape[a] != other.shape[a]]
        if len(axes) != 1 or old.shape != new.shape:
            continue
        moved = old.movedim(axes[0], 0), new.movedim(axes[0], 0)
        if not any(_probe.kept(*moved, Layout(axes[0], outer), which) for outer in (True, False)):
            return False
    return True


def _repeats(first: tuple[dict[str, list[Any]], Any], second: tuple[dict[str, list[Any]], Any]) -> bool:
    pairs = list(zip(tree_leaves(first), tree_leaves(second), strict=False))
    tensors = [(a, b) for a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor)]
    return all(a.shape == b.shape and equal(a, b) for a, b in tensors)


def note_buffers(model: RunningModel, _: object = None) -> None:
    """Notes which buffers the base has now, as it was given or loaded."""
    model.given = _checksums(model)


def check_buffers(model: RunningModel) -> None:
    """Warns of buffers of the base that are not what was given: another dtype alone does not count."""
    now = _checksums(model)
    moved = [name for name, was in model.given.items() if name in now and _differ(was, now[name])]
    if moved:
        warnings.warn(
            "TapsModel.save_task: the base must be as it was given for this folder to be loaded over it, got buffers "
            f"that have moved since: {', '.join(moved)} (save the state_dict too, which brings them back)",
            stacklevel=3,
        )


def _differ(was: dict[str, Any], now: dict[str, Any]) -> bool:
    return was["dtype"] == now["dtype"] and was != now


def _checksums(model: RunningModel) -> dict[str, Any]:
    found = {
        name: tensor
        for name, tensor in base_tensors(model.model)
        if type(tensor) is Tensor and not tensor.is_meta and tensor.layout == torch.strided
    }
    return store.checksums(found)
