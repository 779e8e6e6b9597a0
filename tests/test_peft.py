"""LoRA adapters that PEFT saved: read exactly, or refused by name."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from nets import ConvNet, Transformer, images
from safetensors.torch import save_file
from torch import nn

from taps_fast import TapsModel
from taps_fast.peft import AdapterError, read_lora

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["fc1"], "bias": "none", "lora_dropout": 0.1}


def pair(path, out, into, rank=2, seed=0, kernel=()):
    g = torch.Generator().manual_seed(seed)
    start = f"base_model.model.{path}.lora_"
    return {
        f"{start}A.weight": torch.randn(rank, into, *kernel, generator=g),
        f"{start}B.weight": torch.randn(out, rank, *(1 for _ in kernel), generator=g),
    }


def folder(path, tensors, **config):
    path.mkdir(exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    save_file(tensors, path / "adapter_model.safetensors")
    return path


@pytest.mark.parametrize("stabilised", [False, True])
def test_scales_and_patterns(tmp_path, stabilised):
    tensors = pair("a.fc1", 4, 6) | pair("b.fc1", 4, 6, rank=3) | pair("b.fc2", 5, 4)
    where = folder(
        tmp_path, tensors, use_rslora=stabilised, rank_pattern={r"b\.fc1": 3}, alpha_pattern={"fc2": 1, "fc1": 16}
    )
    deltas = read_lora(where)
    assert set(deltas) == {"a.fc1", "b.fc1", "b.fc2"}
    for path, rank, alpha in (("a.fc1", 2, 16), ("b.fc1", 3, 16), ("b.fc2", 2, 1)):
        a, b = (tensors[f"base_model.model.{path}.lora_{n}.weight"] for n in "AB")
        expected = alpha / (math.sqrt(rank) if stabilised else rank) * b @ a
        torch.testing.assert_close(deltas[path].dense(), expected)


def test_model(tmp_path):
    """The task's merged weights are the base's plus the adapter's; other layers are closed."""
    torch.manual_seed(0)
    net = Transformer().eval()
    model = TapsModel(net, head="fc")
    tensors = pair("block.fc1", 16, 8) | pair("patch", 8, 3, kernel=(4, 4), seed=1)
    loaded = model.load_lora(folder(tmp_path, tensors), "cubs", classes=3)
    opened = [path for path, layer in model.conversion.layers.items() if layer.is_open("cubs")]
    assert opened == ["patch", "block.fc1"] and loaded.open_layers == 2 and model.widths["cubs"] == 3
    merged = model.merge("cubs")
    a, b = (tensors[f"base_model.model.patch.lora_{n}.weight"] for n in "AB")
    torch.testing.assert_close(
        merged.patch.weight, net.patch.weight + 4 * (b.flatten(1) @ a.flatten(1)).view(8, 3, 4, 4)
    )
    assert torch.equal(merged.block.fc2.weight, net.block.fc2.weight)
    x = images(4, dtype=torch.float32)
    mixed = model(x, tasks=["cubs", "base", "cubs", "base"])
    torch.testing.assert_close(mixed[::2, :3], merged(x)[::2])
    torch.testing.assert_close(mixed[1::2], net(x)[1::2])
    model.save_task("cubs", tmp_path / "task")
    other = TapsModel(net, head="fc")
    other.load_task(tmp_path / "task")
    torch.testing.assert_close(other(x, tasks="cubs"), model(x, tasks="cubs"))


