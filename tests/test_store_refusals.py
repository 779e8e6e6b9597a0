"""Task folders that are refused: not one, damaged, or of another model."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from task_folder import META, some_tensors, tensor_file

from taps_fast import store
from taps_fast.store import TaskFolderError, check_against, read_task, save_task


@pytest.fixture
def folder(tmp_path):
    save_task(tmp_path / "cubs", some_tensors(), META)
    return tmp_path / "cubs"


# --- what cannot be read


def test_not_a_task_folder(tmp_path):
    (tmp_path / "file").touch()
    for path, what in ((tmp_path, "a folder without one"), (tmp_path / "file", "a file"), (tmp_path / "x", "no such")):
        with pytest.raises(
            TaskFolderError, match=f"^read_task: folder must be a task folder, with a task.json, got {what}"
        ):
            read_task(path)


@pytest.mark.parametrize("text", ["[]", "{}", '{"version": "2.0.0", "tasks": []}', '{"format": "1", "library": ""}'])
def test_another_json_file(folder, text):
    (folder / "task.json").write_text(text)
    with pytest.raises(TaskFolderError, match=r"task\.json must be written by taps_fast, got another JSON file$"):
        read_task(folder)


def test_truncated_json(folder):
    path = folder / "task.json"
    whole = path.read_bytes()
    for length in (0, 1, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:length])
        with pytest.raises(TaskFolderError, match=r"task\.json must be JSON, got a truncated or corrupted file"):
            read_task(folder)


def test_any_changed_byte_of_json_is_found(folder):
    path = folder / "task.json"
    whole = path.read_bytes()
    for i in range(len(whole)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
        with pytest.raises(TaskFolderError):
            read_task(folder)


def test_edited_json(folder):
    path = folder / "task.json"
    path.write_text(path.read_text().replace('"threshold": 0.1', '"threshold": 0.2'))
    with pytest.raises(TaskFolderError, match=r"task\.json must match its checksum, got another content"):
        read_task(folder)


def rewrite(folder, **change):
    """task.json with another content and the checksum that goes with it."""
    path = folder / "task.json"
    document = json.loads(path.read_text()) | change
    del document["checksum"]
    path.write_text(json.dumps({**document, "checksum": store._checksum_of(document)}))


def test_newer_format(folder):
    rewrite(folder, format=store.FORMAT + 1, library="taps_fast 9.0")
    with pytest.raises(
        TaskFolderError,
        match=rf"^read_task: format must be at most {store.FORMAT} for taps_fast .*, got {store.FORMAT + 1} "
        r"\(.*task\.json was saved by taps_fast 9\.0: upgrade taps_fast\)$",
    ):
        read_task(folder)


def test_newer_format_is_named_even_if_its_checksum_means_something_else(folder):
    document = json.loads((folder / "task.json").read_text()) | {"format": 99}
    (folder / "task.json").write_text(json.dumps(document))
    with pytest.raises(TaskFolderError, match="format must be at most"):
        read_task(folder)


@pytest.mark.parametrize("key", ["task", "fingerprint", "sharing", "tensors"])
def test_json_without_a_key(folder, key):
    rewrite(folder, **{key: None})
    with pytest.raises(TaskFolderError, match=rf"^read_task: .*task\.json must hold '{key}', a (str|dict), got None$"):
        read_task(folder)


def test_missing_tensors_file(folder):
    name = tensor_file(folder).name
    tensor_file(folder).unlink()
    with pytest.raises(
        TaskFolderError, match=f"^read_task: folder must hold {name}, which its task.json names, got none"
    ):
        read_task(folder)


def test_truncated_tensors_file(folder):
    path = tensor_file(folder)
    whole = path.read_bytes()
    for length in (0, 4, 60, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(
            TaskFolderError, match=rf"must be a whole safetensors file, got {length} bytes .* truncated"
        ):
            read_task(folder)


def test_pickle_is_never_loaded(folder):
    class Bomb:
        def __reduce__(self):
            return (exec, ("raise SystemExit('unpickled')",))

    tensor_file(folder).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(TaskFolderError, match="must be a whole safetensors file"):
        read_task(folder)


def test_corrupted_tensor_is_named(folder):
    path = tensor_file(folder)
    whole = bytearray(path.read_bytes())
    whole[-1] ^= 1
    path.write_bytes(whole)
    with pytest.raises(TaskFolderError, match=r"^read_task: tensor '.*' must have the sha256 that task\.json gives"):
        read_task(folder)


@pytest.mark.parametrize(
    ("tensor", "part"),
    [(torch.zeros(5, 7).half(), "dtype"), (torch.zeros(7, 5), "shape"), (torch.zeros(5, 7), "sha256")],
)
def test_replaced_tensor(folder, tensor, part):
    path = tensor_file(folder)
    save_file({name: t.clone() for name, t in load_file(path).items()} | {"fc1.deltas.cubs": tensor}, path)
    with pytest.raises(
        TaskFolderError, match=rf"tensor 'fc1\.deltas\.cubs' must have the {part} that task\.json gives"
    ):
        read_task(folder)


def test_missing_and_extra_tensors_in_the_file(folder):
    path = tensor_file(folder)
    tensors = {name: t.clone() for name, t in load_file(path).items()}
    tensors["fc1.deltas.cubz"] = tensors.pop("fc1.deltas.cubs")
    save_file(tensors, path)
    with pytest.raises(
        TaskFolderError,
        match=r"must hold the tensors that task\.json names, got 1 \('fc1\.deltas\.cubs'\) missing and "
        r"1 \('fc1\.deltas\.cubz'\) extra; did you mean 'fc1\.deltas\.cubs'\?$",
    ):
        read_task(folder)


# --- what does not fit the model


def fits(tensors=None, expected=None, base=META["fingerprint"]):
    meta = {**META, "library": "taps_fast 0.1.0"}
    check_against(meta, some_tensors() if tensors is None else tensors, expected or some_tensors(1), base)


def test_fitting_task_passes():
    fits()
    fits(expected={name: tensor.to("meta") for name, tensor in some_tensors().items()})


def test_another_base():
    with pytest.raises(
        TaskFolderError,
        match=r"^load_task: task 'cubs' must be of this model's base, sha256:cd, got one of sha256:(ab){32} "
        r"\(saved by taps_fast 0\.1\.0; build TapsModel from the same weights, in the same dtype, as when .*saved\)$",
    ):
        fits(base="sha256:cd")


def test_missing_and_extra_tensors_of_the_model():
    tensors = some_tensors()
    tensors["fc1.delta.cubs"] = tensors.pop("fc1.deltas.cubs")
    with pytest.raises(
        TaskFolderError,
        match=r"^load_task: task 'cubs' must hold this model's tensors, got 1 \('fc1\.deltas\.cubs'\) missing and "
        r"1 \('fc1\.delta\.cubs'\) extra; did you mean 'fc1\.deltas\.cubs'\?$",
    ):
        fits(tensors)
    with pytest.raises(TaskFolderError, match=r"got none missing and 1 \('far away'\) extra$"):
        fits(some_tensors() | {"far away": torch.zeros(1)})
    many = some_tensors() | {f"layer{i}": torch.zeros(1) for i in range(9)}
    with pytest.raises(TaskFolderError, match=r"got 9 \('layer0', 'layer1', 'layer2', …\) missing and none extra$"):
        fits(expected=many)


def test_another_shape_or_dtype():
    with pytest.raises(
        TaskFolderError,
        match=r"^load_task: tensor 'fc1\.deltas\.cubs' of task 'cubs' must be \(5, 7\) like the model's, got \(5, 8\)$",
    ):
        fits(some_tensors() | {"fc1.deltas.cubs": torch.zeros(5, 8)})
    with pytest.raises(
        TaskFolderError,
        match=r"^load_task: tensor 'fc1\.deltas\.cubs' of task 'cubs' must be torch\.float32 like the model's, "
        r"got torch\.float16$",
    ):
        fits(some_tensors() | {"fc1.deltas.cubs": torch.zeros(5, 7).half()})


def test_every_error_is_a_value_error():
    assert issubclass(TaskFolderError, ValueError)
