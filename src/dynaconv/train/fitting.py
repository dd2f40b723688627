"""One call from a recipe to a trained, calibrated, saved network in a run folder."""

from __future__ import annotations

import logging
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dynaconv import _checks
from dynaconv.budget import calibrate_, set_budget_
from dynaconv.convert import gates
from dynaconv.data import load_dataset, make_loader
from dynaconv.integrations import import_lightning
from dynaconv.models import load, save
from dynaconv.train.callbacks import (
    BudgetCallback,
    EpochProgress,
    EpochSeeds,
    FiniteGuard,
    RunLog,
    seed_everything,
)
from dynaconv.train.checkpoints import RunCheckpoint, WholeFileIO, read_checkpoint
from dynaconv.train.errors import TrainingInterrupted
from dynaconv.train.loaders import EpochLoader, Ranks, make_loaders
from dynaconv.train.loading import load_recipe
from dynaconv.train.logs import EventFiles, MetricsFile
from dynaconv.train.module import DynaconvModule
from dynaconv.train.networks import architecture, build_network
from dynaconv.train.precision import lightning_precision
from dynaconv.train.recipe import Recipe
from dynaconv.train.run_folder import RunFolder, clear_disk_errors

lightning = import_lightning()


@dataclass
class FitResult:
    """What `fit` hands back.

    model: in evaluation mode, with the weights of the best epoch, calibrated if the recipe says so.
    history: one dict an epoch: epoch (from 1), train_loss, val_loss, val_accuracy (0..1), ratio (executed over dense
        conditional MACs on the validation pictures, None for a dense network).
    seconds: training time of this call; best_accuracy: validation accuracy of the epoch that was kept, best_epoch.
    calibration: rows of the calibration (target, threshold, ratio, error).
    """

    model: nn.Module
    run_dir: Path
    history: list[dict[str, Any]]
    seconds: float
    best_accuracy: float
    best_epoch: int = 0
    calibration: list[dict[str, float]] = field(default_factory=list)


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
    bundle = bundle if bundle is not None else _load_data(recipe)
    arch = architecture(recipe, len(bundle.classes), bundle.image_size)
    seed_everything(recipe.trainer.seed)
    given, model = model is not None, build_network(recipe, arch, model)
    if teacher is None and recipe.trainer.teacher is not None:
        teacher = load(recipe.trainer.teacher, num_classes=arch["num_classes"])
    train_loader, val_loader = make_loaders(recipe, bundle, ranks)
    size = (3, bundle.image_size, bundle.image_size)
    module = DynaconvModule(model, recipe, len(train_loader), teacher=teacher, input_size=size)
    train_loader.epoch = lambda: module.epochs_done
    with clear_disk_errors(folder.path), _quiet():
        if ranks.rank == 0 and not resume:
            folder.create(recipe, overwrite=overwrite)
        checkpoint = RunCheckpoint(folder.checkpoints)
        started = time.monotonic()
        if done < recipe.trainer.epochs:
            trainer = _trainer(recipe, folder, ranks, done, module, checkpoint, progress, callbacks)
            _run(trainer, module, train_loader, val_loader, folder.last if resume else None)
        seconds = time.monotonic() - started
        return _finish(recipe, folder, ranks, module, bundle, None if given else arch, seconds, progress)


def _load_data(recipe: Recipe) -> Any:
    section = recipe.data
    return load_dataset(
        section.name,
        image_size=section.image_size,
        train_size=section.train_size,
        seed=section.seed,
        strict=section.strict,
        augment=section.augment,
    )


def _trainer(
    recipe: Recipe,
    folder: RunFolder,
    ranks: Ranks,
    done: int,
    module: DynaconvModule,
    checkpoint: RunCheckpoint,
    progress: bool | Callable[[str], None],
    callbacks: Sequence[Any],
) -> Any:
    section = recipe.trainer
    gpus = torch.cuda.is_available() and torch.cuda.device_count() >= ranks.local_world_size
    device = "cuda" if section.accelerator == "gpu" or (section.accelerator == "auto" and gpus) else "cpu"
    bars = [EpochProgress(progress if callable(progress) else None)] if progress else []
    purge = done * module.steps_per_epoch if done else None
    return lightning.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=ranks.local_world_size,
        num_nodes=ranks.world_size // ranks.local_world_size,
        strategy="ddp" if ranks.world_size > 1 else "auto",
        precision=lightning_precision(section.precision, device),
        max_epochs=section.epochs,
        gradient_clip_val=section.gradient_clip,
        default_root_dir=folder.path,
        logger=[
            MetricsFile(folder.metrics, gates(module.model), done),
            EventFiles(folder.path, name="", version="tensorboard", purge_step=purge),
        ],
        callbacks=[
            EpochSeeds(section.seed),
            FiniteGuard(),
            BudgetCallback(),
            RunLog(),
            *bars,
            *callbacks,
            checkpoint,
        ],
        plugins=[WholeFileIO()],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        use_distributed_sampler=False,
    )


def _run(
    trainer: Any,
    module: DynaconvModule,
    train_loader: EpochLoader,
    val_loader: EpochLoader,
    last: Path | None,
) -> None:
    module.train().to(memory_format=torch.channels_last)
    handler = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(module, train_loader, val_loader, ckpt_path=last, weights_only=True)
    except (SystemExit, lightning.pytorch.utilities.exceptions.SIGTERMException):
        # Lightning turns Ctrl-C into SystemExit and leaves the signal ignored.
        raise _interrupted(trainer, module) from None
    finally:
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            signal.signal(signal.SIGINT, handler)
    if trainer.received_sigterm or trainer.interrupted:
        raise _interrupted(trainer, module)


def _interrupted(trainer: Any, module: DynaconvModule) -> TrainingInterrupted:
    done, epochs = module.epochs_done, module.recipe.trainer.epochs
    message = _checks.train_interrupted(min(done + 1, epochs), epochs, done, trainer.global_step)
    return TrainingInterrupted(message)


def _finish(
    recipe: Recipe,
    folder: RunFolder,
    ranks: Ranks,
    module: DynaconvModule,
    bundle: Any,
    arch: dict[str, Any] | None,
    seconds: float,
    progress: bool | Callable[[str], None],
) -> FitResult:
    """Best weights, calibration, saved network; the first process writes, the others read what it wrote."""
    _wait(ranks)
    last, best = read_checkpoint(folder.last), read_checkpoint(folder.best)
    module.load_state_dict(best["state_dict"])
    history, epoch = last["dynaconv"]["history"], int(best["dynaconv"]["epochs_done"])
    model = module.model.cpu().eval()
    rows: list[dict[str, float]] = []
    if ranks.rank == 0:
        if recipe.calibrate and gates(model):
            rows = _calibrate(recipe, model, bundle)
        save(model, folder.model, arch=arch, metadata=_metadata(recipe, bundle, history[epoch - 1], rows))
    _wait(ranks)
    if ranks.rank != 0:
        model.load_state_dict(load(folder.model).state_dict())
    return FitResult(model, folder.path, history, seconds, history[epoch - 1]["val_accuracy"], epoch, rows)


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


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's banners and tips, and a deprecation inside it, off the user's screen."""
    names = ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning
            )
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
