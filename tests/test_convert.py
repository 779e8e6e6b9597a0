"""What is converted, skipped and refused: nothing may be silently wrong."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from efficientnet_lite_pytorch import EfficientNet
from nets import ConvNet, Transformer, assert_rows_as_separate, images, perturb, three_tasks
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from taps_fast import FastTapsConv2d, FastTapsLinear, TapsModel


def verdicts(model):
    return {row.path: row.verdict for row in model.conversion.rows}


def reason(model, path):
    return next(row.reason for row in model.conversion.rows if row.path == path)


def test_the_report_has_a_row_a_module():
    model = TapsModel(Transformer(), head="fc")
    assert verdicts(model) == {"(root)": "skipped"} | dict.fromkeys(
        ["patch", "block.norm1", "block.norm2", "block.qkv", "block.proj", "block.fc1", "block.fc2", "norm", "fc"],
        "converted",
    )
    text = str(model.conversion)
    assert "block.qkv    Linear       converted  a gated delta per task" in text
    assert text.endswith("9 converted, 1 skipped, 0 refused; 5 layers have gates")
    assert "Transformer is not adapted" in reason(model, "(root)")


def test_the_users_model_is_left_as_it_is():
    net = ConvNet().double().train()
    before, types = copy.deepcopy(net.state_dict()), [type(m) for m in net.modules()]
    storages = [p.data_ptr() for p in net.parameters()]
    model = three_tasks(net.train())
    model.train()(images(4), tasks=["cubs", "cars", "cubs", "cars"]).nan_to_num(neginf=0).sum().backward()
    assert [type(m) for m in net.modules()] == types and [p.data_ptr() for p in net.parameters()] == storages
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert model.model.conv1.base.data_ptr() == net.conv1.weight.data_ptr()
    frozen = [p for name, p in model.named_parameters() if not any(f".{task}" in name for task in model.tasks)]
    assert frozen and not any(p.requires_grad for p in frozen)


def test_modes_of_the_users_modules_stay():
    net = ConvNet().train()
    net.norm1.eval()
    net.conv3.eval()
    model = TapsModel(net, ["cubs"])
    assert model.training and model.model.training and model.model.conv1.training
    assert not model.model.norm1.training and not model.model.conv3.training
    model.eval()
    assert not model.model.conv2.module.training


def test_include_and_exclude():
    net = Transformer()
    assert list(TapsModel(net, include="block").conversion.layers) == [
        "block.qkv",
        "block.proj",
        "block.fc1",
        "block.fc2",
    ]
    assert list(TapsModel(net, include=["*.fc?", nn.Conv2d]).conversion.layers) == ["patch", "block.fc1", "block.fc2"]
    model = TapsModel(net, exclude=["block.*", "norm"], head="fc")
    assert list(model.conversion.layers) == ["patch"] and list(model.conversion.norms) == []
    assert "excluded" in reason(model, "block.norm1") and type(model.model.block.qkv) is nn.Linear
    assert not list(TapsModel(net, exclude=nn.LayerNorm).conversion.norms)
    attention = nn.TransformerEncoderLayer(8, 2, 16)
    assert list(TapsModel(attention, exclude="self_attn.out_proj").conversion.layers) == ["linear1", "linear2"]
    assert list(TapsModel(attention, include="self_attn").conversion.attentions) == ["self_attn"]
    for option in ("include", "exclude"):
        with pytest.raises(
            ValueError, match=rf"{option} must match a module, got 'block.qvk' \(did you mean 'block.qkv'"
        ):
            TapsModel(net, **{option: ["block.qvk"]})
        with pytest.raises(
            ValueError, match=rf"{option} must match a module, got <class .*Bilinear'> \(no module of this"
        ):
            TapsModel(net, **{option: nn.Bilinear})


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (
            lambda: TapsModel(ConvNet(), head="fcc"),
            r"head must name a module of the model, got 'fcc' \(near: fc; the last Linear: fc\)$",
        ),
        (lambda: TapsModel(ConvNet(), norms="own"), "norms must be 'task' or 'shared', got 'own'"),
        (lambda: TapsModel(nn.Sequential(nn.LazyLinear(3))), "model must be initialised, got a lazy LazyLinear at '0'"),
        (
            lambda: TapsModel(TapsModel(nn.Linear(2, 2)).model),
            "must not be adapted already, got a FastTapsLinear at ''",
        ),
        (lambda: TapsModel(torch.compile(nn.Linear(2, 2))), "must be the module before torch.compile"),
    ],
)
def test_models_that_cannot_be_adapted(build, text):
    with pytest.raises(ValueError, match=text):
        build()


def test_only_modules():
    with pytest.raises(TypeError, match="model must be an nn.Module, got function"):
        TapsModel(lambda x: x)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.middle = nn.Linear(4, 4)
        self.decoder = nn.Linear(4, 10, bias=False)
        self.decoder.weight = self.embed.weight

    def forward(self, x):
        return self.decoder(self.middle(self.embed(x)))


def test_tied_weights_stay_tied_and_shared():
    net = Tied().double()
    model = perturb(TapsModel(net, ["cubs", "cars"]))
    assert verdicts(model) == {"embed": "refused", "middle": "converted", "decoder": "refused"}
    assert "its weight is tied with embed.weight" in reason(model, "decoder")
    assert model.model.decoder.weight is model.model.embed.weight
    plain = model.merge("cubs")
    assert plain.decoder.weight is plain.embed.weight and plain.decoder.weight is not net.embed.weight
    assert_rows_as_separate(model, torch.randint(10, (3, 5)), ["cubs", "cars", None])


class Shared(nn.Module):
    """One module object in two places, in a list that is no ModuleList, and called twice."""

    def __init__(self):
        super().__init__()
        layer = nn.Linear(4, 4)
        self.steps = nn.ModuleDict({"a": layer, "b": layer})
        self.also = [layer]

    def forward(self, x):
        return self.also[0](torch.relu(self.steps["b"](torch.relu(self.steps["a"](x)))))


def test_one_module_in_several_places_is_adapted_once():
    model = perturb(TapsModel(Shared().double(), ["cubs", "cars"]), closed=())
    model.conversion.layers["steps.a"].scores["cubs"].data.fill_(0.2)
    assert list(model.conversion.layers) == ["steps.a"] and len(list(model.parameters())) == 2 + 2 * 3
    assert model.model.also[0] is model.model.steps["a"] is model.model.steps["b"]
    plain = assert_rows_as_separate(model, torch.randn(3, 4).double(), ["cubs", "cars", "cubs"])
    assert plain.shape == (3, 4)
    merged = model.merge("cubs")
    assert merged.also[0] is merged.steps["a"] and type(merged.also[0]) is nn.Linear


def lora():
    layer = type("Linear", (nn.Linear,), {"__module__": "loralib.layers"})(4, 4)
    layer.lora_A = nn.Parameter(torch.zeros(2, 4))
    return layer


def replaced():
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: F.linear(x, layer.weight * 2)
    return layer


def integer():
    layer = nn.Linear(4, 4, bias=False)
    layer.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    return layer


REFUSED = {
    "parametrized": (lambda: parametrizations.weight_norm(nn.Linear(4, 4)), r"parametrized \(weight\)"),
    "old weight norm": (lambda: weight_norm(nn.Linear(4, 4)), "computed by a hook from bias, weight_g, weight_v"),
    "old spectral norm": (lambda: spectral_norm(nn.Linear(4, 4)), "computed by a hook from bias, weight_orig"),
    "lora": (lora, r"LoRA \(lora_A\) merges into its weight in place"),
    "replaced forward": (replaced, "its forward was replaced on the instance"),
    "integer": (integer, "its weight is a Parameter of torch.int8"),
    "quantised": (
        lambda: torch.ao.nn.qat.Linear(4, 4, qconfig=torch.ao.quantization.default_qat_qconfig),
        "is quantised",
    ),
    "kdim": (lambda: nn.MultiheadAttention(4, 2, kdim=3), "kdim and vdim must be embed_dim"),
    "bias_kv": (lambda: nn.MultiheadAttention(4, 2, add_bias_kv=True), "add_bias_kv is not supported"),
    "zero": (lambda: nn.MultiheadAttention(4, 2, add_zero_attn=True), "add_zero_attn is not supported"),
    "own attention": (
        lambda: type("Mine", (nn.MultiheadAttention,), {})(4, 2),
        "Mine may use its weights in another way",
    ),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_and_left_working(name):
    build, text = REFUSED[name]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(build())).eval()
    x = torch.randn(3, 4)
    net(x) if "norm" in name else None  # leaves the hook's last weight, which is no leaf, on the module
    model = TapsModel(net, ["cubs"])
    assert verdicts(model)["1.0"] == "refused"
    assert re.search(text, reason(model, "1.0")) and "shared and frozen" in reason(model, "1.0")
    assert list(model.conversion.layers) == ["0"] and type(model.model[1][0]) is type(net[1][0])
    if isinstance(net[1][0], nn.Linear) and name not in ("integer", "quantised", "replaced forward"):
        torch.testing.assert_close(model(x, tasks="cubs"), net(x))
        torch.testing.assert_close(model.merge("cubs")(x), net(x))


@pytest.mark.parametrize("norm", [spectral_norm, parametrizations.spectral_norm])
def test_training_does_not_move_the_spectral_norms_of_the_base(norm):
    """Each of their forwards in training is a step of an iteration: the base would be another, and folders refused."""
    model = copy.deepcopy(TapsModel(nn.Sequential(norm(nn.Linear(4, 4)), nn.Dropout(0.5), nn.Linear(4, 2)), ["cubs"]))
    before = model.fingerprint()
    for _ in range(2):
        model(torch.randn(3, 4)).sum().backward()
        assert model.fingerprint() == before and model.train().model[1].training
    assert all(module.training for module in model.merge("cubs").modules())


class ConvBN(nn.Conv2d):
    """A convolution with its norm inside, as detectron2's."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.norm = nn.BatchNorm2d(self.out_channels)

    def forward(self, x):
        return self.norm(F.conv2d(x, self.weight, self.bias))


