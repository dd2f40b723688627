"""One cell of the compactness grid: a network trained with one seed, and what it reached."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from dynaconv import _checks
from dynaconv.study.methods import Method
from dynaconv.study.settings import CompactnessSettings


@dataclass(frozen=True)
class Cell:
    """A method and a seed."""

    method: Method
    seed: int

    @property
    def name(self) -> str:
        """Also the name of its files."""
        return f"{self.method.name}-seed{self.seed}"


def grid(methods: list[Method], seeds: int) -> list[Cell]:
    """All cells, seed by seed, so that an unfinished study already compares all methods."""
    return [Cell(method, seed) for seed in range(seeds) for method in methods]


def build(settings: CompactnessSettings, cell: Cell, bundle: Any) -> nn.Module:
    """The network of a cell as it starts; its static weights depend on the seed alone."""
    from dynaconv.train.callbacks import seed_everything
    from dynaconv.train.networks import architecture, build_network

    recipe = settings.recipe(cell.method, cell.seed)
    seed_everything(cell.seed)
    return build_network(recipe, architecture(recipe, len(bundle.classes), bundle.image_size))


def train(
    settings: CompactnessSettings, cell: Cell, bundle: Any, run: Path, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Train one cell in the run folder `run` (continuing it where it was interrupted) and test it.

    Returns:
        The row: method, seed, accuracy on the test split, params, MACs, seconds; or method, seed and `diverged`, the
        reason for which training stopped.
    """
    from dynaconv.train import TrainingDiverged, evaluate, fit
    from dynaconv.train.run_folder import RunFolder

    row = {"method": cell.method.name, "seed": cell.seed, **costs(build(settings, cell, bundle), bundle)}
    try:
        result = fit(
            settings.recipe(cell.method, cell.seed),
            run,
            resume=RunFolder(run).last.exists(),
            overwrite=not RunFolder(run).last.exists(),
            progress=tell,
            bundle=seeded(bundle, cell.seed),
        )
    except TrainingDiverged as error:
        return {**row, "diverged": str(error)}
    tested = evaluate(result.model, bundle.test, batch_size=settings.batch_size)
    if not math.isfinite(tested["loss"]):
        # DCD's Phi has no bound, so batch norms that are not settled yet let activations grow from layer to layer.
        return {**row, "diverged": _checks.study_not_finite()}
    return {
        **row,
        "accuracy": tested["accuracy"],
        "loss": tested["loss"],
        "validation_accuracy": result.best_accuracy,
        "train_loss": result.history[-1]["train_loss"],
        "epochs": len(result.history),
        "seconds": result.seconds,
    }


def seeded(bundle: Any, seed: int) -> Any:
    """The same pictures for training, in other batches and augmented otherwise."""
    train = copy.copy(bundle.train)
    augmentation = copy.copy(getattr(train, "augmentation", None))
    if augmentation is not None:
        augmentation.seed = seed
        train.augmentation = augmentation
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    return dataclasses.replace(bundle, train=Reordered(train, order))


class Reordered(Dataset):
    """A data set in another order."""

    def __init__(self, base: Any, order: list[int]) -> None:
        self.base, self.order = base, order

    def set_epoch(self, epoch: int) -> None:
        """Which epoch's augmentation to apply."""
        self.base.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.order)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W], labels [B]."""
        return self.base.__getitems__([self.order[i] for i in indices])


def costs(model: nn.Module, bundle: Any) -> dict[str, int]:
    """Parameters, and multiply-adds of one image: static, mixing and routing apart."""
    from dynaconv.cost import profile

    image, _ = bundle.test.__getitems__([0])
    counted = profile(model, image, include_linear=True)
    static, mixing = counted.dense_macs, round(float(counted.mixing_macs[0]))
    routing = round(float(counted.routing_macs[0]))
    return {
        "params": counted.params,
        "static_macs": static,
        "mixing_macs": mixing,
        "routing_macs": routing,
        "macs": static + mixing + routing,
    }
