"""Task folders: what is written is read, what is damaged or does not fit is refused, and a save is all or nothing."""

from __future__ import annotations

import hashlib
import os
import stat
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file
from task_folder import META, assert_same, some_tensors, tensor_file

from taps_fast import store
from taps_fast.store import TaskFolderError, fingerprint, read_task, save_task

DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool,
    torch.complex64, torch.float8_e4m3fn,
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    save_task(tmp_path / "cubs", some_tensors(), META)
    return tmp_path / "cubs"


# --- fingerprint


def test_fingerprint_is_of_names_and_content():
    tensors = some_tensors()
    mine = fingerprint(tensors)
    assert mine.startswith("sha256:") and len(mine) == 7 + 64
    assert fingerprint(dict(reversed(tensors.items()))) == mine
    assert fingerprint({n: t.clone() for n, t in tensors.items()}) == mine
    a = tensors["fc1.deltas.cubs"]
    for change in (
        {"fc1.deltas.cubs": a.nextafter(torch.tensor(torch.inf))},
        {"fc1.deltas.cubs": a.reshape(7, 5)},
        {"fc1.deltas.cubs": a.view(torch.int32)},
        {"fc1.scores.cubs": torch.tensor([0.15])},
        {"another": torch.zeros(0)},
    ):
        assert fingerprint(tensors | change) != mine, change
    assert fingerprint({"b" if n == "fc1.deltas.cubs" else n: t for n, t in tensors.items()}) != mine


def test_fingerprint_knows_values_not_layout():
    a = torch.randn(2, 3, 4, 5)
    mine = fingerprint({"a": a})
    assert fingerprint({"a": a.to(memory_format=torch.channels_last)}) == mine
    assert fingerprint({"a": a.transpose(0, 1).contiguous().transpose(0, 1)}) == mine
    assert fingerprint({"a": torch.nn.Parameter(a)}) == mine
    assert fingerprint({"a": torch.zeros(3).expand(2, 3)}) == fingerprint({"a": torch.zeros(2, 3)})
    assert fingerprint({"a": torch.arange(6)[::2]}) == fingerprint({"a": torch.tensor([0, 2, 4])})
    z = torch.tensor([1 + 2j])
    assert fingerprint({"a": z.conj()}) == fingerprint({"a": torch.tensor([1 - 2j])})
    assert fingerprint({"a": z.conj().imag}) == fingerprint({"a": torch.tensor([-2.0])})


def test_fingerprint_follows_its_written_definition():
    """Folders on disk hold it, so it may not drift: SHA-256 of the sorted table of names, dtypes, shapes, hashes."""
    tensors = {"b": torch.arange(6, dtype=torch.float32).reshape(2, 3), "a": torch.tensor(-1, dtype=torch.int64)}
    b = hashlib.sha256(struct.pack("<6f", *range(6))).hexdigest()
    a = hashlib.sha256(struct.pack("<q", -1)).hexdigest()
    table = (
        f'{{"a":{{"dtype":"int64","sha256":"{a}","shape":[]}},"b":{{"dtype":"float32","sha256":"{b}","shape":[2,3]}}}}'
    )
    assert fingerprint(tensors) == "sha256:" + hashlib.sha256(table.encode()).hexdigest()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fingerprint_reads_every_dtype(dtype):
    zeros, ones = torch.zeros(4).to(dtype), torch.ones(4).to(dtype)
    assert fingerprint({"a": zeros}) != fingerprint({"a": ones})


@pytest.mark.parametrize(
    ("tensor", "what"),
    [(torch.zeros(2, device="meta"), "the meta device"), (torch.eye(2).to_sparse(), "torch.sparse_coo")],
    ids=["meta", "sparse"],
)
def test_fingerprint_needs_data(tensor, what):
    with pytest.raises(ValueError, match=f"^fingerprint: tensor 'a' must be dense and hold data, got one of {what}$"):
        fingerprint({"a": tensor})


# --- round trips


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_round_trip_of_dtypes(tmp_path, dtype):
    tensors = {"t": torch.randn(3, 4).mul(4).to(dtype), "empty": torch.zeros(0, 3).to(dtype)}
    save_task(tmp_path, tensors, META)
    assert_same(read_task(tmp_path)[0], tensors)


def test_round_trip_of_awkward_tensors(tmp_path):
    shared = torch.randn(4, 6)
    tensors = {
        "transposed": shared.T,
        "slice": shared[1:3],
        "same memory": shared,
        "expanded": torch.tensor([1.0, torch.nan]).expand(3, 2),
        "parameter": torch.nn.Parameter(shared.clone()),
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "negative": torch.tensor([1 + 2j]).conj().imag,
        "negative zero": torch.tensor([-0.0, torch.inf]),
    }
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    save_task(tmp_path, tensors, META)
    assert_same(tensors, before)
    found, _ = read_task(tmp_path)
    assert_same(found, before)
    assert torch.signbit(found["negative zero"][0])
    assert not found["parameter"].requires_grad


