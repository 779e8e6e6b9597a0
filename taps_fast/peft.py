"""LoRA adapters as PEFT saves them, read as low-rank deltas.

    <folder>/adapter_config.json             what kind of adapter, its rank and α
    <folder>/adapter_model.safetensors       base_model.model.<path>.lora_A.weight, .lora_B.weight

A layer's delta is (α/r)·B A, or (α/√r)·B A with ``use_rslora``. What would change the result and is not read here is
refused by name; nothing of a folder is left out in silence. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ._names import did_you_mean
from .formats import LowRank

_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_READ = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias"}
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout",
    "modules_to_save", "eva_config", "ensure_weight_tying", "runtime_config", "init_lora_weights",
    "qalora_group_size", "megatron_core", "fan_in_fan_out",
}  # fmt: skip
"""Keys of the configuration that say where and how an adapter was trained; its tensors say the rest, and the layers
which of them store their weight as [I, O]."""
_GROUPS = " (an adapter of a convolution in groups mixes channels of all groups, which no delta of its weight can)"
_INITIAL = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the base's weights as they are."""


class AdapterError(ValueError):
    """A folder that is no LoRA adapter, or one that cannot be read exactly."""


def read_lora(folder: str | os.PathLike[str]) -> dict[str, LowRank]:
    """The low-rank delta of each adapted module of a PEFT LoRA folder.

    Args:
        folder: what ``PeftModel.save_pretrained`` wrote.

    Returns:
        By the module's path in the base model. For a convolution the delta has the shape of its kernel.

    Raises:
        AdapterError: no adapter, one of another type than LoRA (DoRA, QLoRA-A, …), or one with what a low-rank delta
            cannot hold: trained biases, modules saved whole (but `TapsModel.load_lora` takes the model's head as the
            task's), embeddings, weights that an initialisation changed, convolutions of several groups.

    Source: LoRA, arXiv 2106.09685; rank-stabilised scaling, arXiv 2312.03732.
    """
    deltas, saved = read(folder)
    check_saved(saved, None)
    return deltas


def check_saved(saved: Mapping[str, Tensor], head: str | None) -> None:
    """Refuses tensors of modules that were saved whole, unless they are the head's."""
    other = next((name for name in saved if head is None or not name.startswith(f"{head}.")), None)
    if other is not None:
        own = "of which there is none here" if head is None else f"{head!r} here"
        raise AdapterError(
            f"read_lora: modules_to_save must name nothing but the model's head, {own}, got {other!r}, which is saved "
            "whole: such a module is only loaded as a task's head, by load_lora of TapsModel(..., head=<its path>)"
        )


def read(folder: str | os.PathLike[str]) -> tuple[dict[str, LowRank], dict[str, Tensor]]:
    """What `read_lora` gives, and the tensors of modules that were saved whole, by name in the base model."""
    folder = Path(folder)
    config = _config(folder)
    tensors = _tensors(folder)
    pairs: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    whole = [re.escape(name) for name in config.get("modules_to_save") or ()]
    of_whole = re.compile(
        rf"(?:base_model\.model\.)?((?:.+\.)?(?:{'|'.join(whole)})\.)(?:modules_to_save\.default\.)?(.+)"
    )
    for name, tensor in tensors.items():
        kept = of_whole.fullmatch(name) if whole else None
        if kept is not None and ".lora_" not in name:
            saved[kept[1] + kept[2]] = tensor
            continue
        found = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight", name)
        if found is None:
            raise AdapterError(
                f"read_lora: {folder / _TENSORS} must hold lora_A and lora_B weights alone, got {name!r} "
                f"({_what(name)})"
            )
        pairs.setdefault(found[1], {})[found[2]] = tensor
    if not pairs:
        raise AdapterError(f"read_lora: {folder / _TENSORS} must hold lora_A and lora_B weights, got none")
    return {path: _delta(folder, path, pair, config) for path, pair in pairs.items()}, saved


def match(
    deltas: Mapping[str, LowRank], shapes: Mapping[str, Iterable[int]], transposed: Container[str] = ()
) -> dict[str, LowRank]:
    """The same deltas, each stored as its layer's weight is; every one must have a layer.

    Args:
        deltas: from `read_lora`.
        shapes: of the layers' weights, by path.
        transposed: the paths of the layers that store their weight as [I, O].

    Raises:
        AdapterError: a path that is no layer's, or a delta of another shape.
    """
    matched: dict[str, LowRank] = {}
    for path, delta in deltas.items():
        if path not in shapes:
            raise AdapterError(
                f"read_lora: every adapted module must be an adapted layer of the model, got {path!r}"
                f"{did_you_mean(path, shapes)} ({len(set(deltas) - set(shapes))} of {len(deltas)} are none)"
            )
        if path in transposed:
            delta = LowRank(delta.shape[::-1], delta.a.t().contiguous(), delta.b.t().contiguous(), delta.scale)
        if delta.shape != tuple(shapes[path]):
            groups = len(delta.shape) == 4 and delta.shape[1] > tuple(shapes[path])[1]
            raise AdapterError(
                f"read_lora: the delta of {path!r} must be {tuple(shapes[path])} like the layer's weight, "
                f"got {delta.shape}{_GROUPS if groups else ''}"
            )
        matched[path] = delta
    return matched


