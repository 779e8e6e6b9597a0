"""TAPS with PyTorch Lightning: a module, a callback for the gates, joint training of two tasks in mixed batches.

    python examples/lightning_module.py --help

The data are made up, as in plain.py.
"""

from __future__ import annotations

import argparse

import lightning
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from taps_fast import TapsModel
from taps_fast.train import GateLog, penalty_weight

CLASSES = {"two": 2, "three": 3}


def backbone() -> nn.Module:
    """Any network; yours is pretrained."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, 2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip


def loader(batch: int, count: int = 192) -> DataLoader:
    """Samples of both tasks: (image, task id, label)."""
    tasks = torch.arange(count) % len(CLASSES)
    labels = torch.randint(6, (count,)) % torch.tensor(list(CLASSES.values()))[tasks]
    images = torch.rand(count, 3, 16, 16)
    images[torch.arange(count), labels] += 0.5
    return DataLoader(TensorDataset(images, tasks, labels), batch, shuffle=True)


class Joint(lightning.LightningModule):
    """W0 + delta_shared + I(s_t)·delta_t: all tasks in one batch, one backward."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        self.options = options
        self.model = TapsModel(backbone(), head="7")
        for task, classes in CLASSES.items():
            self.model.add_task(task, classes=classes)
        self.shared = self.model.train_base()

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        images, tasks, labels = batch
        loss = F.cross_entropy(self.model(images, tasks=tasks), labels)
        self.log("loss", loss, on_epoch=True, on_step=False)
        lam = penalty_weight(self.options.lam, self.current_epoch, self.options.warmup_epochs)
        return loss + self.model.penalty(self.model.tasks, lam)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = [group for task in CLASSES for group in self.model.task_parameters(task)]
        for group in groups:
            if group["name"] == "scores":
                group["lr"] = self.options.score_lr
        for number, group in enumerate((*groups, *self.shared)):
            group["name"] += f" {number}"  # Lightning's monitors want names that differ
        return torch.optim.AdamW([*groups, *self.shared], lr=self.options.lr, weight_decay=0.0)


class Gates(lightning.Callback):
    """Logs and prints how much each task shares."""

    def on_train_start(self, trainer: lightning.Trainer, module: Joint) -> None:
        self.logs = [GateLog(module.model, task) for task in CLASSES]

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: Joint) -> None:
        for log in self.logs:
            module.log_dict({f"{log.task}/{name}": float(value) for name, value in log().items()})
            print(f"epoch {trainer.current_epoch + 1}, {log.task}: {log}")


def main(argv: list[str] | None = None) -> tuple[TapsModel, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--score-lr", type=float, default=6e-3)
    parser.add_argument("--lam", type=float, default=0.3, help="more closes more gates")
    parser.add_argument("--warmup-epochs", type=int, default=2, help="without the penalty")
    parser.add_argument("--precision", default="32-true", help="as lightning.Trainer's, such as bf16-mixed")
    parser.add_argument("--out", help="a folder for the tasks and for the shared backbone that they are of")
    options = parser.parse_args(argv)

    lightning.seed_everything(0, verbose=False)
    module = Joint(options)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(
        max_epochs=options.epochs, precision=options.precision, callbacks=[Gates()], accelerator="cpu", **quiet
    )
    trainer.fit(module, loader(options.batch))
    model = module.model
    if options.out:
        for task in model.tasks:
            model.save_task(task, f"{options.out}/{task}")
        torch.save(model.merge("base").state_dict(), f"{options.out}/backbone.pt")
    print(model.sharing())
    return model, {name: float(value) for name, value in trainer.callback_metrics.items()}


if __name__ == "__main__":
    main()
