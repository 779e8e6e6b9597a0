"""Which axis of a layer's input carries the batch: found, and where it cannot be told an error that names the layer."""

from __future__ import annotations

import copy
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from nets import ConvNet, Transformer, assert_rows_as_separate, images, perturb, three_tasks
from torch import nn

from taps_fast import TapsModel, _probe
from taps_fast.nn.context import Layout

ROWS = ["cars", None, "cubs", "cars"]


def adapt(net, **options):
    torch.manual_seed(0)
    model = perturb(TapsModel(net.double().eval(), ["cubs", "cars"], **options), closed=())
    for layer in model.conversion.layers.values():
        for score in layer.scores.values():
            score.data.fill_(0.2)
    return model


class Windows(nn.Module):
    """Swin's: [B, H, W, C] cut into windows, [B·n, m, C]."""

    def __init__(self):
        super().__init__()
        self.norm, self.layer, self.out = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        b, h, w, c = x.shape
        x = x.view(b, h // 2, 2, w // 2, 2, c).transpose(2, 3).reshape(-1, 4, c)
        x = self.layer(self.norm(x)).softmax(1)
        x = x.view(b, h // 2, w // 2, 2, 2, c).transpose(2, 3).reshape(b, h, w, c)
        return self.out(x)


class WindowsFirst(nn.Module):
    """Windows of all samples before the next window: samples alternate."""

    def __init__(self):
        super().__init__()
        self.norm, self.layer, self.conv = nn.LayerNorm(4), nn.Linear(4, 4), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        b, h, w, c = x.shape
        x = x.view(b, h // 2, 2, w, c).transpose(0, 1).reshape(-1, 2, w, c)
        x = self.conv(self.layer(self.norm(x)).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x.reshape(h // 2, b, 2, w, c).transpose(0, 1).reshape(b, h, w, c)


class SequenceFirst(nn.Module):
    """[L, B, D] inside, and 2-d rows [L·B, D] in which samples alternate."""

    def __init__(self):
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(4), nn.Linear(4, 4)
        self.flat, self.flat_norm, self.out = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x):
        x = self.layer(self.norm(x))
        y = self.flat_norm(self.flat(x.flatten(0, 1))).relu()
        return self.out(y.view_as(x).mean(0))


class Calls(nn.Module):
    """One layer called with its batch in several places."""

    def __init__(self, same):
        super().__init__()
        self.layer, self.same = nn.Linear(4, 4), same

    def forward(self, x):
        y = self.layer(x)
        return self.layer(y.mean(1)) if self.same else self.layer(y.transpose(0, 1)).transpose(0, 1)


class Positions(nn.Module):
    """A layer on something that has no batch."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 4))
        self.layer, self.out = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.out(x + self.layer(self.table))


class Mixes(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x + x.mean(0))


def test_layouts_of_known_networks():
    x = torch.randn(4, 6, 6, 4, dtype=torch.float64)
    model = adapt(Windows())
    assert_rows_as_separate(model, x, ROWS)
    located = model.conversion.located()
    assert located["layer"].layouts == located["norm"].layouts == {3: Layout(0, True)}
    assert located["out"].layouts == {4: Layout(0, None)} and located["layer"].macs == 36 * 16

    model = adapt(WindowsFirst())
    assert_rows_as_separate(model, x, ROWS)
    assert {path: m.layouts for path, m in model.conversion.located().items()} == dict.fromkeys(
        ["layer", "conv", "norm"], {4: Layout(0, False)}
    )

    model = adapt(SequenceFirst())
    x = torch.randn(5, 4, 4, dtype=torch.float64)
    model.probe(x, batch_dim=1)
    assert_rows_as_separate(model, x, ROWS, batch_dim=1)
    layouts = {path: m.layouts for path, m in model.conversion.located().items()}
    assert layouts["layer"] == {3: Layout(1, None)} and layouts["flat"] == layouts["flat_norm"] == {2: Layout(0, False)}


def test_batch_norm_trains_on_alternating_rows():
    model = adapt(SequenceFirst())
    model.probe(torch.randn(5, 3, 4).double(), batch_dim=1)
    norm = model.conversion.norms["flat_norm"]
    norm.train()
    alone = copy.deepcopy(norm.tasks["cubs"])
    x = torch.randn(15, 4, dtype=torch.float64)
    previous = model.context.enter(model.context.resolve([0, 1, 0]))
    y = norm(x)
    model.context.enter(previous)
    rows = [i for i in range(15) if i % 3 != 1]
    torch.testing.assert_close(y[rows], alone(x[rows]))
    torch.testing.assert_close(norm.tasks["cubs"].running_var, alone.running_var)


def test_several_calls():
    x = torch.randn(4, 5, 4, dtype=torch.float64)
    model = adapt(Calls(same=True))
    model.probe(x)
    assert_rows_as_separate(model, x, ROWS)
    assert model.conversion.layers["layer"].layouts == {3: Layout(0, None), 2: Layout(0, None)}
    assert model.conversion.layers["layer"].macs == 6 * 16
    model = adapt(Calls(same=False))
    model.probe(x)
    with pytest.raises(
        ValueError, match="layer: the batch axis.*it is called several times, with the batch in different"
    ):
        model(x, tasks=ROWS)
    assert torch.isfinite(model(x, tasks="cubs")).all()


def test_what_cannot_be_told_is_an_error_that_names_the_layer():
    x = torch.randn(4, 5, 4, 4, dtype=torch.float64)
    model = adapt(Positions())
    with pytest.raises(ValueError, match=r"layer: the batch axis .*its input \(4, 4\) does not grow with the batch"):
        model(x, tasks=ROWS)
    torch.testing.assert_close(model(x, tasks="cubs"), model.merge("cubs")(x))
    assert_rows_as_separate(adapt(Positions(), exclude="layer"), x, ROWS)


def test_more_rows_a_sample_than_the_probe_saw():
    """One window at the probe does not say how several are ordered."""
    model = adapt(Windows())
    model.probe(torch.randn(3, 2, 2, 4).double())
    with pytest.raises(
        ValueError, match="norm: the probe must have seen a like input, got 4 rows a sample along axis 0"
    ):
        model(torch.randn(3, 4, 4, 4).double(), tasks=ROWS[:3])
    model.probe(torch.randn(3, 4, 4, 4).double())
    assert_rows_as_separate(model, torch.randn(3, 6, 4, 4).double(), ROWS[:3])


def test_another_number_of_axes_than_the_probe_saw():
    model = adapt(nn.Sequential(nn.Linear(4, 4)))
    model.probe(torch.randn(3, 4).double())
    with pytest.raises(
        ValueError, match=r"0: the batch axis of its input must be known.*got an input \(3, 5, 4\) and 3 ids"
    ):
        model(torch.randn(3, 5, 4).double(), tasks=ROWS[:3])


def test_identical_samples_are_told_apart_by_made_up_ones():
    model = adapt(Windows())
    assert_rows_as_separate(model, torch.ones(4, 4, 4, 4, dtype=torch.float64), ROWS)


def test_token_ids_and_keyword_inputs():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.layer = nn.Embedding(9, 4), nn.Linear(4, 4)

        def forward(self, ids, *, mask=None, scale=1.0):
            y = self.layer(self.embed(ids)) * scale
            return y if mask is None else y * mask[..., None]

    model = adapt(Tokens())
    ids, mask = torch.randint(9, (4, 6)), torch.rand(4, 6).double() > 0.5
    y = model(ids=ids, mask=mask, scale=2.0, tasks=ROWS)
    for i, task in enumerate(ROWS):
        torch.testing.assert_close(
            y[i], model.merge(task or "base")(ids[i : i + 1], mask=mask[i : i + 1], scale=2.0)[0]
        )


def test_inputs_in_containers():
    class Takes(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, batch):
            return self.layer(batch["x"]) + batch["more"][0]

    model = adapt(Takes())
    rows = [*ROWS, "cubs"]
    batch = {"x": torch.randn(5, 7, 4).double(), "more": [torch.randn(5, 1, 1).double()], "name": "text"}
    model.probe(batch)
    y = model(batch, tasks=rows)
    for i, task in enumerate(rows):
        alone = {"x": batch["x"][i : i + 1], "more": [batch["more"][0][i : i + 1]], "name": "text"}
        torch.testing.assert_close(y[i : i + 1], model.merge(task or "base")(alone))


def test_the_probe_leaves_everything_as_it_was():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(1))
            self.layer, self.norm, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout()

        def forward(self, x):
            self.count += 1
            assert not self.training and not torch.is_grad_enabled()
            return self.drop(self.norm(self.layer(x))) * torch.rand(())

    model = TapsModel(Counts().train(), ["cubs"]).train()
    x = torch.randn(3, 4, requires_grad=True)
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    modes = [m.training for m in model.modules()]
    model.probe(x)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    assert torch.equal(random, torch.get_rng_state()) and [m.training for m in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())
    assert model.context.active is None and model.probed


def test_the_first_mixed_forward_probes_and_gradients_survive_it():
    model = three_tasks(ConvNet()).train()
    one = model(images(4), tasks="cubs").sum()
    model(images(4), tasks=[0, 1, 0, 1])
    one.backward()
    assert model.probed


def test_first_mixed_batches_in_two_threads_probe_once(monkeypatch):
    model, x, start, probes = three_tasks(Transformer()), images(3), Barrier(2), []
    locate = _probe._locate

    def slow(*args):
        probes.append(args)
        time.sleep(0.1)
        locate(*args)

    def run(_):
        start.wait()
        return model(x, tasks=[0, 1, 2])

    monkeypatch.setattr(_probe, "_locate", slow)
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(run, range(2))
    assert torch.equal(one, other) and len(probes) == 1


def test_layouts_are_known_while_they_are_probed_again(monkeypatch):
    model, x = three_tasks(Transformer()), images(3)
    model.probe(x)
    layout, located = _probe._layout, model.conversion.located().values()
    seen = []

    def look(*args):
        seen.extend(bool(module.layouts) for module in located)
        return layout(*args)

    monkeypatch.setattr(_probe, "_layout", look)
    model.probe(x)
    assert seen and all(seen)


def test_conv_nets_know_their_axis_by_type():
    """Before any probe: images along axis 0, one an id."""
    model = three_tasks(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.GroupNorm(2, 4)), head=None)
    model.probed = True
    assert_rows_as_separate(model, images(3), ["cubs", "cars", None])


def test_layouts_survive_copies():
    model = three_tasks(Transformer())
    x = images(3)
    want = model(x, tasks=[0, 1, 2])
    twin = copy.deepcopy(model)
    assert twin.probed and torch.equal(twin(x, tasks=[0, 1, 2]), want)
