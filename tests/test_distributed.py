"""Two gloo processes: their gradients are those of one with the whole batch, and what they save can be loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

CHECKS = ("ddp", "statistics", "fsdp", "folders", "checkpoints")


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What both processes printed."""
    if not dist.is_gloo_available():
        raise RuntimeError("this PyTorch has no gloo")
    worker = Path(__file__).with_name("distributed_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(worker)]
    # Without Triton's interpreter, which the other tests have turned on: FSDP imports Triton.
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*command, str(tmp_path_factory.mktemp("shared"))],
        capture_output=True,
        text=True,
        timeout=300,
        env=clean | {"OMP_NUM_THREADS": "1"},
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize("check", CHECKS)
def test_two_processes(said, check):
    for rank in (0, 1):
        assert f"rank {rank}: {check}" in said, said[-3000:]
