"""LoRA by PEFT on the demo's network, with a given number of parameters."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

MOST = 512
"""The largest rank that is tried."""


def plain(model: nn.Module) -> nn.Module:
    """The same network, bit for bit, of plain ``nn.Conv2d``, in the same storage.

    PEFT makes its low-rank convolution by calling the layer's class, (in, out, kernel, stride, padding), and the class
    of EfficientNet-Lite takes an image size in the place of the padding.
    """
    model = copy.deepcopy(model)
    for path, layer in list(model.named_modules()):
        if isinstance(layer, nn.Conv2d):
            sizes = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride)
            conv = nn.Conv2d(*sizes, groups=layer.groups, bias=layer.bias is not None, device="meta")
            conv.weight, conv.bias = layer.weight, layer.bias
            padding = layer.static_padding
            model.set_submodule(path, nn.Sequential(padding, conv) if isinstance(padding, nn.ZeroPad2d) else conv)
    return model


def adapted(model: nn.Module, head: str, budget: int, seed: int) -> tuple[nn.Module, int, int]:
    """``model`` under PEFT's LoRA; its parameters that train apart from the head, at most ``budget``; and its rank.

    Low-rank factors on every convolution but the depthwise ones, for which PEFT wants a rank divisible by groups (the
    smallest has more parameters than a network). Those train whole, as do the norms and the head (``modules_to_save``).
    One rank for all layers, no larger than leaves the factors smaller than the layer; W + B·A without a factor.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError(f"LoRA needs PEFT: pip install peft ({error})") from None
    convs = {path: m for path, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    low = {path: m for path, m in convs.items() if m.groups == 1}
    norms = [path for path, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    saved = [*norms, *(path for path in convs if path not in low)]
    whole = sum(p.numel() for path in saved for p in model.get_submodule(path).parameters())

    def ranks(rank: int) -> Iterator[tuple[str, int, int]]:
        for path, layer in low.items():
            side = len(layer.weight) + layer.weight[0].numel()
            own = min(rank, max(layer.weight.numel() // side, 1))
            yield path, own, own * side

    fitting = (r for r in range(MOST, 0, -1) if whole + sum(cost for *_, cost in ranks(r)) <= budget)
    rank = next(fitting, 1)
    pattern = {re.escape(path): own for path, own, _ in ranks(rank)}
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what a language model would be asked
        config = LoraConfig(
            r=rank,
            target_modules=list(low),
            rank_pattern=pattern,
            alpha_pattern=pattern,
            modules_to_save=[*saved, head],
        )
        peft: Any = get_peft_model(model, config)
    counted = sum(p.numel() for name, p in peft.named_parameters() if p.requires_grad and f".{head}." not in name)
    return peft, counted, rank
