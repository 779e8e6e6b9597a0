"""One task of a `TapsModel` as an ordinary network."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from torch import nn

from . import _closures
from ._prepare import detach_regions
from .convert import computed
from .nn.per_task import PerTask, released
from .nn.stand_in import carry

if TYPE_CHECKING:
    from ._running import RunningModel


def plain_network(model: RunningModel, task: str | None) -> nn.Module:
    """A copy of ``model.model`` with the weights of ``task`` (None: the base) in modules of their original types."""
    with model.turns.forward():
        return _plain_network(model, task)


def _plain_network(model: RunningModel, task: str | None) -> nn.Module:
    memo = computed(model.model)
    give_modules = _closures.follow(model.model, memo)
    for layer in model.conversion.layers.values():
        memo[id(layer)] = layer.merged(task)
    for attention in model.conversion.attentions.values():
        memo[id(attention)] = attention.merged(task)
    for module in model.model.modules():
        if isinstance(module, PerTask):
            memo[id(module)] = copy.deepcopy(module.of(task), memo)
    if model.prepared is not None:
        memo |= {id(region): region for region in model.prepared.regions}
    plain: nn.Module = copy.deepcopy(model.model, memo)
    for adapted in (*model.conversion.layers.values(), *model.conversion.attentions.values()):
        carry(memo[id(adapted)], adapted.taken, memo)  # type: ignore[arg-type]
    give_modules()
    plain._load_state_dict_pre_hooks.pop(model.parting.id, None)
    detach_regions(plain)
    for path, attribute, value in model.conversion.restored:
        setattr(plain.get_submodule(path), attribute, value)
    for parameter in plain.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return released(plain).train(model.training)