@pytest.mark.parametrize(
    ("config", "tensors", "text"),
    [
        ({"peft_type": "IA3"}, {}, "peft_type must be LORA, got 'IA3'"),
        ({"use_dora": True}, {}, "use_dora must not be set, got True"),
        ({"lora_bias": True}, {}, "lora_bias must not be set, got True"),
        ({"layer_replication": [[0, 2]]}, {}, "layer_replication must not be set"),
        ({"something_new": {"a": 1}}, {}, "something_new must not be set, got {'a': 1}"),
        ({"bias": "all"}, {}, "bias must be 'none', got 'all'"),
        (
            {"init_lora_weights": "pissa"},
            {},
            "init_lora_weights must leave the base's weights as they are, got 'pissa'",
        ),
        ({}, {"base_model.model.fc.weight": torch.ones(2, 2)}, "got 'base_model.model.fc.weight' .*modules_to_save"),
        (
            {"modules_to_save": ["score", "fc"]},
            {"base_model.model.a.fc.weight": torch.ones(2, 2), **pair("fc1", 4, 6)},
            "modules_to_save must name nothing but the model's head, of which there is none here, got 'a.fc.weight'",
        ),
        (
            {"lora_alpha": 1e39},
            pair("fc1", 4, 6),
            r"'fc1' must give a scale that is finite in torch.float32, got 1e\+39",
        ),
        (
            {"lora_alpha": 1e6},
            {name: t.half() for name, t in pair("fc1", 4, 6).items()},
            "'fc1' must give a scale that is finite in torch.float16, got 1000000.0",
        ),
        (
            {},
            {**pair("c", 8, 4, kernel=(3, 3)), "base_model.model.c.lora_B.weight": torch.ones(8, 1, 1, 1)},
            r"'c' must be a convolution of one group, got 2 \(an adapter of a convolution in groups mixes channels",
        ),
        ({}, {"base_model.model.fc1.lora_magnitude_vector": torch.ones(2)}, "DoRA is not a low-rank delta"),
        ({}, {"base_model.model.e.lora_embedding_A": torch.ones(2, 2)}, "embeddings have no low-rank deltas"),
        ({}, dict([*pair("fc1", 4, 6).items()][:1]), "'fc1' must have lora_A and lora_B, got no lora_B"),
        ({"r": 3}, pair("fc1", 4, 6), r"'fc1' must be \[3, I\] and \[O, 3\].* got \(2, 6\) and \(4, 2\)"),
        ({}, {}, "must hold lora_A and lora_B weights, got none"),
        ({"lora_alpha": None}, pair("fc1", 4, 6), "lora_alpha of 'fc1' must be a finite number, got None"),
        ({"lora_alpha": "8"}, pair("fc1", 4, 6), "lora_alpha of 'fc1' must be a finite number, got '8'"),
        ({"alpha_pattern": {"fc1": math.nan}}, pair("fc1", 4, 6), "lora_alpha of 'fc1' must be .* got nan"),
        ({"r": True}, pair("fc1", 4, 6, rank=1), "r of 'fc1' must be a finite number, got True"),
        ({"r": 0}, pair("fc1", 4, 6, rank=0), r"'fc1' must be \[0, I\]"),
        ({"rank_pattern": [2]}, pair("fc1", 4, 6), r"rank_pattern must be numbers by module, got \[2\]"),
        ({"rank_pattern": {"(": 2}}, pair("fc1", 4, 6), r"rank_pattern must have regular expressions .* got '\('"),
    ],
)
def test_refusals(tmp_path, config, tensors, text):
    with pytest.raises(AdapterError, match=f"^read_lora: .*{text}"):
        read_lora(folder(tmp_path, tensors, **config))


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(AdapterError, match="with adapter_config.json, got none in"):
        read_lora(tmp_path)
    where = folder(tmp_path, pair("fc1", 4, 6))
    (where / "adapter_model.safetensors").write_bytes(b"half")
    with pytest.raises(AdapterError, match="must be a whole safetensors file"):
        read_lora(where)
    (where / "adapter_model.safetensors").rename(where / "adapter_model.bin")
    with pytest.raises(AdapterError, match="pickled, which is never loaded"):
        read_lora(where)
    (where / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match="adapter_config.json must be JSON"):
        read_lora(where)


def test_layers_that_do_not_fit(tmp_path):
    model = TapsModel(ConvNet().eval(), head="fc")
    with pytest.raises(AdapterError, match=r"got 'conv9'; did you mean 'conv\d'\? \(1 of 1 are none\)"):
        model.load_lora(folder(tmp_path, pair("conv9", 8, 3, kernel=(3, 3))), "cubs")
    with pytest.raises(AdapterError, match=r"delta of 'conv1' must be \(8, 3, 3, 3\).*, got \(8, 5, 3, 3\)"):
        model.load_lora(folder(tmp_path, pair("conv1", 8, 5, kernel=(3, 3))), "cubs")
    with pytest.raises(
        AdapterError, match=r"must be \(8, 4, 3, 3\).* got \(8, 8, 3, 3\) \(an adapter of a .* in groups"
    ):
        model.load_lora(folder(tmp_path, pair("conv2", 8, 8, kernel=(3, 3))), "cubs")
    assert model.tasks == []


