"""Task folders through TapsModel: only what differs from the base, exactly, and all of it or nothing."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from nets import TASKS, ConvNet, Transformer, assert_rows_as_separate, images, three_tasks
from safetensors.torch import load_file, save_file
from torch import nn

from taps_fast import TapsModel, store


def fresh(net, **options):
    return TapsModel(net.double().eval(), **{"head": "fc", **options})


@pytest.fixture(scope="module", params=[ConvNet, Transformer])
def saved(request, tmp_path_factory):
    """A network, three tasks over it, and their folders."""
    torch.manual_seed(0)
    net = request.param()
    model = three_tasks(net)
    root = tmp_path_factory.mktemp("tasks")
    for task in TASKS:
        model.save_task(task, root / task)
    return net, model, root


def test_loaded_tasks_are_the_saved_ones(saved):
    net, model, root = saved
    other = fresh(net)
    for task in ("dogs", "cubs", "cars"):
        loaded = other.load_task(root / task)
        tensors, _ = store.read_task(root / task)
        opened = [layer.is_open(task) for layer in model.conversion.layers.values()]
        assert loaded == (task, len(tensors), sum(opened), len(opened))
        assert str(loaded) == f"{task}: {len(tensors)} tensors matched, {sum(opened)} of {len(opened)} layers open"
        for was_open, layer in zip(opened, other.conversion.layers.values(), strict=True):
            assert (task in layer.deltas) == was_open and task in layer.scores
    x = images(5)
    rows = ["cars", "dogs", "cubs", None, "cars"]
    for task in TASKS:
        assert torch.equal(other(x, tasks=task), model(x, tasks=task))
    torch.testing.assert_close(other(x, tasks=rows), model(x, tasks=rows))
    assert_rows_as_separate(other, x, rows)
    assert other.fingerprint() == model.fingerprint() and other.widths["cars"] == 5


def test_only_open_deltas_are_on_disk(saved):
    _, model, root = saved
    tensors, meta = store.read_task(root / "cars")
    layers = model.conversion.layers
    assert {n for n in tensors if n.endswith(".delta")} == {
        f"{p}.delta" for p, m in layers.items() if m.is_open("cars")
    }
    assert {n for n in tensors if n.endswith(".score")} == {f"{p}.score" for p in layers}
    assert 0 < sum(m.is_open("cars") for m in layers.values()) < len(layers)
    assert meta["task"] == "cars" and meta["head"] == {"kind": "classes", "classes": 5} and meta["threshold"] == 0.1
    assert len(meta["sharing"]["layers"]) == len(layers)


@pytest.mark.parametrize("gate", ["ste", "raw"])
def test_an_open_score_without_a_delta(gate, tmp_path):
    net = ConvNet().eval()
    model = TapsModel(net, ["cubs"], head="fc", gate=gate)
    model.conversion.layers["conv1"].close("cubs")
    model.save_task("cubs", tmp_path)
    other = TapsModel(net, head="fc", gate=gate)
    other.load_task(tmp_path)
    assert other.state_dict().keys() == model.state_dict().keys()
    assert other.conversion.layers["conv1"].scores["cubs"] == 0.15 and other.sharing() == model.sharing()


def test_a_loaded_task_trains_on_and_saves_again(saved, tmp_path):
    net, model, root = saved
    other = fresh(net)
    other.load_task(root / "cars", name="autos")
    closed = [layer for layer in other.conversion.layers.values() if not layer.is_open("autos")]
    other(images(4), tasks="autos").sum().backward()
    assert all(layer.scores["autos"].grad is None for layer in closed)
    scores = [layer.scores["autos"].item() for layer in other.conversion.layers.values() if layer not in closed]
    other.reopen("autos")
    assert all(layer.is_open("autos") and not layer.deltas["autos"].any() for layer in closed)
    assert scores == [layer.scores["autos"].item() for layer in other.conversion.layers.values() if layer not in closed]
    torch.testing.assert_close(other(images(2), tasks="autos").shape, model(images(2), tasks="cars").shape)
    other(images(4), tasks="autos").sum().backward()
    assert all(layer.scores["autos"].grad is not None for layer in closed)
    other.save_task("autos", tmp_path)
    assert store.read_task(tmp_path)[1]["task"] == "autos"


def test_saving_over_a_folder_replaces_it(saved, tmp_path):
    net, model, _ = saved
    model.save_task("cubs", tmp_path)
    model.save_task("cars", tmp_path)
    assert fresh(net).load_task(tmp_path).task == "cars" and len(list(tmp_path.iterdir())) == 2


def unchanged(model, act, text, kind=store.TaskFolderError):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(kind, match=text):
        act()
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def rewrite(source, folder, change):
    """A valid folder with other content."""
    tensors, meta = store.read_task(source)
    change(tensors, meta)
    store.save_task(folder, tensors, {k: v for k, v in meta.items() if k not in ("format", "library", "tensors")})
    return folder


def test_nothing_is_half_loaded(saved, tmp_path):
    net, _, root = saved
    model = fresh(net)
    model.load_task(root / "dogs")
    other = copy.deepcopy(net)
    next(other.parameters()).data.view(-1)[0] += 1e-6
    different = fresh(other)
    unchanged(different, lambda: different.load_task(root / "cars"), "must be of this model's base")
    unchanged(
        model,
        lambda: model.load_task(root / "dogs"),
        r"name must be new, got 'dogs' \(.*; load_task\(folder, name=\.\.\.\)",
        ValueError,
    )
    unchanged(model, lambda: model.load_task(root / "cars", name="a.b"), "task must be a name", ValueError)
    unchanged(model, lambda: model.load_task(tmp_path / "none"), "no such folder")
    for i, (change, text) in enumerate(
        [
            (lambda t, m: t.pop("fc.weight"), r"1 \('fc.weight'\) missing and none extra"),
            (lambda t, m: t.update({"fc.wieght": t.pop("fc.weight")}), "did you mean 'fc.weight'"),
            (lambda t, m: t.update({"more.delta": torch.zeros(2)}), r"none missing and 1 \('more.delta'\) extra"),
            (
                lambda t, m: t.update({"fc.bias": torch.zeros(9).double()}),
                r"'fc.bias' of task 'cars' must be \(5,\) like",
            ),
            (lambda t, m: t.update({"fc.bias": t["fc.bias"].float()}), "must be torch.float64 like the model's"),
            (lambda t, m: m.update(threshold=0.2), "must have this model's threshold, 0.1, got 0.2"),
            (lambda t, m: m.update(gate="raw"), "must have this model's gate, ste, got raw"),
            (lambda t, m: m.update(head=None), "head must be in both, got one in the model and none in the folder"),
            (
                lambda t, m: m.update(head={"kind": "custom", "type": "Mlp"}),
                "head must be given for task 'cars'.* a Mlp of its own",
            ),
        ]
    ):
        folder = rewrite(root / "cars", tmp_path / str(i), change)
        unchanged(model, lambda folder=folder: model.load_task(folder), text)
    opened = next(name for name in store.read_task(root / "cars")[0] if name.endswith(".delta"))
    folder = rewrite(root / "cars", tmp_path / "open", lambda t, m: t.pop(opened))
    unchanged(model, lambda: model.load_task(folder), rf"1 \('{opened}'\) missing")
    damaged = rewrite(root / "cars", tmp_path / "damaged", lambda t, m: None)
    (file,) = damaged.glob("*.safetensors")
    tensors = load_file(file)
    tensors["fc.bias"][0] += 1
    save_file(tensors, file)
    unchanged(model, lambda: model.load_task(damaged), "'fc.bias' must have the sha256")
    file.write_bytes(file.read_bytes()[:-9])
    unchanged(model, lambda: model.load_task(damaged), "truncated")
    meta = json.loads((damaged / "task.json").read_text())
    (damaged / "task.json").write_text(json.dumps({**meta, "format": 99}))
    unchanged(model, lambda: model.load_task(damaged), "format must be at most 1")


def test_another_conversion_does_not_take_the_folder(saved):
    net, _, root = saved
    first = "conv1" if isinstance(net, ConvNet) else "patch"
    model = fresh(net, exclude=first)
    unchanged(model, lambda: model.load_task(root / "cars"), rf"none missing and 1 \('{first}.score'\) extra")
    model = fresh(net, norms="shared")
    unchanged(model, lambda: model.load_task(root / "cars"), "none missing and .* extra")
    model = fresh(net, head=None)
    unchanged(model, lambda: model.load_task(root / "cars"), "head must be in both, got one in the folder")


def test_the_fingerprint_is_of_the_original_network(saved):
    """Whatever is adapted, the base is the same; its head, which tasks replace, is not part of it."""
    net, model, _ = saved
    want = store.fingerprint({name: t for name, t in net.state_dict().items() if not name.startswith("fc.")})
    assert model.fingerprint() == want == fresh(net, include=nn.Conv2d, norms="shared").fingerprint()
    assert TapsModel(net).fingerprint() == store.fingerprint(net.state_dict())
    attention = nn.TransformerEncoderLayer(8, 2, 16)
    assert TapsModel(attention).fingerprint() == store.fingerprint(attention.state_dict())


def test_heads_of_every_kind(tmp_path):
    net = nn.Sequential(nn.Linear(4, 6), nn.Sequential(nn.Dropout(0.1), nn.Linear(6, 3))).double().eval()
    model = TapsModel(net, head="1")
    model.add_task("same")
    model.add_task("own", head=nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 9)).double())
    x = torch.randn(3, 4, dtype=torch.float64)
    for task in model.tasks:
        torch.nn.init.normal_(model.model[0].deltas[task])
        model.save_task(task, tmp_path / task)
    other = TapsModel(net, head="1")
    other.load_task(tmp_path / "same")
    with pytest.raises(store.TaskFolderError, match="head must be given for task 'own', whose head is a Sequential"):
        other.load_task(tmp_path / "own")
    own = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 9)).double()
    before = copy.deepcopy(own.state_dict())
    with pytest.raises(ValueError, match="name must be new, got 'same'"):
        other.load_task(tmp_path / "own", name="same", head=own)
    other.load_task(tmp_path / "own", head=own)
    assert all(torch.equal(value, before[name]) for name, value in own.state_dict().items())
    for task in model.tasks:
        assert torch.equal(other(x, tasks=task), model(x, tasks=task))
    torch.testing.assert_close(other(x, tasks=[1, 0, -1]), model(x, tasks=[1, 0, -1]))
    headless = TapsModel(net, ["cubs"])
    headless.save_task("cubs", tmp_path / "cubs")
    assert TapsModel(net).load_task(tmp_path / "cubs").tensors == 6


def test_sharing_counts(saved):
    net, model, _ = saved
    sharing = model.sharing()
    layers = model.conversion.layers
    assert [layer.name for layer in sharing.layers] == list(layers)
    assert [dict(layer.open) for layer in sharing.layers] == [
        {task: layer.is_open(task) for task in TASKS} for layer in layers.values()
    ]
    assert sharing.base_parameters == sum(p.numel() for p in net.parameters())
    assert sharing.base_bytes == sum(t.nbytes for t in net.state_dict().values())
    norms = sum(p.numel() for m in net.modules() if "Norm" in type(m).__name__ for p in m.parameters())
    for task, width in model.widths.items():
        record = sharing.tasks[task]
        assert record.norm_parameters == norms and record.head_parameters == width * (net.fc.in_features + 1)
    opened = [net.get_submodule(path) for path, layer in layers.items() if layer.is_open("cars")]
    assert sum(x.parameters for x in sharing.open_layers("cars")) == sum(
        p.numel() for m in opened for p in m.parameters()
    )
    assert "cars" in str(sharing)


def test_macs_come_from_the_probe():
    model = three_tasks(ConvNet())
    assert {layer.macs for layer in model.sharing().layers} == {None}
    model.probe(images(3))
    assert [layer.macs for layer in model.sharing().layers] == [64 * 8 * 27, 64 * 8 * 36, 16 * 6 * 72]


class Scaled(nn.Linear):
    def __init__(self, scale):
        super().__init__(6, 3)
        self.scale = scale

    def forward(self, x):
        return super().forward(x) * self.scale


@pytest.mark.parametrize(
    "base, own",
    [
        (nn.Sequential(nn.Dropout(), nn.Linear(6, 3)), nn.Sequential(nn.ReLU(), nn.Linear(6, 3))),
        (nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3)), nn.Sequential(nn.Dropout(0.1), nn.Linear(6, 3))),
        (nn.Sequential(nn.Linear(6, 3), nn.GELU()), nn.Sequential(nn.Linear(6, 3), nn.GELU("tanh"))),
        (Scaled(1.0), Scaled(2.0)),
        (nn.Conv2d(6, 3, 3), nn.Conv2d(6, 3, 3, stride=2, padding=1)),
        (nn.Conv2d(6, 3, 3), nn.Conv2d(6, 4, 3, dilation=2)),
    ],
)
def test_a_head_that_is_another_function_has_to_be_given(base, own, tmp_path):
    model = TapsModel(nn.Sequential(nn.Identity(), base), head="1").eval()
    model.add_task("cubs", head=own)
    model.save_task("cubs", tmp_path)
    other = TapsModel(nn.Sequential(nn.Identity(), base), head="1").eval()
    with pytest.raises(store.TaskFolderError, match="head must be given for task 'cubs'"):
        other.load_task(tmp_path)
    other.load_task(tmp_path, head=own)
    x = torch.randn(4, 6, 5, 5) if isinstance(base, nn.Conv2d) else torch.randn(4, 6)
    assert torch.equal(other(x, tasks="cubs"), model(x, tasks="cubs"))


def test_heads_like_the_base_are_made_again_and_saving_draws_no_random_numbers(tmp_path):
    for base in (nn.Linear(6, 3), nn.Conv2d(6, 3, 3, stride=2, bias=False), nn.Sequential(nn.Dropout(), Scaled(2.0))):
        model = TapsModel(nn.Sequential(nn.Identity(), base), ["cubs"], head="1")
        if not isinstance(base, nn.Sequential):
            model.add_task("cars", classes=5)
        random = torch.get_rng_state()
        for task in model.tasks:
            model.save_task(task, tmp_path / task)
        assert torch.equal(torch.get_rng_state(), random)
        other = TapsModel(nn.Sequential(nn.Identity(), base), head="1")
        for task in model.tasks:
            other.load_task(tmp_path / task)
        assert other.state_dict().keys() == model.state_dict().keys() and other.widths == model.widths