def test_no_tensors_is_a_task_too(tmp_path):
    save_task(tmp_path, {}, META)
    assert read_task(tmp_path)[0] == {}


def test_meta_comes_back(folder):
    _, meta = read_task(folder)
    assert {key: meta[key] for key in META} == META
    assert meta["format"] == store.FORMAT
    assert meta["library"].startswith("taps_fast ")
    assert meta["tensors"]["fc2.deltas.cubs"]["dtype"] == "bfloat16"
    assert meta["tensors"]["fc2.deltas.cubs"]["shape"] == [3, 5]


def test_meta_comes_back_as_json_has_it(tmp_path):
    """Tuples as lists and keys as strings, which sort in another order than numbers."""
    save_task(tmp_path, {}, {**META, "sizes": (1, 2), "by number": {10: "a", 9: "b"}})
    _, meta = read_task(tmp_path)
    assert meta["sizes"] == [1, 2] and meta["by number"] == {"10": "a", "9": "b"}


def test_folder_is_named_in_any_way(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_task("deep/er/cubs/", some_tensors(), META)
    assert_same(read_task(os.path.join("deep", "er", "cubs"))[0], some_tensors())


def test_files_have_ordinary_permissions(folder, tmp_path):
    (tmp_path / "plain").touch()
    assert {path.stat().st_mode for path in folder.iterdir()} == {(tmp_path / "plain").stat().st_mode}


# --- saving over a folder


def test_save_over_a_folder_replaces_the_task_alone(folder):
    (folder / "notes.txt").write_text("mine")
    old = tensor_file(folder)
    save_task(folder, some_tensors(1), {**META, "classes": 4})
    tensors, meta = read_task(folder)
    assert_same(tensors, some_tensors(1))
    assert meta["classes"] == 4
    assert not old.exists()
    assert sorted(path.name for path in folder.iterdir()) == ["notes.txt", "task.json", tensor_file(folder).name]


def test_save_the_same_again(folder):
    save_task(folder, some_tensors(), META)
    assert_same(read_task(folder)[0], some_tensors())


def test_save_over_a_damaged_folder(folder):
    (folder / "task.json").write_text("{")
    save_task(folder, some_tensors(1), META)
    assert_same(read_task(folder)[0], some_tensors(1))


class Interrupted(BaseException):
    """Like KeyboardInterrupt: not an Exception."""


@pytest.mark.parametrize("step", ["writing tensors", "fsync", "chmod", "replacing tensors", "replacing task.json"])
def test_interrupted_save_leaves_the_old_task(folder, monkeypatch, step):
    def interrupt(*args):
        if step != "replacing task.json" or str(args[1]).endswith("task.json"):
            raise Interrupted
        replace(*args)

    replace = os.replace
    owner, name = {
        "writing tensors": (store, "save_file"),
        "fsync": (os, "fsync"),
        "chmod": (store.Path, "chmod"),
    }.get(step, (os, "replace"))
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, interrupt)
        with pytest.raises(Interrupted):
            save_task(folder, some_tensors(1), META)
    assert_same(read_task(folder)[0], some_tensors())
    assert not list(folder.glob(".*")), "temporary files"
    save_task(folder, some_tensors(2), META)
    assert_same(read_task(folder)[0], some_tensors(2))


def test_killed_save_leaves_the_old_task(folder):
    """The process dies between the two files: no handler runs."""
    code = (
        "import os, sys, torch; from taps_fast import store\n"
        "done = os.replace\n"
        "def replace(a, b):\n"
        "    if str(b).endswith('task.json'): os._exit(9)\n"
        "    done(a, b)\n"
        "os.replace = replace\n"
        "store.save_task(sys.argv[1], {'t': torch.ones(3)}, {'task': 'cubs', 'fingerprint': 'f', 'sharing': {}})\n"
    )
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(folder)]).returncode == 9
    assert len(list(folder.glob("tensors-*"))) == 2
    assert_same(read_task(folder)[0], some_tensors())


def test_readers_never_see_half_a_save(folder):
    """Every read while saves go on gives one of the tasks that were saved, whole."""
    stop = threading.Event()
    errors = []
    save_task(folder, some_tensors(0), {**META, "classes": 0})

    def save():
        seed = 0
        while not stop.is_set():
            seed = 1 - seed
            try:
                save_task(folder, some_tensors(seed), {**META, "classes": seed})
            except Exception as error:
                errors.append(error)

    thread = threading.Thread(target=save)
    thread.start()
    try:
        end, reads = time.monotonic() + 1.0, 0
        while time.monotonic() < end:
            tensors, meta = read_task(folder)
            assert_same(tensors, some_tensors(meta["classes"]))
            reads += 1
    finally:
        stop.set()
        thread.join()
    assert not errors and reads


