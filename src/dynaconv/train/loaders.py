"""Loaders that know which epoch it is, and which process they belong to."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from dynaconv import _checks
from dynaconv.data import make_loader
from dynaconv.train.recipe import Recipe


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started (0 of 1 without it)."""

    rank: int = 0
    world_size: int = 1
    local_world_size: int = 1

    @classmethod
    def from_environment(cls) -> Ranks:
        """What torchrun says."""
        if not (dist.is_available() and dist.is_torchelastic_launched()):
            return cls()
        names = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
        return cls(*(int(os.environ[name]) for name in names))


class EpochLoader:
    """Tells data set and sampler the epoch before each pass: order and augmentation follow from (seed, epoch)."""

    def __init__(self, loader: Any, epoch: Callable[[], int] = lambda: 0) -> None:
        self.loader, self.epoch = loader, epoch

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        # A generator, so that the epoch is asked for when the first batch is wanted, not when Lightning prepares.
        for part in ("dataset", "sampler", "batch_sampler"):
            set_epoch = getattr(getattr(self.loader, part, None), "set_epoch", None)
            if set_epoch is not None:
                set_epoch(self.epoch())
        yield from self.loader


def make_loaders(recipe: Recipe, bundle: Any, ranks: Ranks) -> tuple[EpochLoader, EpochLoader]:
    """Training and validation loader of this process.

    Raises:
        ValueError: the batch size is not a multiple of the number of processes.
    """
    section = recipe.data
    if section.batch_size % ranks.world_size:
        raise _checks.train_batch_size(section.batch_size, ranks.world_size)
    batch_size = section.batch_size // ranks.world_size
    shared = {
        "seed": section.seed,
        "num_workers": section.num_workers,
        "rank": ranks.rank,
        "world_size": ranks.world_size,
    }
    whole_batches = len(bundle.train) >= section.batch_size
    train = make_loader(bundle.train, batch_size, shuffle=True, drop_last=whole_batches, **shared)
    validation = make_loader(bundle.calibration, batch_size, shuffle=False, drop_last=False, **shared)
    return EpochLoader(train), EpochLoader(validation)