@pytest.mark.parametrize("options", [{}, {"exclude": "0"}, {"include": "1"}], ids=str)
def test_training_does_not_move_norms_that_tasks_share(options):
    """Inside a layer, adapted or not, or in the head's base: one task would move what another gives, and the base."""
    net = nn.Sequential(ConvBN(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Sequential(nn.BatchNorm1d(8)))
    model = TapsModel(net.train(), ["a", "b"], head="3", **options)
    assert verdicts(model)["0.norm"] == "skipped" and "shared and frozen, in eval mode" in reason(model, "0.norm")
    x = torch.randn(4, 3, 5, 5)
    before, want = model.fingerprint(), [model.eval()(x, tasks=task) for task in ("a", "base")]
    model.train()
    for tasks in ("b", "base"):
        model(x + 1, tasks=tasks)
    found = [model.eval()(x, tasks=task) for task in ("a", "base")]
    assert model.fingerprint() == before and all(map(torch.equal, found, want))
    assert model.train().model[3].tasks["b"][0].num_batches_tracked == 1
    assert all(module.training for module in model.merge("a").modules())
    nn.SyncBatchNorm.convert_sync_batchnorm(model).train()  # other modules, of which the same is true
    kinds = [(name, m.training) for name, m in model.named_modules() if isinstance(m, nn.SyncBatchNorm)]
    assert len(kinds) == 4 and all(training == (".tasks." in name) for name, training in kinds)


def test_a_layer_is_not_excluded_by_what_is_inside():
    model = TapsModel(nn.Sequential(ConvBN(3, 8, 3), nn.BatchNorm2d(8)), ["a"], exclude=[nn.BatchNorm2d])
    assert verdicts(model) == {"0": "converted", "0.norm": "skipped", "1": "skipped"}


def test_frozen_and_stateless_norms():
    class FrozenBatchNorm2d(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("weight", "bias", "running_mean", "running_var"):
                self.register_buffer(name, torch.rand(4))

        def forward(self, x):
            return x * self.weight[:, None, None]

    net = nn.Sequential(FrozenBatchNorm2d(), nn.LayerNorm(4, elementwise_affine=False), nn.InstanceNorm2d(4))
    model = TapsModel(net, ["cubs"])
    assert verdicts(model) == {"0": "skipped"} and "FrozenBatchNorm2d is not adapted" in reason(model, "0")


def test_modules_named_norm_that_hold_layers_are_no_norms():
    class PreNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.gamma = nn.Parameter(torch.ones(4))
            self.norm, self.fn = nn.LayerNorm(4), nn.Linear(4, 4)

        def forward(self, x):
            return self.gamma * self.fn(self.norm(x))

    model = TapsModel(PreNorm(), ["cubs"])
    assert list(model.conversion.layers) == ["fn"] and list(model.conversion.norms) == ["norm"]


def test_other_kinds_are_skipped():
    net = nn.Sequential(nn.Conv1d(4, 4, 1), nn.ConvTranspose2d(4, 4, 1), nn.LSTM(4, 4), nn.Embedding(4, 4))
    model = TapsModel(net, ["cubs"])
    assert set(verdicts(model).values()) == {"skipped"} and not model.conversion.layers
    with pytest.raises(ValueError, match="there must be adapted layers and tasks"):
        model.penalty("cubs")


@pytest.mark.parametrize("batch_first", [True, False])
def test_transformer_encoder_does_not_take_its_fast_path(batch_first):
    """In evaluation without gradients torch's encoder reads its layers' weights in C++: it would skip every delta."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first, dropout=0.0, activation="gelu")
    net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first).double().eval()
    model = perturb(TapsModel(net, ["cubs", "cars"]))
    assert len(model.conversion.layers) == 8 and len(model.conversion.norms) == 4
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    axis = 0 if batch_first else 1
    x = x if batch_first else x.transpose(0, 1)
    with torch.no_grad():
        torch.testing.assert_close(model(x, tasks="base"), net(x))
        assert_rows_as_separate(model, x, ["cubs", None, "cars"], axis)
        padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 5])
        got, want = (
            m(x, src_key_padding_mask=padding)
            for m in (lambda x, **k: model(x, tasks="cubs", **k), model.merge("cubs"))
        )
        seen = (slice(None), slice(0, 3)) if batch_first else (slice(0, 3),)
        torch.testing.assert_close(got[seen], want[seen])
    merged = model.merge("cubs")
    assert merged.layers[0].activation_relu_or_gelu == 2 and type(merged.layers[0].self_attn) is nn.MultiheadAttention
    assert merged.use_nested_tensor == net.use_nested_tensor


def test_an_encoder_and_decoder():
    """Cross-attention, sequence first, and a causal mask."""
    torch.manual_seed(0)
    net = nn.Transformer(8, 2, 1, 1, 16, dropout=0.0).double().eval()
    model = perturb(TapsModel(net, ["cubs", "cars"]))
    assert len(model.conversion.attentions) == 3 and not model.conversion.of("refused")
    source, target = torch.randn(6, 3, 8).double(), torch.randn(5, 3, 8).double()
    mask = net.generate_square_subsequent_mask(5, dtype=torch.float64)
    torch.testing.assert_close(model(source, target, tgt_mask=mask, tasks="base"), net(source, target, tgt_mask=mask))
    y = model(source, target, tgt_mask=mask, tgt_is_causal=True, tasks=["cars", None, "cubs"])
    for i, task in enumerate(["cars", "base", "cubs"]):
        alone = model.merge(task)(source[:, i : i + 1], target[:, i : i + 1], tgt_mask=mask)
        torch.testing.assert_close(y[:, i : i + 1], alone)


def test_reading_a_layers_weight_is_right_for_one_task_and_an_error_in_a_mixed_batch():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return F.linear(x, self.layer.weight, self.layer.bias)

    model = perturb(TapsModel(Reads().double(), ["cubs", "cars"]))
    model.conversion.layers["layer"].scores["cubs"].data.fill_(0.2)
    x = torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(model(x, tasks="cubs"), model.merge("cubs")(x))
    model.probe(x)
    with pytest.raises(RuntimeError, match="layer: weight must be used with one task active"):
        model(x, tasks=[0, 1, 0])


def test_a_model_that_is_one_layer():
    for net, kind, x in (
        (nn.Linear(4, 3), FastTapsLinear, torch.randn(3, 4)),
        (nn.Conv2d(3, 4, 1), FastTapsConv2d, images(3).float()),
    ):
        model = perturb(TapsModel(net, ["cubs", "cars"]))
        assert isinstance(model.model, kind)
        assert_rows_as_separate(model, x, ["cubs", None, "cars"])
        assert type(model.merge("cubs")) is type(net)


def test_efficientnet_lite():
    """A real network: it pads in a subclass of Conv2d, which runs fused in mixed batches."""
    net = EfficientNet.from_name("efficientnet-lite0").eval()
    torch.manual_seed(0)
    model = TapsModel(net, head="_fc")
    model.add_task("cubs", 3)
    model.add_task("cars", 5)
    assert (
        not model.conversion.of("refused") and len(model.conversion.layers) == 49 and len(model.conversion.norms) == 49
    )
    assert all(layer.fused for layer in model.conversion.layers.values())
    for layer in list(model.conversion.layers.values())[40:]:
        torch.nn.init.normal_(layer.deltas["cars"], std=0.02)
    with torch.no_grad():
        assert_rows_as_separate(model, images(3, 32, torch.float32), ["cars", "cubs", "cars"])
