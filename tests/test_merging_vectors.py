"""`TaskVectors`: what is read, what is refused, how much memory it takes; and the file that a merged model becomes."""

from __future__ import annotations

import gc
import json
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from taps_fast.merging import MergedModel, TaskVectors, checkpoints, emr, save_merged, task_arithmetic


def network() -> nn.Module:
    """Every kind of parameter: convolution, norm with buffers, embedding, linear, and a head."""
    return nn.ModuleDict(
        {
            "conv": nn.Conv2d(3, 4, 3),
            "norm": nn.BatchNorm2d(4),
            "tokens": nn.Embedding(7, 4),
            "scale": nn.LayerNorm(4),
            "fc": nn.Linear(4, 5),
            "frozen": nn.Linear(2, 2),
            "head": nn.Linear(5, 3),
        }
    )


def states(count=2, seed=0):
    """A base's state dict and ``count`` fine-tuned ones, whose heads differ in width."""
    torch.manual_seed(seed)
    base = network().state_dict()
    tuned = []
    for i in range(count):
        state = {n: t + 0.1 * torch.randn_like(t) if t.is_floating_point() else t + i + 1 for n, t in base.items()}
        state |= {n: base[n] for n in base if n.startswith("frozen")}
        state["head.weight"], state["head.bias"] = torch.randn(2 + i, 5), torch.randn(2 + i)
        tuned.append(state)
    return base, tuned


@pytest.mark.parametrize("kind", ["dict", "safetensors", "pytorch", "nested", "legacy", "folder", "sharded"])
def test_every_kind_of_checkpoint(kind, tmp_path):
    base, tuned = states()

    def stored(state, name):
        path = tmp_path / name
        if kind == "dict":
            return state
        if kind == "safetensors":
            save_file(state, path := path.with_suffix(".safetensors"))
        elif kind in ("pytorch", "nested", "legacy"):
            whole = {"state_dict": state} if kind == "nested" else state
            torch.save(whole, path := path.with_suffix(".pt"), _use_new_zipfile_serialization=kind != "legacy")
        else:
            path.mkdir()
            names = list(state)
            shards = {"model.safetensors": names}
            if kind == "sharded":
                shards = {"model-1.safetensors": names[:5], "model-2.safetensors": names[5:]}
                index = {"weight_map": {n: file for file, some in shards.items() for n in some}}
                (path / "model.safetensors.index.json").write_text(json.dumps(index))
            for file, some in shards.items():
                save_file({n: state[n] for n in some}, path / file)
        return path

    sources = {f"task{i}": stored(t, f"task{i}") for i, t in enumerate(tuned)}
    seen: list[str] = []
    vectors = TaskVectors.from_checkpoints(stored(base, "base"), sources, own="head.*", progress=seen.append)
    assert vectors.tasks == ["task0", "task1"] and len(vectors) == 2 and seen == list(vectors.base)
    assert set(vectors.kept) == {"norm.num_batches_tracked", "frozen.weight", "frozen.bias"}
    assert {"conv.weight", "norm.running_var", "tokens.weight", "scale.bias"} <= set(vectors.names)
    for i, task in enumerate(vectors.tasks):
        for name, tensor in vectors.expert(task).items():
            wanted = base[name] if name in vectors.kept else tuned[i][name]
            torch.testing.assert_close(tensor, wanted)
        assert vectors.own[task].keys() == {"head.weight", "head.bias"}


@pytest.mark.parametrize("own", ["head", "head.*", ["head.weight", "head.bias"], "hea[d]"])
def test_what_own_names_covers_what_lies_below(own):
    vectors = TaskVectors.from_checkpoints(*states(), own=own)
    assert not [name for name in vectors.base if "head" in name]
    assert all(mine.keys() == {"head.weight", "head.bias"} for mine in vectors.own.values())


def test_own_may_name_what_a_checkpoint_alone_has():
    base = {"w": torch.zeros(2)}
    vectors = TaskVectors.from_checkpoints(base, [base | {"new.w": torch.ones(1)}], own="new")
    assert list(vectors.own["0"]) == ["new.w"]


