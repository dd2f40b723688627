"""The temperature of the attention over training, as a Lightning callback."""

from __future__ import annotations

from typing import Any

from torch import nn

from dynaconv.integrations import import_lightning

lightning = import_lightning()
# arXiv 1912.03458, section 3.2.
START, END = 30.0, 1.0


class Annealing(lightning.Callback):
    """Lowers the temperature linearly from 30 to 1 over the first `share` of training, a step an iteration."""

    def __init__(self, model: nn.Module, share: float) -> None:
        self.model, self.share = model, share
        self.schedule: Any = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start, or go on where an interrupted run was."""
        from dynaconv.nn import TemperatureSchedule

        steps = max(1, round(self.share * trainer.max_epochs * pl_module.steps_per_epoch))
        self.schedule = TemperatureSchedule(self.model, start=START, end=END, steps=steps)
        self.schedule.load_state_dict({**self.schedule.state_dict(), "iteration": trainer.global_step})

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        """One iteration more."""
        self.schedule.step()


def annealing(model: nn.Module, share: float) -> list[Any]:
    """The callback, for a network whose attention has a temperature; otherwise nothing."""
    from dynaconv.nn.temperature import Tempered

    tempered = any(isinstance(module, Tempered) for module in model.modules())
    return [Annealing(model, share)] if tempered and share > 0 else []
