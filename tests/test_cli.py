"""The command line: each command's output, and errors without tracebacks."""

from __future__ import annotations

import os
import subprocess
import sys
import types

import pytest
import torch
from torch import nn

import taps_fast
from taps_fast import store
from taps_fast.__main__ import EXAMPLES, main
from taps_fast.sharing import CLOSED, OPEN, LayerRecord, Sharing, TaskRecord

BASE = "sha256:" + "ab" * 32


def python_m(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", "taps_fast", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


def save(folder, task, opened, base=BASE, layers=3):
    """A task folder as a model writes it."""
    records = [LayerRecord(f"fc{i}", "linear", 100, 400, 10, {task: i in opened}) for i in range(layers)]
    sharing = Sharing(records, {task: TaskRecord(8, 64, 30, 120)}, 1000, 4000, 80)
    meta = {"task": task, "fingerprint": base, "head": {"classes": 3}, "sharing": sharing.as_dict()}
    store.save_task(folder, {f"fc{i}.deltas.{task}": torch.zeros(10, 10) for i in opened}, meta)
    return str(folder)


@pytest.fixture
def folders(tmp_path):
    return [save(tmp_path / "cubs", "cubs", {1, 2}), save(tmp_path / "cars", "cars", {2})]


def refused(capsys, *arguments: str) -> str:
    """The one line that says what is wrong with the input."""
    assert main(arguments) == 2
    printed = capsys.readouterr()
    (line,) = [line for line in printed.err.splitlines() if line]
    assert line.startswith("python -m taps_fast: error: ")
    return line.removeprefix("python -m taps_fast: error: ")


def test_version(capsys):
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert (done.value.code, capsys.readouterr().out) == (0, f"taps_fast {taps_fast.__version__}\n")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["info", "--help"], ["demo", "--help"], ["train", "--help"], ["inspect", "--help"]]
)
def test_help(capsys, arguments):
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: python -m taps_fast")
    if arguments == ["--help"]:
        assert all(f"\n    {command}" in text for command in ("info", "demo", "train", "inspect"))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [([], "required: COMMAND"), (["inspct"], "invalid choice: 'inspct'"), (["inspect"], "required: FOLDER")],
)
def test_bad_usage(capsys, arguments, text):
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 2
    assert text in capsys.readouterr().err


def test_info_says_what_runs():
    result = python_m("info")
    assert result.returncode == 0 and result.stderr == ""
    assert f"taps_fast {taps_fast.__version__}" in result.stdout and f"torch {torch.__version__}" in result.stdout
    assert result.stdout.count("  -> ") == len(EXAMPLES) * (1 + torch.cuda.is_available())
    assert "\nmemory: the C library " in result.stdout


def test_a_reader_that_stops_early_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-W", "ignore", "-m", "taps_fast", "info"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_info_says_what_is_missing_and_how_to_get_it():
    result = python_m("info", TAPS_FAST_EXT="off")
    assert result.returncode == 0
    assert "CPU kernels: taps_fast._C is not loaded: TAPS_FAST_EXT=off" in result.stdout
    assert "->  reference split" in result.stdout


def test_inspect_needs_no_model(folders, capsys):
    assert main(["inspect", *folders]) == 0
    cubs, cars, _, *table = capsys.readouterr().out.splitlines()
    assert cubs == (
        f"{folders[0]}: task 'cubs', 3 classes, 2 tensors, 800 B, base {BASE}, "
        f"saved by taps_fast {taps_fast.__version__}"
    )
    assert cars.startswith(f"{folders[1]}: task 'cars', 3 classes, 1 tensors, 400 B")
    assert table[:4] == [
        "layer  kind    parameters  1 2",
        "fc0    linear         100  . .",
        "fc1    linear         100  # .",
        "fc2    linear         100  # #",
    ]
    assert "Base and 2 tasks: 1.316 times the base's 1,000 parameters" in table[-1]


