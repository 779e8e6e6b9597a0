"""The sharing report: known answers of a published network, totals by hand, its forms as text, JSON and picture."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from taps_fast.sharing import LayerRecord, Sharing, TaskRecord, readable_bytes

GATES = {
    "cubs": {25, 26, 27, 40, 43, 44, 45, 46, 47, 48, 49, 51, 52},
    "cars": {44, 45, 46, 49, 52},
}
"""Open convolutions of ResNet-50 in ``named_modules`` order, read from a published figure."""


def resnet50() -> tuple[list[tuple[str, int, int]], int, int]:
    """(name, parameters, multiply-adds at 224²) of the 53 convolutions; norm parameters named "bn"; all parameters.

    From the architecture's rule: a 7×7 stem, then stages of 3, 4, 6, 3 bottlenecks 1×1, 3×3, 1×1 whose width doubles
    and whose first one strides in its 3×3 and projects its input.
    """
    convs = [("conv1", 7 * 7 * 3 * 64, 7 * 7 * 3 * 64 * 112 * 112)]
    named_bn, other_bn = 2 * 64, 0
    inputs, size = 64, 56
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 << stage
        for block in range(blocks):
            before = size
            if block == 0 and stage > 0:
                size //= 2
            at = f"layer{stage + 1}.{block}"
            for name, weights, side in (
                (f"{at}.conv1", inputs * width, before),
                (f"{at}.conv2", 9 * width * width, size),
                (f"{at}.conv3", width * 4 * width, size),
            ):
                convs.append((name, weights, weights * side * side))
            named_bn += 2 * (width + width + 4 * width)
            if block == 0:
                weights = inputs * 4 * width
                convs.append((f"{at}.downsample.0", weights, weights * size * size))
                other_bn += 2 * 4 * width
            inputs = 4 * width
    fc = inputs * 1000 + 1000
    return convs, named_bn, sum(weights for _, weights, _ in convs) + named_bn + other_bn + fc


def published(counted: int = 0) -> Sharing:
    """ResNet-50 with the two published tasks; ``counted``: what the base counts besides its own parameters."""
    convs, norms, total = resnet50()
    total += counted
    layers = [
        LayerRecord(name, "conv2d", weights, 4 * weights, macs, {task: i in opened for task, opened in GATES.items()})
        for i, (name, weights, macs) in enumerate(convs)
    ]
    tasks = {
        "cubs": TaskRecord(norms, 8 * norms, 2048 * 200 + 200, 4 * (2048 * 200 + 200)),
        "cars": TaskRecord(norms, 8 * norms, 2048 * 196 + 196, 4 * (2048 * 196 + 196)),
    }
    return Sharing(layers, tasks, total, 4 * total, base_head_bytes=4 * 2_049_000)


def test_the_shape_list_is_resnet50():
    convs, _, total = resnet50()
    assert len(convs) == 53
    assert total == 25_557_032, "the parameter count that every ResNet-50 of 1000 classes has"


@pytest.mark.parametrize(
    ("task", "layers", "fraction", "macs"), [("cubs", 13, 0.6095168, "26.4%"), ("cars", 5, 0.2992366, "9.1%")]
)
def test_published_patterns(task, layers, fraction, macs):
    """The published count divides by a base that holds its 53 scores too: 0.0002 % below ours."""
    sharing = published(counted=53)
    assert len(sharing.open_layers(task)) == layers
    assert round(sharing.fraction(task), 7) == fraction
    assert published().fraction(task) == pytest.approx(fraction * (25_557_032 + 53) / 25_557_032, abs=5e-8)
    assert f"{sharing.macs_open(task):.1%}" == macs


def small() -> Sharing:
    layers = [
        LayerRecord("a", "linear", 10, 40, 7, {"x": False, "y": False}),
        LayerRecord("b", "linear", 20, 80, 13, {"x": True, "y": False}),
        LayerRecord("c", "conv2d", 30, 120, 20, {"x": True, "y": True}),
    ]
    tasks = {"x": TaskRecord(4, 32, 6, 24), "y": TaskRecord(4, 32, 9, 36)}
    return Sharing(layers, tasks, base_parameters=100, base_bytes=432, base_head_bytes=40)


def test_totals_by_hand():
    sharing = small()
    assert [layer.name for layer in sharing.open_layers("x")] == ["b", "c"]
    assert sharing.fraction("x") == (20 + 30 + 4) / 100
    assert sharing.fraction("y") == (30 + 4) / 100
    assert sharing.added_parameters("x") == 20 + 30 + 4 + 6
    assert sharing.added_bytes("y") == 120 + 32 + 36
    assert sharing.bytes == 432 - 40 + (80 + 120 + 32 + 24) + (120 + 32 + 36)
    assert sharing.separate_bytes == (432 - 40 + 24) + (432 - 40 + 36)
    assert sharing.macs_open("x") == 33 / 40


def test_unknown_macs_are_not_guessed():
    layers = [LayerRecord("a", "linear", 10, 40, None, {"x": True}), LayerRecord("b", "linear", 10, 40, 5, {"x": True})]
    sharing = Sharing(layers, {"x": TaskRecord()}, 20, 80)
    assert sharing.macs_open("x") is None
    assert str(sharing).endswith("in separate models. ?: known after model.probe(...), or a first mixed batch.")
    assert "Base and 1 task: " in str(sharing) and "?:" not in str(small())


def test_shows_itself_in_a_notebook():
    assert repr(small()) == str(small())


def test_text_of_a_small_network():
    assert str(small()).splitlines() == [
        "layer  kind    parameters  1 2",
        "a      linear          10  . .",
        "b      linear          20  # .",
        "c      conv2d          30  # #",
        "",
        "   task  layers open  weights  norms  head  of the base  own MACs  added bytes",
        "1  x             2/3       50      4     6        54.0%     82.5%        256 B",
        "2  y             1/3       30      4     9        34.0%     50.0%        188 B",
        "",
        "# open, . closed (runs on the base's weight). Base and 2 tasks: 1.880 times the base's 100 parameters, "
        "heads apart; 836 B against 844 B in separate models, 40 B of the base's own head apart.",
    ]


def test_text_of_a_deep_network_is_compact():
    """Runs of layers with one pattern share a line; their parameters still add up."""
    text = str(published())
    table = text[: text.index("\n\n")].splitlines()[1:]
    assert len(table) < 53 / 2
    assert table[0].startswith("conv1 … layer3.0.conv1 (25 layers)  "), table[0]
    assert sum(int(row.split("  ")[-2].replace(",", "")) for row in table) == sum(c[1] for c in resnet50()[0])
    assert "13/53" in text and "5/53" in text and "61.0%" in text and "29.9%" in text


def test_no_tasks_and_no_layers():
    assert "Base and 0 tasks: 1.000 times" in str(Sharing([], {}, 10, 40))
    assert Sharing([], {"x": TaskRecord()}, 0, 0).fraction("x") == 0


def test_columns_stay_apart_for_many_tasks():
    tasks = {f"task{i}": TaskRecord() for i in range(12)}
    layers = [LayerRecord("a", "linear", 1, 4, 1, {name: name == "task11" for name in tasks})]
    lines = str(Sharing(layers, tasks, 1, 4)).splitlines()
    assert lines[0].endswith(" 9 10 11 12") and lines[1].endswith(" .  .  .  #")


def test_dict_goes_through_json():
    sharing = published()
    again = Sharing.from_dict(json.loads(json.dumps(sharing.as_dict())))
    assert again == sharing and str(again) == str(sharing)


@pytest.mark.parametrize("data", [{}, {"layers": 3}, {"layers": [{"name": "a"}]}, {"layers": [], "tasks": []}])
def test_dict_of_another_form(data):
    with pytest.raises(ValueError, match=r"^Sharing: data must be what as_dict gives, got another form"):
        Sharing.from_dict(data)


def only(sharing: Sharing, task: str) -> Sharing:
    data = sharing.as_dict()
    data["tasks"] = {task: data["tasks"][task]}
    for layer in data["layers"]:
        layer["open"] = {task: layer["open"][task]}
    return Sharing.from_dict(data)


def test_join_gives_the_whole_report():
    whole = published()
    assert Sharing.join([only(whole, "cubs"), only(whole, "cars")]) == whole
    assert list(Sharing.join([only(whole, "cars"), only(whole, "cubs")]).tasks) == ["cars", "cubs"]


def test_other_names():
    layers = [LayerRecord("a", "linear", 1, 4, 1, {"x": True, "y": True}, {"x": 2})]
    whole = Sharing(layers, {"x": TaskRecord(5), "y": TaskRecord()}, 10, 40)
    other = whole.renamed({"x": "z", "nobody": "w"})
    assert list(other.tasks) == ["z", "y"] and other.added_bytes("z") == 2 and other.renamed({"z": "x"}) == whole


def test_join_refuses():
    whole = small()
    with pytest.raises(ValueError, match=r"^Sharing\.join: parts must hold at least one report, got none$"):
        Sharing.join([])
    with pytest.raises(ValueError, match=r"^Sharing\.join: tasks must have different names, got 'x' twice$"):
        Sharing.join([only(whole, "x"), only(whole, "x")])
    with pytest.raises(
        ValueError, match=r"must have one base and the same adapted layers, got \['cars'\] with 53 layers"
    ):
        Sharing.join([only(whole, "x"), only(published(), "cars")])


def test_a_layer_that_is_silent_about_a_task():
    with pytest.raises(ValueError, match=r"^Sharing: layer 'a' must say of each task whether it is open, got \['x'\]"):
        Sharing([LayerRecord("a", "linear", 1, 4, None, {"x": True})], {"x": TaskRecord(), "y": TaskRecord()}, 1, 4)


def test_unknown_task():
    with pytest.raises(KeyError, match=r"Sharing: task must be one of x, y, got 'z'"):
        small().fraction("z")


def test_plot_shows_open_as_filled(tmp_path):
    sharing = published()
    figure = sharing.plot(tmp_path / "sharing.png")
    assert (tmp_path / "sharing.png").read_bytes().startswith(b"\x89PNG")
    closed, opened = figure.axes[0].collections[:2]
    assert set(opened.get_offsets()[:, 0]) == GATES["cubs"] and set(opened.get_offsets()[:, 1]) == {0}
    assert len(opened.get_facecolors()) == 1 and len(closed.get_facecolors()) == 0
    assert len(closed.get_offsets()) == 53 - 13
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["cubs", "cars"]


def test_plot_writes_nothing_without_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small().plot()
    assert list(tmp_path.iterdir()) == []


def test_plot_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"^Sharing\.plot needs matplotlib: pip install matplotlib"):
        small().plot()


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_600, "1 MB"), (12_345_678, "12.3 MB")]
)
def test_readable_bytes(count, text):
    assert readable_bytes(count) == text


def test_matplotlib_is_imported_only_to_plot():
    code = "import sys, taps_fast.sharing; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code]).returncode == 0
