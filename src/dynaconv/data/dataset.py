"""Labelled pictures, served in normalised batches."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dynaconv.data.augment import Augmentation

Triple = tuple[float, float, float]


class ImageSet(Dataset):
    """Pictures of one size with labels; a subclass says where the pixels come from.

    `self[i]` is (image [3, H, W] float32 normalised, label); `__getitems__` serves a whole batch at once,
    channels-last. Augmentation depends on (seed, epoch, index) alone, so a resumed run sees the same pictures.

    Args:
        labels: int64 [N]. mean, std: of the channels, on a 0..1 scale.
        boxes: int64 [N, 4] x0, y0, x1, y1 (end exclusive) of the object, or None.
        augmentation: None for evaluation.
    """

    def __init__(
        self,
        labels: Tensor,
        mean: Triple,
        std: Triple,
        *,
        boxes: Tensor | None = None,
        augmentation: Augmentation | None = None,
    ) -> None:
        self.labels, self.mean, self.std, self.boxes = labels, mean, std, boxes
        self.augmentation = augmentation

    def images_uint8(self, indices: Sequence[int]) -> Tensor:
        """Pictures before augmentation and normalisation, uint8 [B, 3, H, W]."""
        raise TypeError(f"{type(self).__name__} must implement images_uint8(indices)")

    def set_epoch(self, epoch: int) -> None:
        """Which epoch's augmentation to apply."""
        if self.augmentation is not None:
            self.augmentation.set_epoch(epoch, len(self))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W] float32 channels-last, labels [B]."""
        indices = list(indices)
        images = self.images_uint8(indices)
        if self.augmentation is not None:
            images = self.augmentation(images, indices)
        return normalise(images, self.mean, self.std), self.labels[indices]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        images, labels = self.__getitems__([index])
        return images[0], int(labels[0])


class MemoryImages(ImageSet):
    """Pictures held in memory: images uint8 [N, 3, H, W]."""

    def __init__(self, images: Tensor, labels: Tensor, mean: Triple, std: Triple, **options) -> None:
        super().__init__(labels, mean, std, **options)
        self.images = images

    def images_uint8(self, indices: Sequence[int]) -> Tensor:
        """Pictures before augmentation and normalisation, uint8 [B, 3, H, W]."""
        return self.images[list(indices)]


class FileImages(ImageSet):
    """Pictures decoded when they are asked for, by a few threads."""

    def __init__(
        self, paths: Sequence[Path], labels: Tensor, mean: Triple, std: Triple, *, image_size: int, **options
    ) -> None:
        super().__init__(labels, mean, std, **options)
        self.paths, self.image_size = list(paths), image_size

    def images_uint8(self, indices: Sequence[int]) -> Tensor:
        """Pictures before augmentation and normalisation, uint8 [B, 3, H, W]."""
        with ThreadPoolExecutor(2) as pool:
            pixels = list(pool.map(self._decode, indices))
        return torch.stack([torch.from_numpy(p).permute(2, 0, 1) for p in pixels])

    def _decode(self, index: int) -> np.ndarray:
        from dynaconv.data.image_files import decode

        try:
            return decode(self.paths[index], self.image_size)
        except OSError as error:
            raise ValueError(
                f"{self.paths[index]} became unreadable: {error}; remove it and run again"
            ) from None


def normalise(images: Tensor, mean: Triple, std: Triple) -> Tensor:
    """(pixels / 255 - mean) / std, float32, channels-last; images uint8 [B, 3, H, W]."""
    scale = torch.tensor([1 / (255 * s) for s in std]).view(1, 3, 1, 1)
    shift = torch.tensor([m / s for m, s in zip(mean, std, strict=True)]).view(1, 3, 1, 1)
    return images.to(torch.float32, memory_format=torch.channels_last).mul_(scale).sub_(shift)