def test_coefficients_of_every_granularity():
    base, tuned = states()
    vectors = TaskVectors.from_checkpoints(base, tuned, own=["head.*"])
    c = torch.rand(len(vectors.names), 2)
    for coeffs, of in ((c, lambda l: c[l]), (c[0], lambda _: c[0]), (0.3, lambda _: (0.3, 0.3))):
        merged = vectors.fold(coeffs)
        for l, name in enumerate(vectors.names):
            a, b = of(l)
            wanted = base[name] + a * (tuned[0][name] - base[name]) + b * (tuned[1][name] - base[name])
            torch.testing.assert_close(merged[name], wanted)
    some = vectors.fold(c[1:3], names=vectors.names[1:3])
    assert all(torch.equal(some[n], vectors.fold(c)[n]) for n in some) and len(some) == 2


def test_tensors_of_two_dtypes():
    """Each dtype is folded apart, and the coefficients keep their rows."""
    base = {"a": torch.zeros(2), "b": torch.zeros(2, dtype=torch.bfloat16), "c": torch.zeros(2)}
    tuned = {n: torch.ones_like(t) for n, t in base.items()}
    c = torch.tensor([[1.0], [2.0], [3.0]], requires_grad=True)
    merged = TaskVectors.from_checkpoints(base, [tuned]).fold(c)
    assert [t.tolist() for t in (merged["a"], merged["b"], merged["c"])] == [[1, 1], [2, 2], [3, 3]]
    assert merged["b"].dtype == torch.bfloat16
    sum(t.float().sum() for t in merged.values()).backward()
    assert c.grad.tolist() == [[2.0]] * 3
    for rows in (2, 4):
        with pytest.raises(ValueError, match=rf"fold: coeffs must be a row for each of 3 tensors, got \({rows}, 1\)"):
            TaskVectors.from_checkpoints(base, [tuned]).fold(torch.ones(rows, 1))


def test_what_a_training_loop_saves_is_unwrapped():
    base, tuned = states(1)
    wrapped = TaskVectors.from_checkpoints({"state_dict": base, "epoch": 1}, [{"state_dict": tuned[0]}], own="head.*")
    assert wrapped.names == TaskVectors.from_checkpoints(base, tuned, own="head.*").names


def test_infinity_where_the_base_has_it_is_no_difference():
    base = {"mask": torch.tensor([0, -torch.inf]), "w": torch.tensor([1, torch.inf])}
    vectors = TaskVectors.from_checkpoints(base, [{**base, "w": torch.tensor([3, torch.inf])}])
    assert vectors.names == ["w"] and vectors.fold(0.5)["w"].tolist() == [2, torch.inf]


def test_no_deltas():
    base, _ = states()
    vectors = TaskVectors.from_checkpoints(base, [], own="head.*")
    assert len(vectors) == 0 and not vectors.names
    merged = task_arithmetic(vectors)
    assert all(torch.equal(merged[n], base[n]) for n in base if "head" not in n)


