"""Why a module of a network cannot be adapted."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from ._problem import DTYPES
from .nn import FastTapsConv2d
from .nn.transposed import is_transposed_linear

SHARED = "shared and frozen"
"""What becomes of it then."""


def refusals(model: nn.Module) -> dict[int, str]:
    """By id: why a module cannot be adapted without the risk of a silently wrong result."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(f"{path}.{name}" if path else name)
    reasons: dict[int, str] = {}
    for path, module in model.named_modules():
        reason = _refusal(module)
        for name, parameter in module._parameters.items():
            own = f"{path}.{name}" if path else name
            others = [owner for owner in owners.get(id(parameter), []) if owner != own]
            if others and reason is None:
                reason = f"its {name} is tied with {', '.join(others)}"
        if reason is not None:
            reasons[id(module)] = f"{reason}: {SHARED}"
            if isinstance(module, nn.MultiheadAttention):
                reasons[id(module.out_proj)] = f"its parent reads its weight: {SHARED}"
    return reasons


def _refusal(module: nn.Module) -> str | None:
    if parametrize.is_parametrized(module):
        names: Any = module.parametrizations
        return f"parametrized ({', '.join(names)}); remove that first"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if isinstance(module, nn.MultiheadAttention):
        return _attention_refusal(module)
    if not isinstance(module, (nn.Linear, nn.Conv2d)) and not is_transposed_linear(module):
        return "quantised" if "quantized" in type(module).__module__ else None
    weight = module._parameters.get("weight")
    if weight is None:
        names = ", ".join(name for name, p in module._parameters.items() if p is not None)
        return f"its weight is computed by a hook from {names or 'elsewhere'} (weight or spectral norm)"
    if type(module).__module__.startswith("torch.ao."):
        return f"{type(module).__name__} is quantised"
    if type(weight) is not nn.Parameter or weight.dtype not in DTYPES:
        return f"its weight is a {type(weight).__name__} of {weight.dtype}"
    clashing = sorted(vars(module).keys() & _reserved())
    if clashing and (type(module) in (nn.Linear, nn.Conv2d) or is_transposed_linear(module)):
        return f"it was given the attribute {clashing[0]!r}, a name that adapted layers use; rename it"
    if is_transposed_linear(module) and not is_bare(module):
        return f"a {type(module).__name__} with hooks, buffers or children cannot be adapted"
    lora = [name for name, _ in module.named_parameters() if name.startswith("lora_")]
    if lora:
        return f"LoRA ({', '.join(lora)}) merges into its weight in place; merge it first"
    return None


@functools.cache
def _reserved() -> frozenset[str]:
    """The names of attributes that adapted layers have and ordinary ones do not."""
    adapted, ordinary = FastTapsConv2d(1, 1, 1, device="meta"), nn.Conv2d(1, 1, 1, device="meta")
    return frozenset(dir(adapted)) - frozenset(dir(ordinary))


def _holds_more(module: nn.Module) -> bool:
    """Whether a layer has tensors or children besides weight and bias."""
    return bool(module._buffers or module._modules or module._parameters.keys() - {"weight", "bias"})


def is_bare(module: nn.Module) -> bool:
    """Whether a layer is its weight, its bias and its type's forward."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks) and not _holds_more(module)


def _attention_refusal(module: nn.MultiheadAttention) -> str | None:
    """MultiheadAttention reads weights and never calls its layers, so one that cannot be rewritten stays as it is."""
    for what, why in (
        (type(module) is not nn.MultiheadAttention, f"{type(module).__name__} may use its weights in another way"),
        (not module._qkv_same_embed_dim, "kdim and vdim must be embed_dim"),
        (module.bias_k is not None, "add_bias_kv is not supported"),
        (module.add_zero_attn, "add_zero_attn is not supported"),
        (bool(module._forward_hooks or module._forward_pre_hooks), "it has hooks"),
        (bool(module._buffers or module._modules.keys() - {"out_proj"}), "it has buffers or other children"),
        (parametrize.is_parametrized(module.out_proj), "its out_proj is parametrized"),
        (_holds_more(module.out_proj), "its out_proj holds more than weight and bias"),
    ):
        if what:
            return f"MultiheadAttention reads its weights and cannot be rewritten: {why}"
    return None
