"""A merged folder is one that transformers' ``from_pretrained`` loads. Run where transformers is installed."""

from __future__ import annotations

import pytest
import torch

from taps_fast.merging import MergedModel, TaskVectors, save_merged, task_arithmetic

transformers = pytest.importorskip("transformers")


def test_from_pretrained_loads_a_merged_folder(tmp_path):
    """Folders in, folder out; tied weights too, which the file holds once."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=40, n_positions=20)
    models = [transformers.GPT2LMHeadModel(config).eval() for _ in range(3)]
    folders = [tmp_path / name for name in ("base", "a", "b")]
    for model, folder in zip(models, folders, strict=True):
        model.save_pretrained(folder)
    vectors = TaskVectors.from_checkpoints(folders[0], {"a": folders[1], "b": folders[2]})
    merged = task_arithmetic(vectors, 0.5)
    save_merged(merged, tmp_path / "merged", like=folders[0])
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "merged")
    states = [model.state_dict() for model in models]
    for name, tensor in loaded.state_dict().items():
        base, a, b = (state[name] for state in states)
        torch.testing.assert_close(tensor, base + 0.5 * (a - base) + 0.5 * (b - base))
    tokens = torch.arange(10)[None]
    ours = MergedModel(models[0], vectors, init=0.5)(input_ids=tokens).logits
    torch.testing.assert_close(ours.detach(), loaded.eval()(input_ids=tokens).logits.detach(), atol=1e-5, rtol=1e-4)
