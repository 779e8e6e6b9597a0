"""Every kernel compiles for chips this machine need not have, into code that passes the gates of `aot.py`.

One chip and the kernels that multiply run here; `make test-triton` compiles everything for every chip.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import aot
import pytest
import torch
from taps_fast.kernels import _launch

SCRIPT = Path(aot.__file__)
GOOD = aot.Facts(
    registers=128,
    spills=0,
    spills_in_loops=0,
    shared=81920,
    products=8,
    atomics=0,
    async_copies=40,
    wide_loads=40,
    warnings=(),
    hazards=0,
)
LAUNCH = aot.Launch(
    "split_kernel",
    (9, 0),
    (("x_ptr", "*bf16"),),
    (),
    (("PRECISION", "ieee"), ("BLOCK_M", 16), ("BLOCK_O", 64), ("BLOCK_I", 128)),
    warps=4,
    stages=4,
)


def output_of(script: Path, *arguments: str, **variables: str) -> str:
    """Of a process of its own, since this one interprets kernels."""
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    plain["PYTHONPATH"] = os.pathsep.join([str(SCRIPT.parents[1]), plain.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, env=plain)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def compile_for(*arguments: str) -> list[str]:
    """The lines of the table of `aot.py`."""
    return [line for line in output_of(SCRIPT, *arguments).splitlines() if line.endswith(" ok")]


def test_mixed_batches_compile_for_hopper():
    kernels = ("split_kernel", "dw_task_kernel", "conv2d_kernel")
    lines = compile_for("--chips", "9.0", "--only", "bf16 mixed", "--kernels", *kernels)
    assert sum("split_kernel" in line for line in lines) >= 8
    assert sum("dw_task_kernel" in line for line in lines) >= 2
    assert sum("conv2d_kernel" in line for line in lines) >= 4


def test_chips_without_entries_of_their_own_compile():
    lines = compile_for("--chips", "8.9", "--only", "bf16 mixed", "--kernels", "split_kernel")
    assert len(lines) >= 8


def test_a_chip_that_is_like_another_has_its_tiles():
    shipped = {chip: list(aot.shipped(chip)) for chip in ((10, 0), (10, 3), (8, 9))}
    assert shipped[10, 3] == shipped[10, 0] != shipped[8, 9]


def test_batches_of_other_sizes_compile_nothing_more():
    """Rows, samples, rows a sample, tasks and deltas: 1, multiples of 16 and others."""
    more = json.loads(output_of(SCRIPT.with_name("variants.py")))
    assert len(more) >= 8 and not any(more.values()), more


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, whose driver needs no stand-in")
def test_direct_launches_hand_on_what_triton_would():
    """Each kernel but the one whose arguments are values that never come again; what differs fails in the script."""
    script = SCRIPT.with_name("direct_launches.py")
    found = json.loads(output_of(script, TAPS_FAST_TRITON_LAUNCH="direct"))
    known = tuple(map(int, found["triton"].split(".")[:2])) in _launch.READ
    assert set(found["direct"]) == (aot.unlaunched([]) - {"write_kernel"} if known else set())
    assert json.loads(output_of(script, TAPS_FAST_TRITON_LAUNCH="triton"))["direct"] == []
    wrong = os.environ | {"TAPS_FAST_TRITON_LAUNCH": "indirect"}
    done = subprocess.run(
        [sys.executable, "-c", "import taps_fast.kernels.merge"], env=wrong, capture_output=True, text=True
    )
    assert "TAPS_FAST_TRITON_LAUNCH must be direct or triton, got 'indirect'" in done.stderr


def test_a_config_that_nobody_compiles_is_found():
    """Without launches every config of the table is unseen; the script itself refuses to run with one."""
    (first, *_) = shipped = [config for _, _, config in aot.shipped((9, 0))]
    assert aot.unseen((9, 0), []) == shipped
    blocks = {"BLOCK_M": first.block_m, "BLOCK_O": first.block_o, "BLOCK_I": first.block_i}
    launch = replace(LAUNCH, constants=tuple(blocks.items()), warps=first.warps)
    assert first not in aot.unseen((9, 0), [launch])


def test_a_kernel_that_nobody_compiles_is_found():
    missing = aot.unlaunched([LAUNCH])
    assert "split_kernel" not in missing
    assert missing >= {"dw_task_kernel", "merge_kernel", "fold_kernel", "fold_grad_kernel", "coded_kernel"}


def test_good_code_passes():
    assert aot.failures(LAUNCH, GOOD) == []


@pytest.mark.parametrize(
    ("fact", "reason"),
    (
        ({"spills": 8, "spills_in_loops": 2}, "8 bytes of registers spill, 2 instructions of it in loops"),
        ({"spills": 24}, "24 bytes of registers spill, 0 instructions of it in loops"),
        ({"registers": 255, "shared": 300000}, "shared memory"),
        ({"products": 0}, "tensor-core"),
        ({"async_copies": 10}, "not started ahead"),
        ({"wide_loads": 0}, "no load of 16 bytes"),
        ({"atomics": 1}, "1 atomic operations"),
        ({"warnings": ("C7515",)}, "C7515"),
        ({"hazards": 1}, "wgmma may still read"),
    ),
    ids=str,
)
def test_each_gate_can_fail(fact, reason):
    (found,) = aot.failures(LAUNCH, replace(GOOD, **fact))
    assert reason in found


def test_a_few_registers_may_spill_beside_products_on_ordinary_units():
    launch = replace(LAUNCH, signature=(("x_ptr", "*fp32"),))
    facts = replace(GOOD, spills=aot.SPILLS)
    assert aot.failures(launch, facts) == []
    assert aot.failures(LAUNCH, facts) and aot.failures(launch, replace(facts, spills_in_loops=1))
    assert aot.failures(launch, replace(facts, spills=aot.SPILLS + 4))


def test_fewer_may_spill_on_chips_without_entries_of_their_own():
    launch, facts = replace(LAUNCH, chip=(8, 9)), replace(GOOD, spills=aot.SPILLS_PARTLY)
    assert aot.failures(launch, facts) == []
    assert aot.failures(LAUNCH, facts) and aot.failures(launch, replace(facts, spills_in_loops=1))
    assert aot.failures(launch, replace(facts, spills=aot.SPILLS_PARTLY + 4))


def test_atomics_are_found_in_machine_code():
    lines = ("RED.E.ADD.F32.FTZ.RN.STRONG.GPU [R2], R5", "@!P0 ATOMG.E.ADD.STRONG.GPU PT, R3, [R4], R5")
    assert all(aot.ATOMIC.search(f"        /*0a20*/                   {line} ;") for line in lines)
    others = ("REDUX.SUM UR5, R3", "ATOMS.OR RZ, [R2], R3")
    assert not any(aot.ATOMIC.search(f"        /*0a20*/                   {line} ;") for line in others)


def test_more_registers_than_the_chip_has_fail():
    (found,) = aot.failures(replace(LAUNCH, warps=16), replace(GOOD, registers=160))
    assert "160 registers x 16 warps" in found
