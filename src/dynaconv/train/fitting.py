"""One call from a recipe to a trained, calibrated, saved network in a run folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from dynaconv import _checks
from dynaconv.budget import calibrate_, set_budget_
from dynaconv.convert import gates
from dynaconv.data import load_dataset, make_loader, task_of
from dynaconv.models import load, read_config, save
from dynaconv.train.callbacks import seed_everything
from dynaconv.train.checkpoints import read_checkpoint
from dynaconv.train.loaders import Ranks, make_loaders
from dynaconv.train.loading import load_recipe
from dynaconv.train.module import DynaconvModule
from dynaconv.train.networks import architecture, build_network
from dynaconv.train.precision import device_of
from dynaconv.train.recipe import Recipe
from dynaconv.train.run_folder import RunFolder, clear_disk_errors
from dynaconv.train.running import Job, quiet, run


@dataclass
class FitResult:
    """What `fit` hands back.

    model: in evaluation mode, with the weights of the best epoch, calibrated if the recipe says so.
    history: one dict an epoch: epoch (from 1), train_loss, val_loss, val_accuracy (0..1; PCK for keypoints), ratio
        (executed over dense conditional MACs on the validation pictures, None for a dense network).
    seconds: training time of this call; best_accuracy: validation accuracy of the epoch that was kept, best_epoch.
    calibration: rows of the calibration (target, threshold, ratio, error).
    metric: what "accuracy" is: that, or PCK for keypoints.
    """

    model: nn.Module
    run_dir: Path
    history: list[dict[str, Any]]
    seconds: float
    best_accuracy: float
    best_epoch: int = 0
    calibration: list[dict[str, float]] = field(default_factory=list)
    metric: str = "accuracy"


def fit(
    recipe: Recipe | str | Path | dict[str, Any],
    run_dir: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool | Callable[[str], None] = True,
    model: nn.Module | None = None,
    bundle: Any = None,
    teacher: nn.Module | None = None,
    callbacks: Sequence[Any] = (),
) -> FitResult:
    """Train as a recipe says and leave a run folder: config.yaml, metrics.csv, tensorboard/, checkpoints/, model/.

    Started by torchrun, every process calls this; they share the batches, and the first one writes.

    Args:
        recipe: a Recipe, or what `load_recipe` takes.
        run_dir: a new folder, unless `resume` or `overwrite`.
        resume: continue after the last completed epoch, exactly as if there had been no interruption. A run that was
            interrupted in its first epoch starts again.
        overwrite: remove the files of an earlier run in this folder.
        progress: True shows a bar and a line an epoch on stderr; a function gets the lines; False is silent.
        model: the network to train instead of a new one; masks are added if the recipe asks for them.
        bundle: data instead of `load_dataset(recipe.data.name, ...)`.
        teacher: dense network for distillation, instead of `trainer.teacher`.
        callbacks: further Lightning callbacks.
    Returns:
        FitResult. The validation numbers come from `bundle.calibration`; the test split is not touched.
    Raises:
        FileExistsError, FileNotFoundError, ValueError, OSError: bad input, in one sentence; nothing is written.
        TrainingInterrupted: Ctrl-C; TrainingDiverged: NaN. The last good checkpoint is whole in both cases.
    """
    recipe, folder, ranks = load_recipe(recipe), RunFolder(run_dir), Ranks.from_environment()
    if ranks.rank == 0:
        folder.check(recipe, resume=resume, overwrite=overwrite)
    resume = resume and folder.last.exists()
    done = int(read_checkpoint(folder.last)["dynaconv"]["epochs_done"]) if resume else 0
    device = device_of(recipe.trainer.accelerator, ranks.local_world_size)
    # Before the data, which may take minutes.
    for start, given in ((recipe.trainer.init_from, model), (recipe.trainer.teacher, teacher)):
        if start is not None and given is None:
            read_config(start)
    bundle = bundle if bundle is not None else _load_data(recipe)
    arch = architecture(recipe, len(bundle.classes), bundle.image_size)
    module = _module(recipe, bundle, arch, ranks, model, teacher)
    job = Job(recipe, folder, ranks, device, module, done)
    with clear_disk_errors(folder.path), quiet():
        if ranks.rank == 0 and not resume:
            folder.create(recipe, overwrite=overwrite)
        started = time.monotonic()
        if done < recipe.trainer.epochs:
            run(job, progress, callbacks)
        seconds = time.monotonic() - started
        return _finish(job, bundle, arch if model is None else None, seconds)


def _module(
    recipe: Recipe,
    bundle: Any,
    arch: dict[str, Any],
    ranks: Ranks,
    model: nn.Module | None,
    teacher: nn.Module | None,
) -> DynaconvModule:
    """Network, teacher and loaders in one LightningModule."""
    seed_everything(recipe.trainer.seed)
    network = build_network(recipe, arch, model)
    if teacher is None and recipe.trainer.teacher is not None:
        teacher = load(recipe.trainer.teacher, num_classes=arch["num_classes"])
    if teacher is None and recipe.trainer.distill_weight > 0:
        raise _checks.train_needs("trainer.distill_weight", "trainer.teacher", "RUN")
    if teacher is not None and recipe.trainer.distill_weight == 0:
        raise _checks.train_needs("a teacher", "trainer.distill_weight", "0.5")
    train, validation = make_loaders(recipe, bundle, ranks)
    size = (3, bundle.image_size, bundle.image_size)
    module = DynaconvModule(
        network, recipe, len(train), teacher=teacher, task=task_of(bundle.train), input_size=size
    )
    train.epoch = lambda: module.epochs_done
    module.loaders = (train, validation)
    return module


def _load_data(recipe: Recipe) -> Any:
    section = recipe.data
    return load_dataset(
        section.name,
        image_size=section.image_size,
        train_size=section.train_size,
        seed=section.seed,
        strict=section.strict,
        augment=section.augment,
        object_share=section.object_share,
        classes=section.classes,
    )


def _finish(job: Job, bundle: Any, arch: dict[str, Any] | None, seconds: float) -> FitResult:
    """Best weights, calibration, saved network; the first process writes, the others read what it wrote."""
    _wait(job.ranks)
    last, best = read_checkpoint(job.folder.last), read_checkpoint(job.folder.best)
    job.module.load_state_dict(best["state_dict"])
    if job.module.budget is not None:
        job.module.budget.turn_()
    history, epoch = last["dynaconv"]["history"], int(best["dynaconv"]["epochs_done"])
    model, chosen = job.module.model.cpu().eval(), history[epoch - 1]
    rows: list[dict[str, float]] = []
    if job.ranks.rank == 0:
        if job.recipe.calibrate and gates(model):
            rows = _calibrate(job.recipe, model, bundle)
        save(model, job.folder.model, arch=arch, metadata=_metadata(job.recipe, bundle, chosen, rows))
    _wait(job.ranks)
    if job.ranks.rank != 0:
        model.load_state_dict(load(job.folder.model).state_dict())
    return FitResult(
        model, job.folder.path, history, seconds, chosen["val_accuracy"], epoch, rows, job.module.task.metric
    )


def _calibrate(recipe: Recipe, model: nn.Module, bundle: Any) -> list[dict[str, float]]:
    loader = make_loader(bundle.calibration, recipe.data.batch_size, shuffle=False, seed=0, drop_last=False)
    rows = calibrate_(model, loader, recipe.calibrate).rows
    if recipe.budget is not None and any(abs(recipe.budget.target - t) < 1e-6 for t in recipe.calibrate):
        set_budget_(model, recipe.budget.target)
    return rows


def _metadata(
    recipe: Recipe, bundle: Any, best: dict[str, Any], rows: list[dict[str, float]]
) -> dict[str, Any]:
    return {
        "dataset": bundle.name,
        "classes": list(bundle.classes),
        "metric": task_of(bundle.train).metric,
        "image_size": bundle.image_size,
        "mean": [float(v) for v in bundle.mean],
        "std": [float(v) for v in bundle.std],
        "calibration": rows,
        "best": best,
        "target": recipe.budget.target if recipe.budget else None,
    }


def _wait(ranks: Ranks) -> None:
    if ranks.world_size > 1 and dist.is_initialized():
        dist.barrier()
