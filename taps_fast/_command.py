"""What the commands of ``python -m taps_fast`` share: their error, and the types of their options."""

from __future__ import annotations

import argparse
import math

import torch


class UserError(Exception):
    """Something the person at the command line can put right; shown without a traceback."""


def positive(text: str) -> int:
    """A whole number of at least 1."""
    _check(text, "a whole number of at least 1", text.isdecimal() and int(text) > 0)
    return int(text)


def whole(text: str) -> int:
    """A whole number of at least 0."""
    _check(text, "a whole number of at least 0", text.isdecimal())
    return int(text)


def above_zero(text: str) -> float:
    """A finite number above 0."""
    _check(text, "finite and above 0", 0 < _float(text) < math.inf)
    return float(text)


def at_least_zero(text: str) -> float:
    """A finite number of at least 0."""
    _check(text, "finite and at least 0", 0 <= _float(text) < math.inf)
    return float(text)


def share(text: str) -> float:
    """A number between 0 and 1."""
    _check(text, "between 0 and 1", 0 < _float(text) < 1)
    return float(text)


def device(text: str) -> torch.device:
    """A device of this machine, with its number."""
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:  # an unknown name, a PyTorch without it, a machine without it
        reason = str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(f"must be a device of this machine, got {text!r} ({reason})") from None


def _check(text: str, rule: str, fits: bool) -> None:
    if not fits:
        raise argparse.ArgumentTypeError(f"must be {rule}, got {text!r}")


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
