"""Mixed batches in slices: the same results, where that pays, and not where samples meet."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from nets import TASKS, ConvNet, Transformer, images, three_tasks
from test_inference import MIX, Net, fill, folded
from torch import nn

from taps_fast import TapsModel, TaskBatch, _slices


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("prepared", [False, True])
def test_slices(size, prepared):
    model = fill(three_tasks(Net()))
    x, names = images(7), ["cars", "base", "cubs", "dogs", "cubs", "base", "cars"]
    calls = []
    with torch.no_grad():
        want = model(x, tasks=names)
        if prepared:
            model.prepare_inference(x)
        model.slice = size
        model.model.fc.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
        torch.testing.assert_close(model(x, tasks=names), want)
    assert sum(calls) == 7 and max(calls) == size


def test_slices_of_sorted_ids_and_of_any_output():
    class Two(ConvNet):
        def forward(self, x):
            y = F.relu(self.norm1(self.conv1(x)))
            return {"map": y.permute(1, 0, 2, 3), "logits": super().forward(x)}

    model = three_tasks(Two())
    x, names = images(6), ["cubs", "cubs", "cars", "cars", "dogs", "dogs"]
    want = model(x, tasks=names)
    assert model.slicing.output_axes == [1, 0]
    model.slice = 4
    for order in (range(6), (3, 0, 5, 1, 2, 4)):
        got = model(x[list(order)], tasks=[names[i] for i in order])
        torch.testing.assert_close(got["map"], want["map"][:, list(order)])
        torch.testing.assert_close(got["logits"], want["logits"][list(order)])


def test_no_slices_where_samples_meet_or_in_training():
    class Meets(ConvNet):
        def forward(self, x):
            y = super().forward(x)
            return y @ y.T

    model = three_tasks(Meets(), head=None)
    model(images(2), tasks=["cubs", "cars"])
    model.slice = 1
    assert model.slicing.output_axes is None and model.slice_of(images(2), 2) is None
    model = three_tasks(Net())
    model(images(4), tasks=TASKS[:2] * 2)
    model.slice, calls = 1, []
    model.train()(images(4), tasks=TASKS[:2] * 2)
    model.model.fc.register_forward_hook(lambda *_: calls.append(1))
    model(images(4), tasks=TASKS[:2] * 2)
    assert len(calls) == 1


@pytest.fixture
def forgetful_library(monkeypatch):
    """A C library that gives memory back, which is what automatic slices are for."""
    monkeypatch.setattr(_slices, "gives_memory_back", lambda: True)


def test_the_automatic_rule(forgetful_library, monkeypatch):
    """As many samples as keep the largest layer's input and output under the bytes of a slice, in equal parts."""
    model = three_tasks(Net(), dtype=torch.float32)
    model.probe(images(2, dtype=torch.float32))
    one = 2 * 8 * 8 * 8 * 4  # 8 channels in and 8 out, 8 x 8 pixels
    assert model.slicing.bytes_per_element * 3 * 8 * 8 == one
    big = torch.empty(32, 3, 256, 256, device="meta")
    assert model.slice_of(big, 32) is None  # not a CPU
    most = (24 << 20) // (2 * 8 * 256 * 256 * 4)
    assert most == 6 and model.slice_of(torch.empty(32, 3, 256, 256), 32) == 6
    assert model.slice_of(torch.empty(7, 3, 256, 256), 7) == 4
    assert model.slice_of(torch.empty(6, 3, 256, 256), 6) is None
    monkeypatch.setattr(_slices, "gives_memory_back", lambda: False)
    assert model.slice_of(torch.empty(32, 3, 256, 256), 32) is None
    model.slice = 8
    assert model.slice_of(torch.empty(32, 3, 256, 256), 32) == 8


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="how to tell another C library to keep memory")
@pytest.mark.parametrize("kept", [False, True])
def test_whether_memory_is_given_back(kept):
    told = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 32)} if kept else {}
    untold = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD"))}
    code = "from taps_fast._slices import gives_memory_back; print(gives_memory_back())"
    found = subprocess.run([sys.executable, "-c", code], env=untold | told, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(not kept)


def test_automatic_slices_hold_whole_tasks(forgetful_library):
    """Where tasks have equally many samples: then most slices need one weight."""
    model = three_tasks(Net(), dtype=torch.float32)
    model.probe(images(2, dtype=torch.float32))
    big = torch.empty(24, 3, 256, 256)
    assert model.slice_of(big, 24) == 6
    for each, most in ((1, 6), (2, 6), (3, 6), (4, 4), (6, 6), (8, 8), (12, 6), (24, 6)):
        whole = TaskBatch.from_ids([i // each for i in range(24)], 24 // each)
        assert model.slice_of(big, 24, whole) == most, each
    assert model.slice_of(big, 24, TaskBatch.from_ids([0] * 4 + [1] * 20, 2)) == 6
    assert model.slice_of(big[:6], 6, TaskBatch.from_ids([0, 1, 2] * 2, 3)) is None


def test_one_layer_is_not_sliced(forgetful_library):
    """Copies of its input and output would cost more than the layer."""
    model = TapsModel(nn.Sequential(nn.BatchNorm2d(3)), ["cubs", "cars"]).eval()
    model(images(2, dtype=torch.float32), tasks=["cubs", "cars"])
    big = torch.empty(32, 3, 512, 512)
    assert model.slice_of(big, 32) is None
    model.slice = 8
    assert model.slice_of(big, 32) == 8


def test_transformers_slice_and_prepare():
    model = three_tasks(Transformer())
    x = images(5)
    want = model(x, tasks=MIX)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = model.prepare_inference(x)
    assert folded(report)["block.fc1"] == "with gelu"
    model.slice = 2
    torch.testing.assert_close(model(x, tasks=MIX), want)
