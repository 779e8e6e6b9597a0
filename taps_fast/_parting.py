"""What of a network that was given is parted from it before a state dict is loaded over it."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn

from ._folder import base_tensors, plain_name
from .nn.layer import TapsLayer


@torch.no_grad()
def part(model: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any, *_: Any) -> None:
    """Before a state dict is loaded into the network of a `TapsModel`: base parameters that will change get storage of
    their own, as it is that of the network which was adapted."""
    if metadata.get("assign_to_params_buffers", False):
        return
    base = {id(t) for _, t in base_tensors(model, head=True) if type(t) is nn.Parameter}
    incoming = {plain_name(name): value for name, value in state_dict.items()}
    for path, module in model.named_modules(prefix=prefix.removesuffix("."), remove_duplicate=False):
        held = dict(module._parameters)
        if isinstance(module, TapsLayer):
            held |= {ordinary: operator.attrgetter(own)(module) for ordinary, own in module._stored.items()}
        for name, parameter in held.items():
            new = incoming.get(plain_name(f"{path}.{name}".removeprefix(".")))
            if parameter is None or id(parameter) not in base or not isinstance(new, Tensor):
                continue
            if not (parameter.is_meta or new.is_meta or torch.equal(parameter, new.to(parameter))):
                parameter.data = parameter.data.clone()
