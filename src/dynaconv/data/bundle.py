"""What a data set offers: three splits, class names, how pictures are normalised."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dynaconv.data.dataset import ImageSet, Triple


@dataclass
class DataBundle:
    """A data set in three parts; `calibration` is held out from training and used for checkpoints and budgets.

    skipped: unreadable pictures (path, reason).
    """

    name: str
    classes: list[str]
    image_size: int
    mean: Triple
    std: Triple
    train: ImageSet
    calibration: ImageSet
    test: ImageSet
    skipped: list[tuple[str, str]] = field(default_factory=list)


def subset_indices(count: int, wanted: int | None, seed: int) -> Tensor:
    """A seeded choice of `wanted` out of `count` indices, ascending; all of them for None.

    Raises:
        ValueError: wanted is below 1 or above count.
    """
    if wanted is None or wanted == count:
        return torch.arange(count)
    if not 1 <= wanted <= count:
        raise ValueError(f"train_size must lie in 1..{count} for this data set, got {wanted}")
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(count, generator=generator)[:wanted].sort().values
