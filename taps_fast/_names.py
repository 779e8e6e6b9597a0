"""What to say after a name that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the nearest known name, or ``""``."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def nearest(name: str, known: Sequence[str]) -> str:
    """The same, and all names that are known."""
    return f"{did_you_mean(name, known)} known: {', '.join(known) or 'none'}".lstrip("; ")
