"""What people run models with: export, AOTInductor, ONNX, workers of a DataLoader."""

from __future__ import annotations

import onnxruntime
import pytest
import torch
from nets import ConvNet, images, perturb, three_tasks
from torch import nn
from torch.utils.data import DataLoader, Dataset

from taps_fast import TapsModel

IDS = torch.tensor([1, -1, 0, 2, 1])


def adapted(dtype=torch.float32) -> TapsModel:
    model = three_tasks(ConvNet(), dtype=dtype).eval()
    model.probe(images(2, dtype=dtype))
    return model


class Mixed(torch.nn.Module):
    """ids as an ordinary input."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, ids):
        return self.model(x, tasks=ids)


@pytest.fixture(scope="module")
def exported():
    model, x = adapted(), images(5, dtype=torch.float32)
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        return model, torch.export.export(Mixed(model), (x, IDS), dynamic_shapes=({0: batch}, {0: batch}))


def test_an_exported_model_takes_other_mixes_and_batches(exported, tmp_path):
    model, program = exported
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for count in (2, 5, 9):
        x, ids = images(count, dtype=torch.float32), torch.arange(count) % 4 - 1
        with torch.no_grad():
            torch.testing.assert_close(loaded(x, ids), model(x, tasks=ids))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_an_exported_depthwise_convolution_runs_with_gradients_on(layout):
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten())
    model, x = perturb(TapsModel(net, ["cubs", "cars"]).eval(), closed=()), images(4, dtype=torch.float32)
    x, ids = x.to(memory_format=layout), torch.tensor([0, 1, 0, -1])
    model.probe(x)
    program = torch.export.export(Mixed(model), (x, ids)).module()
    torch.testing.assert_close(program(x, ids), model(x, tasks=ids))


def test_aot_inductor(tmp_path):
    model = TapsModel(nn.Sequential(nn.Linear(6, 5), nn.ReLU()), ["cubs", "cars"]).eval()
    perturb(model)
    x = torch.randn(3, 6)
    model.probe(x)
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(Mixed(model), (x, IDS[:3] % 2), dynamic_shapes=({0: batch}, {0: batch}))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        compiled = torch._inductor.aoti_load_package(package)
        for ids in (torch.tensor([0, -1]), torch.tensor([1, 1, -1, 0, 1])):
            x = torch.randn(len(ids), 6)
            torch.testing.assert_close(compiled(x, ids), model(x, tasks=ids))


class Answers(Dataset):
    """A dataset that asks the model, as one that embeds its samples would."""

    def __init__(self, model):
        self.model, self.x = model, images(6, dtype=torch.float32)

    def __len__(self):
        return 3

    def __getitem__(self, i):
        with torch.no_grad():
            return self.model(self.x[2 * i : 2 * i + 2], tasks=torch.tensor([i % 3, -1]))


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_loader(start):
    data = Answers(adapted())
    wanted = [data[i] for i in range(3)]  # the parent's threads have run before the fork
    loader = DataLoader(data, batch_size=None, num_workers=1, multiprocessing_context=start, timeout=120)
    for got, want in zip(loader, wanted, strict=True):
        torch.testing.assert_close(got, want)


def test_onnx_of_a_merged_task(tmp_path):
    plain, x = adapted().merge("cubs"), images(3, dtype=torch.float32)
    torch.onnx.export(plain, (x,), tmp_path / "cubs.onnx", dynamo=False, input_names=["x"])
    session = onnxruntime.InferenceSession(str(tmp_path / "cubs.onnx"), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), plain(x).detach(), rtol=1e-4, atol=1e-5)
