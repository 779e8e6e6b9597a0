"""`benchmarks.targets` without a GPU: what it would measure runs and is right; the README states what it predicts."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import emulator
import pytest
import torch
from taps_fast.kernels import linear

from benchmarks import results, targets
from taps_fast import _autograd, _dispatch, _ext

emulator.load()
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture
def small(monkeypatch):
    """Layers of 32 features on a CPU, in Triton's interpreter and the emulator; each contender runs and takes 1 ms."""
    for name, value in dict(DEVICE="cpu", SIZE=32, COLD_BYTES=1 << 13, SECONDS=0.001).items():
        monkeypatch.setattr(targets, name, value)
    operators = SimpleNamespace(**{n: getattr(linear, n) for n in ("linear_fwd", "linear_dw", "linear_grad")})
    operators.linear_stream = torch.ops.taps_fast.linear_stream
    monkeypatch.setattr(_autograd, "ops", operators)
    monkeypatch.setitem(_dispatch._REASONS, "triton", linear.not_supported_reasons)
    monkeypatch.setitem(_dispatch._REASONS, "cuda", lambda problem: iter(()))
    monkeypatch.setattr(targets, "_synchronize", lambda: None)
    monkeypatch.setattr(_ext, "CUDA_ERROR", None)
    ran = []

    def milliseconds(**contenders):
        ran.extend(call() for calls in contenders.values() for call in calls)
        return dict.fromkeys(contenders, 1.0)

    monkeypatch.setattr(targets, "milliseconds", milliseconds)
    _dispatch._cached_select.cache_clear()
    yield ran
    _dispatch._cached_select.cache_clear()


@pytest.mark.parametrize("target", targets.TARGETS, ids=lambda t: t.what)
def test_what_is_measured_runs_and_is_right(target, small):
    record = targets.measure(target)
    assert record["status"] == "ok", record["reason"]
    assert record["value"] > 0 and record["holds"] in (True, False)
    assert len(small) > 0 or target.measure is targets.host


def test_a_wrong_result_is_no_measurement(small, monkeypatch):
    monkeypatch.setattr(targets.Layer, "run", lambda layer, *how: torch.zeros_like(layer.x))
    record = targets.measure(targets.TARGETS[0])
    assert (record["status"], record["value"], small) == ("failed", None, [])
    assert "AssertionError" in record["reason"]


def test_without_the_extension_its_targets_say_why(monkeypatch):
    monkeypatch.setattr(_ext, "CUDA_ERROR", "no nvcc")
    (record, *_) = (targets.measure(t) for t in targets.TARGETS if t.cuda)
    assert (record["status"], record["reason"]) == ("absent", "no nvcc")


def test_a_target_holds_on_its_own_side():
    share, times = targets.TARGETS[0], next(t for t in targets.TARGETS if t.below)
    assert [share.holds(v) for v in (0.84, 0.85, 0.9)] == [False, True, True]
    assert [times.holds(v) for v in (1.1, 1.15, 1.2)] == [True, True, False]


def test_without_a_gpu_it_says_so(capsys):
    assert targets.main([]) == 1
    assert "no CUDA device, so nothing was measured" in capsys.readouterr().err


def test_the_readme_states_each_prediction():
    text = (targets.Path(targets.__file__).parent / "README.md").read_text()
    written = re.findall(r"^\| (.*?) \| ([≤≥].*?) \| ", text, re.M)
    assert written == [(t.what, t.predicted) for t in targets.TARGETS]


def test_the_readme_states_what_was_measured():
    """The table of the one run there is."""
    (path,) = results.FOLDER.glob("gpu-*.json")
    records = json.loads(path.read_text())["targets"]
    texts = [t.form.format(r["value"]) for t, r in zip(targets.TARGETS, records, strict=True)]
    assert targets.table(texts) in (results.FOLDER.parent / "README.md").read_text()
