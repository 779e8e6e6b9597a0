"""The examples: they run in seconds, learn, and save tasks that load. What they need is not installed: not run."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from taps_fast import TapsModel, store

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ("plain", "accelerated", "lightning_module"))
def test_training_loops_are_short(name):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 120


def test_plain(tmp_path, capsys):
    module = example("plain")
    model, losses = module.main(["--epochs", "4", "--out", str(tmp_path)])
    assert losses["two"] < 0.5 and losses["three"] < 0.9
    assert "of 2 layers open" in capsys.readouterr().out
    again = TapsModel(module.backbone(), head="7")
    for task in model.tasks:
        again.load_task(tmp_path / task)
    x = torch.rand(4, 3, 16, 16)
    torch.testing.assert_close(again.eval()(x, tasks=[0, 1, 1, 0]), model(x, tasks=[0, 1, 1, 0]))
    with pytest.raises(SystemExit) as done:
        module.main(["--help"])
    assert done.value.code == 0


def test_accelerate_averages_micro_batches(tmp_path):
    """Batches of 32 and micro-batches of 16 take the same steps, to rounding."""
    state = pytest.importorskip("accelerate.state", reason="Accelerate is not installed")
    module = example("accelerated")
    options = ["--cpu", "--epochs", "2", "--out", str(tmp_path)]
    _, whole = module.main([*options, "--batch", "32", "--accumulate", "1"])
    _, halves = module.main([*options, "--batch", "16", "--accumulate", "2"])
    assert len(whole) == 12 and whole == pytest.approx(halves, rel=1e-3)
    assert whole[-1] < whole[0]
    state.AcceleratorState._reset_state(True)
    _, low = module.main([*options, "--batch", "32", "--accumulate", "1", "--precision", "bf16"])
    assert low[0] == pytest.approx(whole[0], rel=0.05) and low[0] != whole[0]
    state.AcceleratorState._reset_state(True)
    assert TapsModel(module.backbone(), head="7").tasks == []


def test_accelerate_with_two_processes_is_one(tmp_path):
    """Two processes with half of all images each take the steps of one process that has all of them."""
    pytest.importorskip("accelerate", reason="Accelerate is not installed")
    code = (
        "import sys, accelerate; sys.path.insert(0, sys.argv[1]); import accelerated; "
        "options = ['--cpu', '--epochs', '4', '--accumulate', '1', '--out', sys.argv[2]]; "
        "accelerate.notebook_launcher(accelerated.main, (options + ['--batch', '96'],), num_processes=2)"
    )
    command = [sys.executable, "-c", code, str(EXAMPLES), str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    options = ["--cpu", "--epochs", "4", "--accumulate", "1", "--batch", "192", "--out", str(tmp_path / "one")]
    example("accelerated").main(options)
    two, one = (store.read_task(tmp_path / name)[0] for name in ("two", "one"))
    assert two.keys() == one.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-2, atol=1e-3)


def test_lightning_trains_jointly(tmp_path):
    pytest.importorskip("lightning", reason="Lightning is not installed")
    module = example("lightning_module")
    model, metrics = module.main(["--epochs", "5", "--out", str(tmp_path)])
    assert metrics["loss"] < 0.7 and metrics["two/layers"] == metrics["three/layers"] == 2
    shared = module.backbone()
    assert not torch.equal(shared[0].weight, model.conversion.layers["0"].base)
    shared.load_state_dict(torch.load(tmp_path / "backbone.pt", weights_only=True))
    again = TapsModel(shared, head="7")
    for task in model.tasks:
        again.load_task(tmp_path / task)
    x = torch.rand(4, 3, 16, 16)
    torch.testing.assert_close(again.eval()(x, tasks=[0, 1, 1, 0]), model.eval()(x, tasks=[0, 1, 1, 0]))