def test_inspect_reads_what_a_model_saves(tmp_path, capsys):
    backbone = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 9)
    )
    model = taps_fast.TapsModel(backbone, head="4")
    model.add_task("cubs", classes=5)
    model.add_task("cars")
    model.conversion.layers["0"].scores["cars"].data.fill_(0.0)
    folders = [str(tmp_path / task) for task in model.tasks]
    for task, folder in zip(model.tasks, folders, strict=True):
        model.save_task(task, folder)
    assert main(["inspect", *folders]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{folders[0]}: task 'cubs', 5 classes, ")
    assert lines[1].startswith(f"{folders[1]}: task 'cars', ") and "classes" not in lines[1]
    assert "\n".join(lines[3:]) == str(model.sharing())
    assert lines[4].split() == ["0", "conv2d", "112", OPEN, CLOSED]


def test_inspect_draws(folders, tmp_path, capsys):
    picture = tmp_path / "sharing.png"
    assert main(["inspect", *folders, "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.endswith(f"drawn to {picture}\n")


def test_inspect_of_what_is_not_a_task_folder(tmp_path, capsys):
    assert refused(capsys, "inspect", str(tmp_path)) == (
        f"read_task: folder must be a task folder, with a task.json, got a folder without one: {tmp_path}"
    )


def test_inspect_verifies(folders, tmp_path, capsys):
    (path,) = (tmp_path / "cars").glob("tensors-*")
    path.write_bytes(path.read_bytes()[:-1])
    assert "it is truncated or corrupted" in refused(capsys, "inspect", *folders)


def test_inspect_of_two_bases(folders, tmp_path, capsys):
    other = save(tmp_path / "other", "birds", {0}, base="sha256:cd")
    assert refused(capsys, "inspect", *folders, other) == (
        f"inspect: folders must be of one base, got {folders[0]} of {BASE} and {other} of sha256:cd"
    )


def test_inspect_of_one_task_twice(folders, capsys):
    text = "inspect: Sharing.join: tasks must have different names, got 'cubs' twice"
    assert refused(capsys, "inspect", folders[0], folders[0]) == text


@pytest.mark.parametrize(
    ("where", "called"),
    [
        (["sw/lam-0.1/best", "sw/lam-0.5/best"], ["lam-0.1", "lam-0.5"]),
        (["sw/lam-0.1/best", "sw/lam-0.1/last", "sw/lam-0.5/best"], ["lam-0.1/best", "lam-0.1/last", "lam-0.5/best"]),
        (["a/1/best", "b/1/best"], ["a", "b"]),
        (["best", "a/best"], [None, "a"]),
    ],
)
def test_inspect_of_tasks_of_one_name(where, called, tmp_path, capsys):
    """They are called by their folders, and other tasks by their names."""
    folders = [save(tmp_path / folder, "sw", {i % 3}) for i, folder in enumerate(where)]
    assert main(["inspect", *folders, save(tmp_path / "cubs", "cubs", {1})]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith(f"{folder}: task 'sw', ") for line, folder in zip(lines, folders, strict=False))
    rows = [line.split() for line in lines if line.split()[:1] and line.split()[0].isdecimal()]
    assert [row[1] for row in rows] == [*(name or tmp_path.name for name in called), "cubs"]


def test_inspect_of_models_adapted_differently(folders, tmp_path, capsys):
    other = save(tmp_path / "other", "birds", {0}, layers=4)
    text = refused(capsys, "inspect", *folders, other)
    assert text.startswith("inspect: Sharing.join: parts must have one base and the same adapted layers")


def test_inspect_of_a_folder_without_a_report(tmp_path, capsys):
    store.save_task(tmp_path, {}, {"task": "cubs", "fingerprint": BASE, "sharing": {}})
    text = refused(capsys, "inspect", str(tmp_path))
    assert text.startswith(f"inspect: {tmp_path}: Sharing: data must be what as_dict gives")


def test_inspect_cannot_draw(folders, tmp_path, capsys, monkeypatch):
    assert "No such file or directory" in refused(capsys, "inspect", *folders, "--plot", str(tmp_path / "no/where.png"))
    assert "not supported" in refused(capsys, "inspect", *folders, "--plot", str(tmp_path / "sharing.xyz"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    text = refused(capsys, "inspect", *folders, "--plot", str(tmp_path / "sharing.png"))
    assert "pip install matplotlib" in text


def fake_demo(monkeypatch, run):
    module = types.ModuleType("taps_fast.demo")
    module.add_arguments = lambda parser: parser.add_argument("--epochs", type=int, default=3)
    module.run = run
    monkeypatch.setitem(sys.modules, "taps_fast.demo", module)


def test_demo_is_given_its_own_options(monkeypatch):
    seen = []
    fake_demo(monkeypatch, lambda chosen: seen.append(chosen.epochs))
    assert main(["demo", "--epochs", "7"]) == 0 and seen == [7]


def test_exit_codes_of_the_demo(monkeypatch, capsys):
    def interrupted(chosen):
        raise KeyboardInterrupt

    fake_demo(monkeypatch, lambda chosen: 1)
    assert main(["demo"]) == 1
    fake_demo(monkeypatch, interrupted)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "python -m taps_fast: interrupted\n"


def test_a_defect_keeps_its_traceback(monkeypatch):
    """Only what the user can put right is made short."""

    def broken(chosen):
        raise ValueError("a defect")

    fake_demo(monkeypatch, broken)
    with pytest.raises(ValueError, match="a defect"):
        main(["demo"])