def _config(folder: Path) -> dict[str, Any]:
    path = folder / _CONFIG
    if not path.is_file():
        raise AdapterError(f"read_lora: folder must be a PEFT adapter, with {_CONFIG}, got none in {folder}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(f"read_lora: {path} must be JSON, got a file that is not ({error})") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise AdapterError(f"read_lora: peft_type must be LORA, got {kind!r} ({path})")
    if config.get("init_lora_weights", True) not in _INITIAL:
        raise AdapterError(
            "read_lora: init_lora_weights must leave the base's weights as they are, got "
            f"{config['init_lora_weights']!r} (save it with path_initial_model_for_weight_conversion)"
        )
    if config.get("bias", "none") != "none":
        raise AdapterError(f"read_lora: bias must be 'none', got {config['bias']!r} (trained biases are not read)")
    for key, value in config.items():
        if value and key not in _READ | _HARMLESS:
            raise AdapterError(
                f"read_lora: {key} must not be set, got {value!r} (a plain low-rank delta is read alone)"
            )
    return config


def _tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / _TENSORS
    if not path.is_file():
        other = " (adapter_model.bin is pickled, which is never loaded: save with safe_serialization=True)"
        raise AdapterError(
            f"read_lora: folder must hold {_TENSORS}, got none in {folder}"
            f"{other if (folder / 'adapter_model.bin').exists() else ''}"
        )
    try:
        return load_file(path)
    except SafetensorError as error:
        raise AdapterError(
            f"read_lora: {path} must be a whole safetensors file, got one that is not ({error})"
        ) from None


def _delta(folder: Path, path: str, pair: dict[str, Tensor], config: Mapping[str, Any]) -> LowRank:
    if set(pair) != {"A", "B"}:
        missing = "B" if "A" in pair else "A"
        raise AdapterError(f"read_lora: {path!r} must have lora_A and lora_B, got no lora_{missing} ({folder})")
    a, b = pair["A"], pair["B"]
    rank = _number(config, "r", "rank_pattern", path)
    alpha = _number(config, "lora_alpha", "alpha_pattern", path)
    if a.dim() == b.dim() == 4 and 0 < b.shape[1] < a.shape[0] == rank and rank % b.shape[1] == 0:
        raise AdapterError(f"read_lora: {path!r} must be a convolution of one group, got {rank // b.shape[1]}{_GROUPS}")
    if a.dim() not in (2, 4) or b.dim() != a.dim() or not a.shape[0] == b.shape[1] == rank >= 1:
        raise AdapterError(
            f"read_lora: lora_A and lora_B of {path!r} must be [{rank}, I] and [O, {rank}], as the configuration "
            f"says, got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if not a.is_floating_point() or a.dtype != b.dtype:
        raise AdapterError(
            f"read_lora: lora_A and lora_B of {path!r} must be of one float dtype, got {a.dtype}, {b.dtype}"
        )
    if a.dim() == 4 and b.shape[2:].numel() != 1:
        raise AdapterError(f"read_lora: lora_B of {path!r} must be a 1 x 1 convolution, got {tuple(b.shape)}")
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    delta = LowRank.of(b.flatten(1), a.flatten(1), scale, (b.shape[0], *a.shape[1:]))
    if not delta.scale.to(a.dtype).isfinite():
        raise AdapterError(
            f"read_lora: lora_alpha of {path!r} must give a scale that is finite in {a.dtype}, got {alpha} (rank "
            f"{rank})"
        )
    return delta


def _number(config: Mapping[str, Any], key: str, pattern: str, path: str) -> float:
    """The number for one module. PEFT's rule: that of the first key in ``pattern`` that is the module's path, or the
    end of it after a dot, as a regular expression; else the one for all modules."""
    patterns = config.get(pattern) or {}
    if not isinstance(patterns, dict):
        raise AdapterError(f"read_lora: {pattern} must be numbers by module, got {patterns!r}")
    number = config.get(key)
    for expression, own in patterns.items():
        try:
            found = re.match(rf"(.*\.)?({expression})$", path)
        except re.error as error:
            raise AdapterError(
                f"read_lora: {pattern} must have regular expressions for keys, got {expression!r} ({error})"
            ) from None
        if found is not None:
            number = own
            break
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        raise AdapterError(f"read_lora: {key} of {path!r} must be a finite number, got {number!r}")
    return number


def _what(name: str) -> str:
    """What a tensor that is no lora_A or lora_B belongs to."""
    if "lora_magnitude_vector" in name:
        return "DoRA is not a low-rank delta"
    if "lora_embedding" in name:
        return "embeddings have no low-rank deltas here"
    return "trained biases are not read, nor modules saved whole that modules_to_save does not name"
