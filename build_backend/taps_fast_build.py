"""Setuptools' build backend, except that an isolated build uses the PyTorch that is already installed.

pip builds in an environment of its own. If that had to install PyTorch, each build would download gigabytes; if it
went without, no extension could be built. But pip runs the build with the interpreter that the package is for, so
this asks that interpreter, outside the isolation, where its packages are, and adds those folders behind pip's own.
Front ends that build with another interpreter (uv, `python -m build`) need their --no-build-isolation option.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (a backend is the names that it exports)

_TORCH = "torch>=2.10"
# -E: pip isolates through PYTHONPATH. A package that only PYTHONPATH leads to is not found.
_QUESTION = "import importlib.util, json, sys; print(json.dumps(importlib.util.find_spec('torch') and sys.path))"


def _use_installed_torch() -> None:
    if find_spec("torch") is None:
        answer = subprocess.run([sys.executable, "-E", "-c", _QUESTION], stdout=subprocess.PIPE, check=True).stdout
        sys.path += [path for path in json.loads(answer) or [] if path and path not in sys.path]


def _requires_torch() -> list[str]:
    return [] if os.environ.get("TAPS_FAST_EXT") == "off" or find_spec("torch") else [_TORCH]


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + _requires_torch()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + _requires_torch()


_use_installed_torch()
