"""What type checkers see of the package is what is there, although names are looked up when first used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.mypy
def test_public_names_have_their_types():
    """An ignored error that is none is an error too, so that wrong names and arguments must be found.

    With the project's settings, and so with the cache of ``make lint``: without one this takes half a minute.
    """
    command = [sys.executable, "-m", "mypy", "tests/typed_names.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