def test_save_between_the_two_files_of_a_read(folder, monkeypatch):
    """The reader has seen the old task.json, whose tensors the save removes."""

    def load_after_a_save(path):
        monkeypatch.setattr(store, "load_file", load_file)
        save_task(folder, some_tensors(1), {**META, "classes": 4})
        return load_file(path)

    monkeypatch.setattr(store, "load_file", load_after_a_save)
    tensors, meta = read_task(folder)
    assert_same(tensors, some_tensors(1))
    assert meta["classes"] == 4


def test_each_file_is_on_the_disk_before_it_counts(tmp_path, monkeypatch):
    """A power failure must not leave a name whose content was never written."""
    steps = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor):
        steps.append("flush folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "flush file")
        fsync(descriptor)

    def noted_replace(source, target):
        steps.append(f"place {target.suffix}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    save_task(tmp_path, some_tensors(), META)
    wanted = ["flush file", "place .safetensors", "flush folder", "flush file", "place .json", "flush folder"]
    assert [step for step in steps if step != "flush folder" or os.name == "posix"] == [
        step for step in wanted if step != "flush folder" or os.name == "posix"
    ]


def test_saves_at_once_leave_one_whole_task(folder):
    """As when every rank of a distributed run saves."""
    threads = [threading.Thread(target=save_task, args=(folder, some_tensors(1), META)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_same(read_task(folder)[0], some_tensors(1))


@pytest.mark.parametrize("locks", ["folder", "none"])
def test_saves_of_several_tasks_at_once_leave_one_and_no_other_file(folder, locks, monkeypatch):
    """Each thread saves again what the others replace; a reader meanwhile always finds a whole task."""
    if locks == "none":  # as on Windows
        monkeypatch.setattr(store, "fcntl", None)

    def save(start):
        for seed in range(start, start + 12):
            save_task(folder, some_tensors(seed % 3), {**META, "classes": seed % 3})

    with ThreadPoolExecutor(3) as pool:
        saves = [pool.submit(save, start) for start in range(3)]
        while not all(done.done() for done in saves):
            tensors, meta = read_task(folder)
            assert_same(tensors, some_tensors(meta["classes"] % 3))
        for done in saves:
            done.result()
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".safetensors"]
    tensors, meta = read_task(folder)
    assert_same(tensors, some_tensors(meta["classes"]))


@pytest.mark.skipif(os.name != "posix", reason="needs locks between processes")
def test_saves_of_two_processes_at_once(folder):
    code = (
        "import sys, torch; from taps_fast import store\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "for i in range(40):\n"
        "    meta = {'task': 'cubs', 'fingerprint': 'f', 'sharing': {}}\n"
        "    store.save_task(sys.argv[1], {'t': torch.full((3,), 2 * i + int(sys.argv[2]))}, meta)\n"
    )
    run = [sys.executable, "-W", "ignore", "-c", code, str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*run, str(k)], **pipes) for k in range(2)]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 2
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        process.communicate()
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".safetensors"]
    assert read_task(folder)[0]["t"].unique().numel() == 1


# --- what cannot be saved


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"task": None}, r"^save_task: meta must hold 'task', a str, got None$"),
        ({"fingerprint": 3}, r"^save_task: meta must hold 'fingerprint', a str, got 3$"),
        ({"sharing": []}, r"^save_task: meta must hold 'sharing', a dict, got \[\]$"),
        ({"format": 7}, r"^save_task: meta must leave 'format' to save_task, got 7$"),
        ({"score": torch.ones(1)}, r"^save_task: meta must hold JSON values, got one that is not \(.*Tensor"),
        ({"score": float("nan")}, r"^save_task: meta must hold JSON values, got one that is not .*JSON compliant"),
    ],
)
def test_bad_meta(folder, change, text):
    with pytest.raises(TaskFolderError, match=text):
        save_task(folder, some_tensors(1), {**META, **change})
    assert_same(read_task(folder)[0], some_tensors())


def test_save_into_a_file(tmp_path):
    (tmp_path / "cubs").write_text("mine")
    with pytest.raises(TaskFolderError, match="^save_task: folder must be a folder or not exist, got the file .*cubs$"):
        save_task(tmp_path / "cubs", some_tensors(), META)
    assert (tmp_path / "cubs").read_text() == "mine"
