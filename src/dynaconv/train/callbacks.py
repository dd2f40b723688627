"""What happens around the training steps: seeds, budget, guards, logs and the progress bar."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynaconv import _checks
from dynaconv.integrations import import_lightning
from dynaconv.nn.temperature import TemperatureSchedule, Tempered
from dynaconv.train.errors import TrainingDiverged
from dynaconv.train.module import DynaconvModule

lightning = import_lightning()


class EpochSeeds(lightning.Callback):
    """Seeds python, numpy and torch at the start of every epoch from (seed, epoch, rank), so that a resumed run
    draws the same noise as one that was never interrupted.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: Any, pl_module: DynaconvModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed before the first batch."""
        if batch_idx == 0:
            seed_everything(self.seed, pl_module.epochs_done + 1, trainer.global_rank)


def seed_everything(*key: int) -> None:
    """Seed python, numpy and torch from a few whole numbers."""
    state = np.random.SeedSequence([abs(k) for k in key]).generate_state(3)
    random.seed(int(state[0]))
    np.random.seed(int(state[1]))
    torch.manual_seed(int(state[2]))


class BudgetCallback(lightning.Callback):
    """Advances the budget's schedules after every step, and keeps them in the checkpoint."""

    def on_train_batch_end(self, trainer: Any, pl_module: DynaconvModule, *args: Any) -> None:
        """One step more."""
        if pl_module.budget is not None:
            pl_module.budget.step()

    def on_save_checkpoint(self, trainer: Any, pl_module: DynaconvModule, checkpoint: dict[str, Any]) -> None:
        """Keep the schedules' position."""
        if pl_module.budget is not None:
            checkpoint["budget"] = pl_module.budget.state_dict()

    def on_load_checkpoint(self, trainer: Any, pl_module: DynaconvModule, checkpoint: dict[str, Any]) -> None:
        """Continue the schedules."""
        if pl_module.budget is not None:
            pl_module.budget.load_state_dict(checkpoint["budget"])


class TemperatureCallback(lightning.Callback):
    """Anneals the temperature of attention, one step an iteration; the checkpoint keeps its position."""

    def __init__(self) -> None:
        self.schedule: TemperatureSchedule | None = None
        self._loaded: dict[str, Any] | None = None

    def on_train_start(self, trainer: Any, pl_module: DynaconvModule) -> None:
        """Begin, or go on where the checkpoint was taken."""
        section, epochs = pl_module.recipe.kernels, pl_module.recipe.trainer.epochs
        if section is None or not any(isinstance(m, Tempered) for m in pl_module.model.modules()):
            return
        anneal = min(10.0, epochs / 3) if section.anneal_epochs is None else section.anneal_epochs
        self.schedule = TemperatureSchedule(
            pl_module.model,
            section.start_temperature,
            section.end_temperature,
            steps=max(1, round(anneal * pl_module.steps_per_epoch)),
        )
        if self._loaded is not None:
            self.schedule.load_state_dict(self._loaded)

    def on_train_batch_end(self, trainer: Any, pl_module: DynaconvModule, *args: Any) -> None:
        """One step more."""
        if self.schedule is not None:
            self.schedule.step()

    def on_save_checkpoint(self, trainer: Any, pl_module: DynaconvModule, checkpoint: dict[str, Any]) -> None:
        """Keep the schedule's position."""
        if self.schedule is not None:
            checkpoint["temperature"] = self.schedule.state_dict()

    def on_load_checkpoint(self, trainer: Any, pl_module: DynaconvModule, checkpoint: dict[str, Any]) -> None:
        """Remember the position until training starts."""
        self._loaded = checkpoint.get("temperature")


