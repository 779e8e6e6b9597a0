"""What an adapted layer is to code that takes it for an ordinary one: attributes, weight and bias, state dicts."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from .context import Located
from .mixed_weight import MixedWeight
from .owned import Owned

_Layer = TypeVar("_Layer", bound=nn.Module)
OF_EVERY_MODULE = frozenset([*vars(nn.Module()), "_compiled_call_impl"])
"""Attributes that say nothing of the kind of module: tensors, children, hooks, the mode, what it was compiled to."""


class StandIn(Located, nn.Module):
    """The part of `TapsLayer` that stands in for the ordinary layer, in which ``weight`` and ``bias`` are effective."""

    base: Tensor
    base_bias: Tensor | None
    _stored = {"weight": "base", "bias": "base_bias"}
    """Where the parameters of the ordinary layer are kept."""
    taken: Sequence[str] = ()
    """The attributes that are those of the ordinary layer."""
    deltas: Owned
    bias_deltas: Owned
    scores: Owned

    def _take(self, module: nn.Module) -> None:
        """Takes over what the ordinary layer is: its sizes and what else was set on it, weight and bias."""
        self.taken = [name for name in vars(module) if name not in OF_EVERY_MODULE]
        self.__dict__.update({name: vars(module)[name] for name in self.taken})
        self._adopt(module._parameters["weight"], module._parameters["bias"])

    def _adopt(self, weight: Tensor | None, bias: Tensor | None) -> None:
        """Takes weight and bias as the frozen base, in the storage they are in."""
        assert weight is not None
        self.base = nn.Parameter(weight.detach(), requires_grad=False)
        self.base_bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def base_parameters(self) -> list[Tensor]:
        """``base`` and, where there is one, ``base_bias``."""
        return [parameter for parameter in (self.base, self.base_bias) if parameter is not None]

    @property
    def weight(self) -> Tensor:
        """The effective weight of the active task: differentiable, and materialised at each reading.

        What is written into it (``nn.init.zeros_(layer.weight)``) is lost, or with no task active is written into
        ``base``: write to ``base`` or ``deltas[task]``, or `reset_parameters`. In a mixed batch, or with none of
        several tasks active, a tensor that has its shape and dtype and raises where its values are used.
        """
        task, refusal = self._one_task("weight")
        return self.effective(task)[0] if refusal is None else MixedWeight.of(self.base, refusal)

    @weight.setter
    def weight(self, _: object) -> None:
        raise self._assigned("weight")

    @property
    def bias(self) -> Tensor | None:
        """The effective bias of the active task; see `weight`."""
        task, refusal = self._one_task("bias")
        if refusal is None:
            return self.effective(task)[1]
        return None if self.base_bias is None else MixedWeight.of(self.base_bias, refusal)

    @bias.setter
    def bias(self, _: object) -> None:
        raise self._assigned("bias")

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As ``nn.Module.register_parameter``, through which assignments of parameters go."""
        if name in self._stored:
            raise self._assigned(name)
        super().register_parameter(name, param)

    def _assigned(self, name: str) -> AttributeError:
        own = "base" if name == "weight" else "base_bias"
        return AttributeError(
            f"{self.path}: {name} must not be assigned, got a new one: it is {own} plus a task's delta (write to {own} "
            f"with torch.no_grad(): layer.{own}.copy_(...))"
        )

    def _one_task(self, read: str) -> tuple[str | None, str | None]:
        """The task whose weight or bias is read, and why there is none."""
        try:
            selection = self.selected()
        except ValueError as error:  # of several tasks none is active, as in code that looks at a network
            return None, str(error)
        if selection.mixed is None:
            return selection.task, None
        return None, (
            f"{self.path}: {read} must be used with one task active, got a mixed batch, whose samples differ in it "
            "(call the layer instead, or exclude it from the conversion)"
        )

    def effective(self, task: str | None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of ``task`` (None: the base), summed in float32 and rounded once."""
        raise NotImplementedError

    def merged(self, task: str | None) -> nn.Module:
        """An ordinary layer with the effective weight of ``task``, in storage of its own."""
        raise NotImplementedError

    def _ordinary(self, kind: type[_Layer], task: str | None) -> _Layer:
        """The layer of this kind that has what was taken, and the effective weight of ``task``."""
        plain = kind.__new__(kind)
        nn.Module.__init__(plain)
        plain.__dict__.update({name: vars(self)[name] for name in self.taken})
        return fill(plain, *self.effective(task), self.training)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Also takes the state dict of the ordinary layer: ``weight`` and ``bias`` are the base's, tasks stay."""
        if prefix + "weight" in state_dict:
            for ordinary, own in self._stored.items():
                if prefix + ordinary in state_dict:
                    state_dict[prefix + own] = state_dict.pop(prefix + ordinary)
            for name in ("deltas", "bias_deltas", "scores"):
                for key, value in getattr(self, name).state_dict(prefix=f"{prefix}{name}.").items():
                    state_dict.setdefault(key, value)
        super()._load_from_state_dict(state_dict, prefix, *args)


def carry(module: nn.Module, names: Sequence[str], memo: dict[int, Any]) -> None:
    """Copies the attributes with these names, so that they refer to what ``memo`` says, as in a deepcopy."""
    module.__dict__.update(copy.deepcopy({name: vars(module)[name] for name in names}, memo))


def fill(module: _Layer, weight: Tensor, bias: Tensor | None, training: bool) -> _Layer:
    """``module`` (made without storage) with copies of weight and bias for its parameters."""
    module.register_parameter("weight", nn.Parameter(weight.detach().clone()))
    module.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone()))
    return module.train(training)
