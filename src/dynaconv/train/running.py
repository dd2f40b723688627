"""Driving Lightning: the trainer of a run, Ctrl-C, and what it may print."""

from __future__ import annotations

import logging
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from dynaconv import _checks
from dynaconv.convert import gates
from dynaconv.integrations import import_lightning
from dynaconv.train.callbacks import (
    BudgetCallback,
    EpochProgress,
    EpochSeeds,
    FiniteGuard,
    RunLog,
    TemperatureCallback,
)
from dynaconv.train.checkpoints import RunCheckpoint, WholeFileIO
from dynaconv.train.errors import TrainingInterrupted
from dynaconv.train.loaders import Ranks
from dynaconv.train.logs import EventFiles, MetricsFile
from dynaconv.train.module import DynaconvModule
from dynaconv.train.precision import lightning_precision
from dynaconv.train.recipe import Recipe
from dynaconv.train.run_folder import RunFolder

lightning = import_lightning()


@dataclass
class Job:
    """One run in this process; `done` epochs were completed before."""

    recipe: Recipe
    folder: RunFolder
    ranks: Ranks
    device: str
    module: DynaconvModule
    done: int = 0


def run(job: Job, progress: bool | Callable[[str], None] = True, callbacks: Sequence[Any] = ()) -> None:
    """Train the epochs that are left.

    Raises:
        TrainingInterrupted: Ctrl-C or a termination signal.
    """
    checkpoint = RunCheckpoint(job.folder.checkpoints, job.done)
    bars = [EpochProgress(progress if callable(progress) else None)] if progress else []
    around = [
        EpochSeeds(job.recipe.trainer.seed),
        FiniteGuard(),
        BudgetCallback(),
        TemperatureCallback(),
        RunLog(),
        *bars,
        *callbacks,
    ]
    trainer = _trainer(job, [*around, checkpoint])
    job.module.train().to(memory_format=torch.channels_last)
    handler = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(
            job.module,
            *job.module.loaders,
            ckpt_path=job.folder.last if job.done else None,
            weights_only=True,
        )
    except (SystemExit, lightning.pytorch.utilities.exceptions.SIGTERMException):
        # Lightning turns Ctrl-C into SystemExit and leaves the signal ignored.
        raise _interrupted(job, checkpoint, trainer.global_step) from None
    finally:
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            signal.signal(signal.SIGINT, handler)


def _interrupted(job: Job, checkpoint: RunCheckpoint, step: int) -> TrainingInterrupted:
    done, epochs = checkpoint.epochs_saved, job.recipe.trainer.epochs
    return TrainingInterrupted(_checks.train_interrupted(min(done + 1, epochs), epochs, done, step))


def _trainer(job: Job, callbacks: Sequence[Any]) -> Any:
    section, ranks = job.recipe.trainer, job.ranks
    purge = job.done * job.module.steps_per_epoch if job.done else None
    loggers = [
        MetricsFile(job.folder.metrics, gates(job.module.model), job.done),
        EventFiles(job.folder.path, name="", version="tensorboard", purge_step=purge),
    ]
    return lightning.Trainer(
        accelerator="gpu" if job.device == "cuda" else "cpu",
        devices=ranks.local_world_size,
        num_nodes=ranks.world_size // ranks.local_world_size,
        strategy="ddp" if ranks.world_size > 1 else "auto",
        precision=lightning_precision(section.precision, job.device),
        max_epochs=section.epochs,
        gradient_clip_val=section.gradient_clip,
        default_root_dir=job.folder.path,
        logger=loggers,
        callbacks=list(callbacks),
        plugins=[WholeFileIO()],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        use_distributed_sampler=False,
    )


@contextmanager
def quiet() -> Iterator[None]:
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