class FiniteGuard(lightning.Callback):
    """Stops before a loss that is not finite can spoil the weights.

    Raises:
        TrainingDiverged: with the step and the likely cause.
    """

    def on_train_batch_start(
        self, trainer: Any, pl_module: DynaconvModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the batch until its loss is known."""
        self.batch = batch

    def on_before_backward(self, trainer: Any, pl_module: DynaconvModule, loss: Tensor) -> None:
        """Look at the loss."""
        if not np.isfinite(pl_module.last.loss):
            cause = _likely_cause(pl_module, self.batch[0])
            raise TrainingDiverged(_checks.train_diverged("loss is", trainer.global_step, cause))

    def on_train_batch_end(self, *args: Any) -> None:
        """Let the batch go."""
        self.batch = None


def _likely_cause(module: DynaconvModule, images: Tensor) -> str:
    if not bool(torch.isfinite(images).all()):
        return (
            "the pictures of this batch hold NaN or infinity: check the files and the data set's mean and std"
        )
    weights_ok = all(bool(torch.isfinite(p).all()) for p in module.parameters())
    if weights_ok and module.last.budget_loss is not None and np.isfinite(module.last.task_loss):
        return "it is the budget loss: lower budget.alpha"
    advice = _checks.train_lower_lr(module.recipe.optim.lr)
    if weights_ok and module.recipe.trainer.precision != "fp32":
        return f"{advice}, or try trainer.precision=fp32"
    return advice


class RunLog(lightning.Callback):
    """Writes the numbers of every step and epoch to the loggers.

    Loss, ratio and learning rate are written for every batch, densities every `every` batches and once an epoch.
    """

    def __init__(self, every: int = 10) -> None:
        self.every = every

    def on_train_batch_start(
        self, trainer: Any, pl_module: DynaconvModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the rate before the scheduler moves it."""
        self.lr = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_batch_end(
        self, trainer: Any, pl_module: DynaconvModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write one step."""
        record = pl_module.last
        row: dict[str, float] = {"epoch": pl_module.epochs_done + 1, "lr": self.lr, "loss": record.loss}
        if record.ratio is not None:
            row.update(task_loss=record.task_loss, budget_loss=record.budget_loss, ratio=record.ratio)
            if batch_idx % self.every == 0:
                row.update({f"density/{name}": value for name, value in record.densities.items()})
        _write(trainer, row, trainer.global_step)

    def on_train_epoch_end(self, trainer: Any, pl_module: DynaconvModule) -> None:
        """Write one epoch."""
        epoch = pl_module.history[-1]
        row = {
            "epoch": epoch["epoch"],
            "train_loss": epoch["train_loss"],
            "val_loss": epoch["val_loss"],
            "val_accuracy": epoch["val_accuracy"],
        }
        gmacs = pl_module.gmacs(epoch["ratio"])
        if gmacs is not None:
            row["val_gmacs"] = gmacs
        if epoch["ratio"] is not None:
            row["val_ratio"] = epoch["ratio"]
            row.update({f"val_density/{n}": v for n, v in pl_module.val_densities.items()})
        _write(trainer, row, trainer.global_step)
        for logger in trainer.loggers:
            logger.save()


def _write(trainer: Any, row: dict[str, float], step: int) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(row, step)


class EpochProgress(lightning.Callback):
    """A bar for the running epoch where there is a terminal, and a line for every finished one."""

    def __init__(self, say: Callable[[str], None] | None = None) -> None:
        self.say = say or (lambda line: print(line, file=sys.stderr, flush=True))
        self.bar: Any = None

    def on_train_epoch_start(self, trainer: Any, pl_module: DynaconvModule) -> None:
        """Open the bar."""
        if not trainer.is_global_zero:
            return
        from tqdm import tqdm

        self.started = time.monotonic()
        title = f"epoch {pl_module.epochs_done + 1}/{trainer.max_epochs}"
        self.bar = tqdm(
            total=pl_module.steps_per_epoch, desc=title, leave=False, mininterval=0.3, disable=None
        )

    def on_train_batch_end(
        self, trainer: Any, pl_module: DynaconvModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar."""
        if self.bar is None or self.bar.disable:
            return
        if batch_idx % 10 == 0:
            ratio = "" if pl_module.last.ratio is None else f", ratio {pl_module.last.ratio:.3f}"
            self.bar.set_postfix_str(f"loss {pl_module.last.loss:.3f}{ratio}", refresh=False)
        self.bar.update(1)

    def on_train_epoch_end(self, trainer: Any, pl_module: DynaconvModule) -> None:
        """Close the bar and say how the epoch went."""
        if self.bar is None:
            return
        self.close()
        epoch = pl_module.history[-1]
        line = (
            f"epoch {epoch['epoch']:>3}/{trainer.max_epochs}  loss {epoch['train_loss']:.3f}  "
            f"validation {100 * epoch['val_accuracy']:.1f} %"
        )
        if epoch["ratio"] is not None:
            target = (
                "" if pl_module.budget is None else f" (target {pl_module.budget.conditional_target:.3f})"
            )
            line += f"  executed MACs {epoch['ratio']:.3f}{target}"
        gmacs = pl_module.gmacs(epoch["ratio"])
        if gmacs is not None:
            line += f"  {gmacs:.4g} GMACs"
        self.say(f"{line}  {time.monotonic() - self.started:.1f} s")

    def on_exception(self, trainer: Any, pl_module: DynaconvModule, exception: BaseException) -> None:
        """Leave the terminal clean."""
        self.close()

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
