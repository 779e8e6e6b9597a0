"""What a glob of dotted names covers, what to say after a name that is not known, and one or more of a thing."""

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


def counted(number: int, what: str) -> str:
    """``"1 layer"``, ``"2 layers"``."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


MOST_NAMED = 20
"""Names that an error lists: a network may have thousands of modules."""


def nearest(name: str, known: Sequence[str]) -> str:
    """The same, and the names that are known, the first of them if they are many."""
    more = f", … ({len(known)} in all)" if len(known) > MOST_NAMED else ""
    return f"{did_you_mean(name, known)} known: {', '.join(known[:MOST_NAMED]) or 'none'}{more}".lstrip("; ")
