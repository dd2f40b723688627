"""`cifar10:DIR`: CIFAR-10 as torchvision stores it, or as an image folder."""

from __future__ import annotations

from pathlib import Path

import torch

from dynaconv.data.augment import Augmentation
from dynaconv.data.bundle import DataBundle, subset_indices
from dynaconv.data.dataset import MemoryImages
from dynaconv.data.folders import load_folder

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
CALIBRATION = 2000


def load_cifar10(
    folder: str | Path,
    image_size: int | None = None,
    train_size: int | None = None,
    seed: int = 0,
    strict: bool = False,
    augment: bool = True,
) -> DataBundle:
    """CIFAR-10 from DIR/cifar-10-batches-py (torchvision's layout) or DIR/train/CLASS, DIR/test/CLASS (pictures).

    2,000 training pictures are held out as the calibration split. Augmentation: shift by up to 4 pixels, flip.

    Raises:
        FileNotFoundError: neither layout is in DIR. ValueError: damaged files, or another image size than 32.
    """
    root = Path(folder)
    if image_size not in (None, 32):
        raise ValueError(
            f"CIFAR-10 has pictures of 32 pixels, got image_size={image_size}; use imagefolder:DIR to resize"
        )
    if (root / "train").is_dir():
        bundle = load_folder(root, 32, train_size, seed, strict, augment, name="cifar10", mean=MEAN, std=STD)
        if augment:
            bundle.train.augmentation = Augmentation(4, flip=True, seed=seed)
        return bundle
    if not (root / "cifar-10-batches-py").is_dir():
        raise FileNotFoundError(
            f"no CIFAR-10 in {root}: expected {root}/cifar-10-batches-py (as torchvision downloads it) or "
            f"{root}/train/CLASS and {root}/test/CLASS with pictures"
        )
    return _from_batches(root, train_size, seed, augment)


def _from_batches(root: Path, train_size: int | None, seed: int, augment: bool) -> DataBundle:
    from dynaconv.integrations.torchvision import import_torchvision

    import_torchvision()
    from torchvision.datasets import CIFAR10

    try:
        # torchvision compares the files with known MD5 sums before it unpickles them.
        train, test = CIFAR10(str(root), train=True), CIFAR10(str(root), train=False)
    except RuntimeError as error:
        raise ValueError(
            f"CIFAR-10 in {root} is incomplete or damaged ({error}); download it again"
        ) from None
    order = torch.randperm(len(train.targets), generator=torch.Generator().manual_seed(seed))
    held_out, rest = order[:CALIBRATION].sort().values, order[CALIBRATION:].sort().values
    chosen = rest[subset_indices(len(rest), train_size, seed)]
    pixels, labels = _tensors(train)
    parts = {
        "train": MemoryImages(pixels[chosen], labels[chosen], MEAN, STD),
        "calibration": MemoryImages(pixels[held_out], labels[held_out], MEAN, STD),
        "test": MemoryImages(*_tensors(test), MEAN, STD),
    }
    if augment:
        parts["train"].augmentation = Augmentation(4, flip=True, seed=seed)
    return DataBundle("cifar10", list(train.classes), 32, MEAN, STD, **parts)


def _tensors(data) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return pixels, torch.tensor(data.targets, dtype=torch.int64)
