"""What a glob of dotted names covers, and what to say after a name that is not known."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Sequence


def covers(pattern: str, path: str) -> bool:
    """Whether a glob names this path, or one that it lies below."""
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, pattern + ".*")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the nearest known name, or ``""``."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def nearest(name: str, known: Sequence[str]) -> str:
    """The same, and all names that are known."""
    return f"{did_you_mean(name, known)} known: {', '.join(known) or 'none'}".lstrip("; ")
