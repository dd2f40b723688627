"""The LightningModule: task loss, budget loss, distillation, validation."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dynaconv.budget import MacBudget
from dynaconv.budget.mac_budget import Share
from dynaconv.convert import gates
from dynaconv.cost import collect_masks
from dynaconv.data.tasks import CLASSIFICATION, Task
from dynaconv.integrations import import_lightning
from dynaconv.train.evaluation import Tally
from dynaconv.train.optim import build_optimizer, lr_factor
from dynaconv.train.recipe import Recipe

lightning = import_lightning()

BUDGET_TOLERANCE = 0.02


@dataclass
class StepRecord:
    """What the last training step measured; ratio and densities are those of all ranks together."""

    loss: float = 0.0
    task_loss: float = 0.0
    budget_loss: float | None = None
    ratio: float | None = None
    densities: dict[str, float] = field(default_factory=dict)


class DynaconvModule(lightning.LightningModule):
    """Trains a network, dense or dynamic, as a recipe says.

    Args:
        model: [N, C, H, W] -> logits [N, classes], or what else the task wants.
        recipe: loss, optimizer and schedule.
        steps_per_epoch: training batches in an epoch of this process.
        task: what the data set asks for, with its loss and its metric.
        teacher: a dense network for distillation; used in evaluation mode and never trained or saved.
        input_size: (C, H, W), for a budget on the whole network.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        steps_per_epoch: int,
        *,
        teacher: nn.Module | None = None,
        task: Task = CLASSIFICATION,
        input_size: tuple[int, int, int] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.task = task
        self.recipe = recipe
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = steps_per_epoch * recipe.trainer.epochs
        self.budget = self._make_budget(input_size)
        self._share = _share_of(model, input_size)
        # In a list, so that the teacher's weights stay out of state_dict and of the gradient exchange.
        self._teacher = [] if teacher is None else [teacher.eval().requires_grad_(False)]
        self.loaders: tuple[Any, ...] = ()
        self.last = StepRecord()
        self.epochs_done = 0
        self.history: list[dict[str, Any]] = []
        self.val_densities: dict[str, float] = {}
        self._loss_sum, self._loss_count = 0.0, 0

    def _make_budget(self, input_size: tuple[int, int, int] | None) -> MacBudget | None:
        section = self.recipe.budget
        if section is None:
            return None
        return MacBudget(
            self.model,
            section.target,
            total_steps=self.total_steps,
            alpha=section.alpha,
            anneal=section.anneal,
            ramp=section.ramp,
            schedule=section.schedule(),
            scope=section.scope,
            input_size=input_size,
            loss=section.loss,
            ponder=section.ponder,
            dial=None if section.dial is None else tuple(section.dial),
            hold=section.hold,
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] -> logits."""
        return self.model(x)

    def configure_optimizers(self) -> dict[str, Any]:
        """Optimizer, and a learning rate that changes with every step."""
        section = self.recipe.optim
        optimizer = build_optimizer(section, self.model, self.budget)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: lr_factor(section, step, self.steps_per_epoch, self.total_steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Bring the teacher to where the network is."""
        for teacher in self._teacher:
            teacher.to(self.device, memory_format=torch.channels_last)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of one batch."""
        images, labels = batch
        record = StepRecord()
        extra: Tensor | float = 0.0
        if self.budget is None:
            logits = self.model(images).float()
        else:
            # FiniteGuard looks at the loss, and knows the cause.
            with self.budget.observe(check=False) as cost:
                logits = self.model(images).float()
            extra, record.ratio, record.densities = cost.loss, cost.ratio, cost.densities
            record.budget_loss = float(cost.loss.detach())
        trainer = self.recipe.trainer
        task = self.task.loss(logits, labels, trainer.label_smoothing)
        if self._teacher:
            task = task + trainer.distill_weight * self._distance(images, logits, trainer.distill_temperature)
        loss = task + extra
        record.loss, record.task_loss = float(loss.detach()), float(task.detach())
        self.last = record
        return loss

    def _distance(self, images: Tensor, logits: Tensor, temperature: float) -> Tensor:
        """How far the answers are from the teacher's."""
        with torch.no_grad():
            taught = self._teacher[0](images).float()
        return self.task.distance(logits, taught, temperature)

    def on_train_epoch_start(self) -> None:
        """Start the epoch's mean loss."""
        self._loss_sum, self._loss_count = 0.0, 0

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Add to the epoch's mean loss."""
        self._loss_sum += self.last.loss
        self._loss_count += 1

    def on_validation_epoch_start(self) -> None:
        """Count anew."""
        self._tally = Tally(gates(self.model), self.task)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count one batch, in float32: thresholded masks must not hang on rounding."""
        images, labels = batch
        dial = nullcontext() if self.budget is None else self.budget.at_target()
        with dial, torch.autocast(self.device.type, enabled=False), collect_masks(self.model) as masks:
            logits = self.model(images)
        self._tally.add(logits, labels, masks)

    def on_validation_epoch_end(self) -> None:
        """Sum over ranks and add the epoch to the history."""
        sums = torch.cat([self._tally.sums, self._tally.sums.new_tensor([self._loss_sum, self._loss_count])])
        sums = self.trainer.strategy.reduce(sums.to(self.device), reduce_op="sum").cpu()
        self._tally.sums = sums[:-2]
        found = self._tally.result()
        epoch = {
            "epoch": self.epochs_done + 1,
            "train_loss": float(sums[-2] / sums[-1]),
            "val_loss": found["loss"],
            "val_accuracy": found["accuracy"],
            "ratio": found["ratio"],
        }
        self.history.append(epoch)
        self.val_densities = found["densities"]
        shown = {"val_loss": found["loss"], "val_accuracy": found["accuracy"], "val_score": self.score(epoch)}
        if found["ratio"] is not None:
            shown["val_ratio"] = found["ratio"]
            if self.budget is not None:
                self.budget.evaluated(found["ratio"])
        self.log_dict(shown, logger=False)

    def gmacs(self, ratio: float | None) -> float | None:
        """Billions of multiply-adds of one image at an executed share of the conditional ones; None where unknown."""
        if self._share is None:
            return None
        return (self._share.fixed + self._share.possible * (1.0 if ratio is None else ratio)) / 1e9

    def on_train_epoch_end(self) -> None:
        """One epoch more; checkpoints are written after this."""
        self.epochs_done += 1

    def score(self, epoch: dict[str, Any]) -> float:
        """How good an epoch is, higher is better: `trainer.best` of the recipe.

        With "budget", an epoch within target + 0.02 is worth its accuracy; others are worth less than any of those,
        and the less the further they are from the target.
        """
        kind = self.recipe.trainer.best
        if kind == "last":
            return float(epoch["epoch"])
        if kind == "budget" and self.budget is not None:
            excess = epoch["ratio"] - self.budget.conditional_target
            if excess > BUDGET_TOLERANCE:
                return -excess
        return epoch["val_accuracy"]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the history with the weights."""
        checkpoint["dynaconv"] = {"epochs_done": self.epochs_done, "history": self.history}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue the history."""
        state = checkpoint["dynaconv"]
        self.epochs_done, self.history = int(state["epochs_done"]), list(state["history"])


def _share_of(model: nn.Module, input_size: tuple[int, int, int] | None) -> Share | None:
    """What it always computes and what its gates decide about; None for a network that cannot be counted."""
    # A network with unusual inputs is still trained; only its multiply-adds stay unknown.
    with suppress(RuntimeError, ValueError, TypeError):
        return None if input_size is None else Share.of(model, input_size)
    return None
