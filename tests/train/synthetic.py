"""A data set that takes no time: coloured noise, four classes, augmentation that follows from (seed, epoch)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from dynaconv.integrations import import_lightning

lightning = import_lightning()
SIZE = 16


class Colours(Dataset):
    def __init__(self, count: int, seed: int, augment: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(count) % 4
        self.images = (
            torch.randn(count, 3, SIZE, SIZE, generator=generator) + self.labels.view(-1, 1, 1, 1) * 0.5
        )
        self.seed, self.augment, self.epoch, self.boxes = seed, augment, 0, None

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        images, labels = self.__getitems__([index])
        return images[0], int(labels[0])

    def __getitems__(self, indices: list[int]):
        images = self.images[indices]
        if self.augment:
            for row, index in enumerate(indices):
                generator = torch.Generator().manual_seed(1000 * self.epoch + index)
                images[row] += 0.2 * torch.randn(images[row].shape, generator=generator)
        return images.contiguous(memory_format=torch.channels_last), self.labels[indices]


@dataclass
class Bundle:
    name: str = "colours"
    classes: list[str] = field(default_factory=lambda: list("abcd"))
    image_size: int = SIZE
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    train: Dataset = field(default_factory=lambda: Colours(48, 0, augment=True))
    calibration: Dataset = field(default_factory=lambda: Colours(32, 1))
    test: Dataset = field(default_factory=lambda: Colours(16, 2))


def recipe(dynamic: bool = True, **sections: dict[str, Any]) -> dict[str, Any]:
    """Three steps an epoch on a ResNet-8 of width 4."""
    made: dict[str, Any] = {
        "model": {"name": "resnet8_cifar", "options": {"width": 4}},
        "data": {"name": "colours", "batch_size": 16},
        "optim": {"lr": 0.05},
        "trainer": {"epochs": 2, "precision": "fp32"},
    }
    if dynamic:
        made |= {"masking": {}, "budget": {"target": 0.5}}
    for name, section in sections.items():
        made[name] = {**made.get(name, {}), **section} if isinstance(section, dict) else section
    return made


class At(lightning.Callback):
    """Does something at one moment of a run."""

    def __init__(self, epoch: int, batch: int, action) -> None:
        self.epoch, self.batch, self.action = epoch, batch, action

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if (pl_module.epochs_done, batch_idx) == (self.epoch, self.batch):
            self.action(pl_module)


def files(folder: Path) -> list[str]:
    """Everything below a folder, event files by their kind."""
    return sorted(str(f.relative_to(folder)).split(".tfevents")[0] for f in folder.rglob("*") if f.is_file())