class Live(TorchDispatchMode):
    """The bytes of the storages that operators make, at most at one time."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in self.seen:
                storage = t.untyped_storage()
                self.seen.add(key := storage._cdata)
                self.now += (size := storage.nbytes())
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.gone, key, size)
        return out

    def gone(self, key, size):
        self.seen.discard(key)
        self.now -= size


def test_memory_is_base_and_deltas(tmp_path):
    """While it reads, one tensor more, and what looks for values that are not finite."""
    torch.manual_seed(0)
    base = {f"{i}.weight": torch.randn(64, 64) for i in range(20)}
    one = 64 * 64 * 4
    paths = []
    for k in range(5):
        paths.append(tmp_path / f"{k}.safetensors")
        save_file({n: t if k == 0 else t + torch.randn_like(t) for n, t in base.items()}, paths[-1])
    gc.collect()
    with Live() as live:
        vectors = TaskVectors.from_checkpoints(paths[0], paths[1:])
    total = 20 * one * 5
    stored = sum(t.untyped_storage().nbytes() for ts in vectors.deltas.values() for t in ts)
    assert stored == 20 * 4 * one and 0.75 * total < live.peak <= total + 3 * one


def test_file_that_any_loader_takes(tmp_path):
    """Safetensors, a folder with the configuration beside them, and a module's load_state_dict."""
    base, tuned = states()
    vectors = TaskVectors.from_checkpoints(base, tuned, own="head.*")
    model = network()
    merged = {**task_arithmetic(vectors, 0.5), **vectors.own["0"]}
    path = save_merged(merged, tmp_path / "merged.safetensors", base=vectors.fingerprint())
    model.head = nn.Linear(5, 2)
    model.load_state_dict(load_file(path))
    torch.testing.assert_close(model.conv.weight.detach(), merged["conv.weight"])

    (like := tmp_path / "like").mkdir()
    (like / "config.json").write_text('{"kind": "tiny"}')
    (like / "model.safetensors").write_bytes(b"the base's, not to be copied")
    tied = {"a": merged["fc.weight"], "b": merged["fc.weight"], "c": merged["fc.weight"][:2].t()}
    file = save_merged(tied, tmp_path / "folder", like=like)
    assert (tmp_path / "folder/config.json").is_file()
    assert all(torch.equal(t, tied[n]) for n, t in load_file(file).items())
    with pytest.raises(ValueError, match="save_merged: path must be a folder with like, got .*x.safetensors"):
        save_merged(tied, tmp_path / "x.safetensors", like=like)

    again = TaskVectors.from_checkpoints(base, [path], own="head.*")
    assert set(again.names) == set(vectors.names)
    other = {n: t + 1 if t.is_floating_point() else t for n, t in base.items()}
    with pytest.raises(ValueError, match="merged.safetensors must be of this base, sha256:.*, got one of sha256:"):
        TaskVectors.from_checkpoints(other, [path], own="head.*")


def test_a_folder_is_written_over_itself(tmp_path, monkeypatch):
    """Its weights alone are replaced, also those that the merged ones still lie in; a failure leaves all as it was."""
    for name, text in (("config.json", "{}"), ("model.safetensors.index.json", '{"weight_map": {"w": "old"}}')):
        (tmp_path / name).write_text(text)
    file = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(5000)}, file)

    def files():
        return {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def broken(tensors, path, metadata):
        path.write_bytes(b"half of it")
        raise OSError("no space left")

    held, state = files(), load_file(file)
    with monkeypatch.context() as patched, pytest.raises(OSError, match="no space left"):
        patched.setattr(checkpoints, "save_file", broken)
        save_merged(state, tmp_path, like=tmp_path)
    assert files() == held
    assert save_merged({"w": state["w"].add_(1)}, tmp_path, like=str(tmp_path / ".")) == file
    assert files() == held | {file.name: file.read_bytes()}
    assert TaskVectors.from_checkpoints(tmp_path, []).base["w"].eq(2).all()


def changed(**change):
    base, tuned = states(1)
    for name, tensor in change.items():
        name = name.replace("__", ".")
        if tensor is None:
            del tuned[0][name]
        else:
            tuned[0][name] = tensor
    return lambda: TaskVectors.from_checkpoints(base, tuned, own="head.*")


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (changed(fc__bias=None), ValueError,
         r"a state dict must have every tensor of the base, got none of 'fc.bias' \(base: a state dict; own= excl"),
        (changed(a=torch.ones(1), b=torch.ones(1), c=torch.ones(1), d=torch.ones(1)), ValueError,
         "must have no tensor that the base lacks, got them of 'a', 'b', 'c' and 1 more"),
        (changed(fc__bias=torch.ones(4)), ValueError,
         r"'fc.bias' must have the base's shape, \(5,\), got \(4,\) \(a state dict\)"),
        (changed(fc__bias=torch.ones(5).half()), ValueError,
         "'fc.bias' must have the base's dtype, torch.float32, got torch.float16"),
        (changed(fc__bias=torch.tensor([0, torch.nan, 0, torch.inf, 0])), ValueError,
         "'fc.bias' must differ from the base by finite numbers, got 2 that are not"),
        (lambda: TaskVectors.from_checkpoints("nowhere.pt", []), FileNotFoundError, "got nowhere.pt"),
        (lambda: TaskVectors.from_checkpoints("nowhere.safetensors", []), FileNotFoundError, "got nowhere.saf"),
        (lambda: TaskVectors.from_checkpoints(network(), []), TypeError,
         "source must be a file, a folder or a state dict, got a ModuleDict; its state_dict.. is one"),
        (lambda: TaskVectors.from_checkpoints({}, [torch.ones(1)]), TypeError, "or a state dict, got a Tensor$"),
        (lambda: TaskVectors.from_checkpoints(*states(), own=["head", "haed.*"]), ValueError,
         r"own must match a tensor, got 'haed.\*' \(did you mean 'head'\? known: conv, norm, tokens, scale, fc, "),
        (lambda: TaskVectors.from_checkpoints(*states(), own="hea"), ValueError, "own must match a tensor, got 'hea'"),
        (lambda: TaskVectors({}, {}, ["a", "a"]), ValueError, "tasks must be different names"),
        (lambda: TaskVectors({}, {"w": []}, []), ValueError, "deltas must be 0 for a tensor of base, got 0 for 'w'"),
        (lambda: TaskVectors({}, {}, ["a"]).expert("b"), ValueError, "task must be one of a, got 'b'"),
    ],
)  # fmt: skip
def test_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_what_is_not_a_checkpoint(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="list.pt must hold a state dict, got list"):
        TaskVectors.from_checkpoints(tmp_path / "list.pt", [])
    torch.save({"epoch": 1}, tmp_path / "epoch.pt")
    for source, named in ((tmp_path / "epoch.pt", "epoch.pt"), ({"epoch": 1}, "source")):
        with pytest.raises(ValueError, match=f"{named} must hold a state dict, got one with int for 'epoch'"):
            TaskVectors.from_checkpoints(source, [])
    with pytest.raises(FileNotFoundError, match="a folder must hold model.safetensors or its index, got"):
        TaskVectors.from_checkpoints(tmp_path, [])


