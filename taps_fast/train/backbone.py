"""A backbone by name or import path, its head, and what of its output are the logits."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._names import did_you_mean
from .data import TrainError


def backbone(spec: str, *, pretrained: bool = True, weights: Path | None = None) -> nn.Module:
    """The network that a command line names.

    Args:
        spec: ``torchvision:NAME``, ``timm:NAME``, ``transformers:NAME`` (a name of its hub, or a folder), or
            ``module:callable``, which is called without arguments.
        pretrained: whether the three libraries load their weights (and download them, where they have not yet).
        weights: a state dict to load afterwards (.safetensors, or what ``torch.save`` wrote).

    Raises:
        TrainError: a library that is not installed, a name it does not know, no module, weights that do not fit.
    """
    source, colon, name = spec.partition(":")
    if not (source and colon and name):
        raise TrainError(
            f"train: backbone must be torchvision:NAME, timm:NAME, transformers:NAME or module:callable, got {spec!r}"
        )
    try:
        if source == "torchvision":
            found = importlib.import_module(source).models.get_model(name, weights="DEFAULT" if pretrained else None)
        elif source == "timm":
            found = importlib.import_module(source).create_model(name, pretrained=pretrained)
        elif source == "transformers":
            found = _transformers(importlib.import_module(source), name, pretrained)
        else:
            found = _call(source, name, spec)
    except ModuleNotFoundError as error:
        get = f": pip install {error.name}" if error.name in ("torchvision", "timm", "transformers") else ""
        raise TrainError(
            f"train: backbone {spec!r} needs {error.name}, which is not installed{get} ({error})"
        ) from None
    except TrainError:
        raise
    except (TypeError, ValueError, RuntimeError, OSError) as error:
        raise TrainError(f"train: backbone {spec!r} cannot be made: {error}") from error
    if not isinstance(found, nn.Module):
        raise TrainError(f"train: backbone must be an nn.Module, got a {type(found).__name__} from {spec!r}")
    if weights is not None:
        _load(found, weights)
    return found


def _transformers(library: Any, name: str, pretrained: bool) -> Any:
    kind = library.AutoModelForImageClassification
    return kind.from_pretrained(name) if pretrained else kind.from_config(library.AutoConfig.from_pretrained(name))


def _call(source: str, name: str, spec: str) -> Any:
    if str(Path.cwd()) not in sys.path and "" not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as ``python -m`` has it, and the installed command has not
    made: Any = importlib.import_module(source)
    for part in name.split("."):
        if not hasattr(made, part):
            raise TrainError(
                f"train: backbone {spec!r} must name something of {source}, got {part!r}{did_you_mean(part, dir(made))}"
            )
        made = getattr(made, part)
    return made() if callable(made) and not isinstance(made, nn.Module) else made


def _load(model: nn.Module, weights: Path) -> None:
    try:
        if weights.suffix == ".safetensors":
            from safetensors.torch import load_file

            model.load_state_dict(load_file(weights))
        else:
            model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    except Exception as error:  # a missing file, another format, tensors of another model
        raise TrainError(f"train: weights must be a state dict of the backbone, got {weights} ({error})") from None


def head_of(model: nn.Module) -> str:
    """The path of the last Linear: the head of a classifier that does not say.

    Raises:
        TrainError: there is none.
    """
    linear: list[str] = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise TrainError("train: head must be said for a model without a Linear (--head PATH), got none")
    return linear[-1]


def check_head(model: nn.Module, path: str) -> None:
    """A head must be a layer that can be made anew with other outputs.

    Raises:
        TrainError: it is another module, such as an nn.Sequential; the last layer inside is named.
    """
    head = dict(model.named_modules()).get(path)
    if head is None or isinstance(head, (nn.Linear, nn.Conv2d)):
        return
    inside = [name for name, module in head.named_modules(prefix=path) if isinstance(module, (nn.Linear, nn.Conv2d))]
    hint = f"its last one is --head {inside[-1]}" if inside else "it holds none"
    raise TrainError(f"train: --head must be a Linear or Conv2d, got {path!r}, a {type(head).__name__} ({hint})")


def logits_of(output: Any) -> Tensor:
    """The tensor itself, or the ``logits`` of what transformers returns."""
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise TrainError(f"train: the backbone must return logits, got {type(output).__name__}")
    return logits
