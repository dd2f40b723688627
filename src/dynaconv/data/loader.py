"""Loaders whose order follows from (seed, epoch) and whose shares are disjoint over processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler


class EpochSampler(Sampler[int]):
    """Indices of one process: all of them in an order given by (seed, epoch), every world_size-th one.

    With several processes the last indices are repeated so that all get the same number, unless `shuffle` is off.
    """

    def __init__(self, count: int, shuffle: bool, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.count, self.shuffle, self.seed = count, shuffle, seed
        self.rank, self.world_size, self.epoch = rank, world_size, 0

    def set_epoch(self, epoch: int) -> None:
        """Which epoch's order to give."""
        self.epoch = epoch

    def __len__(self) -> int:
        if self.shuffle:
            return -(-self.count // self.world_size)
        return len(range(self.rank, self.count, self.world_size))

    def __iter__(self) -> Iterator[int]:
        if not self.shuffle:
            return iter(range(self.rank, self.count, self.world_size))
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        order = torch.randperm(self.count, generator=generator).tolist()
        places = range(self.rank, len(self) * self.world_size, self.world_size)
        return iter([order[place % self.count] for place in places])


def _as_it_is(batch: Any) -> Any:
    return batch if isinstance(batch, tuple) else torch.utils.data.default_collate(batch)


def make_loader(
    dataset: Dataset,
    batch_size: int,
    shuffle: bool,
    seed: int = 0,
    drop_last: bool = False,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader:
    """A DataLoader over one of our data sets (or a Subset of one); batches are made whole by the data set.

    Args:
        batch_size: pictures for this process.
        seed: of the order; call `loader.sampler.set_epoch(e)` and `dataset.set_epoch(e)` before each epoch.
        rank, world_size: this process among those that share the data.
    """
    count = len(dataset)
    return DataLoader(
        dataset,
        batch_size,
        sampler=EpochSampler(count, shuffle, seed, rank, world_size),
        drop_last=drop_last,
        num_workers=num_workers,
        collate_fn=_as_it_is,
    )