def test_other_device():
    base, tuned = states()
    vectors = TaskVectors.from_checkpoints(base, tuned, own="head.*").to("meta")
    assert {t.device.type for each in vectors.deltas.values() for t in each} == {"meta"}
    assert vectors.own["1"]["head.bias"].device.type == "meta"


@pytest.mark.parametrize(
    "merge",
    [
        lambda model, vectors: task_arithmetic(vectors),
        lambda model, vectors: vectors.expert("a"),
        lambda model, vectors: emr(vectors).state("a"),
        lambda model, vectors: MergedModel(model, vectors, head="2").state("a"),
    ],
    ids=["fold", "expert", "masked", "merged"],
)
def test_what_was_merged_can_be_changed(merge):
    """Also what no coefficient weighs: kept tensors, and a task's own."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    base = model.state_dict()
    tuned = {t: {n: p + 1 if n == "0.bias" else p for n, p in base.items()} for t in "ab"}
    vectors = TaskVectors.from_checkpoints(base, tuned, own="2")
    state = merge(model, vectors)
    wanted = {name: tensor.clone() for name, tensor in state.items()}
    assert {"0.weight", "1.running_mean"} < set(vectors.kept) and vectors.names == ["0.bias"]
    for tensor in state.values():
        tensor.add_(5)
    assert all(map(torch.equal, wanted.values(), merge(model, vectors).values()))


def test_shows_what_it_holds():
    w = torch.ones(2)
    vectors = TaskVectors({"a": w, "b": w}, {"a": [w, w]}, ["x", "y"], {"x": {"head": w}})
    assert repr(vectors) == "TaskVectors(tasks=['x', 'y'], 1 tensor merged, 1 kept, own {'x': 1})"


def test_kept_tensors_that_are_tied_are_copied_once():
    w = torch.ones(2)
    state = TaskVectors({"a": w, "b": w, "c": torch.ones(2)}, {}, []).fold(0.0)
    assert state["a"] is state["b"] is not w and state["c"] is not state["a"]


def test_what_was_read_from_a_model_does_not_change_with_it():
    """Merged weights are loaded into the model that the base came from."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    tuned = {t: {n: p + 1 for n, p in model.state_dict().items()} for t in "ab"}
    vectors = TaskVectors.from_checkpoints(model.state_dict(), tuned, own="1.bias")
    assert vectors.base["0.weight"] is vectors.base["1.weight"]
    first = vectors.fold(1.0)
    model.load_state_dict(first, strict=False)
    tuned["a"]["1.bias"].zero_()
    assert all(map(torch.equal, first.values(), vectors.fold(1.0).values())) and vectors.own["a"]["1.bias"].any()