@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
def test_a_head_that_is_saved_whole(tmp_path, prefix):
    """`modules_to_save` of an adapter becomes the task's head, of its own width."""
    net = Transformer().eval()
    model, x = TapsModel(net, head="fc"), images(2, dtype=torch.float32)
    kept = ".modules_to_save.default" if prefix else ""
    saved = {f"{prefix}fc{kept}.weight": torch.randn(3, 8), f"{prefix}fc{kept}.bias": torch.randn(3)}
    where = folder(tmp_path, pair("block.fc1", 16, 8) | saved, modules_to_save=["score", "fc"])
    assert model.load_lora(where, "cubs").tensors == 4 and model.widths["cubs"] == 3
    head = model.conversion.head.tasks["cubs"]
    assert torch.equal(head.weight, saved[f"{prefix}fc{kept}.weight"]) and head.weight.requires_grad
    torch.testing.assert_close(model(x, tasks="cubs"), model.merge("cubs")(x))
    with pytest.raises(AdapterError, match="the head that is saved must fit the task's: [^,]*size mismatch"):
        model.load_lora(where, "dogs", classes=4)
    with pytest.raises(AdapterError, match="but the model's head, 'norm' here, got 'fc.bias', which is saved whole"):
        TapsModel(net, head="norm").load_lora(where, "dogs")
    assert model.tasks == ["cubs"]


def test_a_head_that_peft_saves(tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)).eval()
    config = peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"], init_lora_weights=False)
    wrapped = peft.get_peft_model(copy.deepcopy(net), config).eval()
    with torch.no_grad():
        wrapped.base_model.model[2].modules_to_save["default"].weight.normal_()
    wrapped.save_pretrained(tmp_path)
    model, x = TapsModel(net, head="2"), torch.randn(3, 6)
    model.load_lora(tmp_path, "cubs")
    torch.testing.assert_close(model(x, tasks="cubs"), wrapped(x))
    grouped = nn.Sequential(nn.Conv2d(8, 8, 3, groups=4))
    peft.get_peft_model(grouped, peft.LoraConfig(r=4, target_modules=["0"])).save_pretrained(tmp_path / "grouped")
    with pytest.raises(AdapterError, match="'0' must be a convolution of one group, got 4"):
        read_lora(tmp_path / "grouped")


def test_what_peft_saves(tmp_path):
    """Outputs equal PEFT's own for what it wrote."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 12), nn.ReLU(), nn.Linear(12, 5))
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["0", "3", "5"], rank_pattern={"3": 2}, alpha_pattern={"5": 3},
        use_rslora=True, init_lora_weights=False,
    )  # fmt: skip
    wrapped = peft.get_peft_model(copy.deepcopy(net), config)
    wrapped.save_pretrained(tmp_path)
    model = TapsModel(net.eval())
    model.load_lora(tmp_path, "cubs")
    x = images(3, dtype=torch.float32)
    torch.testing.assert_close(model(x, tasks="cubs"), wrapped.eval()(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("module", ["attn.c_proj", "c_attn"])  # square, and not
def test_what_peft_saves_of_gpt2(tmp_path, module):
    """Its layers store their weight as [I, O]."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    net = transformers.GPT2Model(transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=40)).eval()
    config = peft.LoraConfig(r=4, target_modules=[module], fan_in_fan_out=True, init_lora_weights=False)
    wrapped = peft.get_peft_model(copy.deepcopy(net), config).eval()
    wrapped.save_pretrained(tmp_path)
    model = TapsModel(net)
    model.load_lora(tmp_path, "cubs")
    tokens = torch.arange(10)[None]
    expected = wrapped(input_ids=tokens).last_hidden_state
    torch.testing.assert_close(model(input_ids=tokens, tasks="cubs").last_hidden_state, expected, atol=1e-4, rtol=1e-4)
