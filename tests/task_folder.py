"""A task as its folder holds it, for the tests of task folders."""

from __future__ import annotations

import torch

META = {"task": "cubs", "fingerprint": "sha256:" + "ab" * 32, "sharing": {"layers": []}, "classes": 3, "threshold": 0.1}


def some_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "fc1.deltas.cubs": torch.randn(5, 7, generator=g),
        "fc2.deltas.cubs": torch.randn(3, 5, generator=g).bfloat16(),
        "fc1.scores.cubs": torch.tensor(0.15),
        "bn.num_batches_tracked.cubs": torch.tensor(12),
    }


def assert_same(found, wanted):
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        torch.testing.assert_close(found[name], tensor.cpu().contiguous(), rtol=0, atol=0, equal_nan=True, msg=name)


def tensor_file(folder):
    (path,) = folder.glob("tensors-*.safetensors")
    return path
