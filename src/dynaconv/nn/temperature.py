"""The temperature of attention: a buffer in every router that has one, set model-wide, annealed by a schedule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dynaconv import _checks


class Tempered(nn.Module):
    """A module with a temperature: a persistent buffer, so that checkpoints, copies and EMA keep it.

    Raises:
        ValueError: temperature not positive.
    """

    temperature: Tensor

    def __init__(self, temperature: float = 1.0, *, device=None) -> None:
        super().__init__()
        _checks.positive("temperature", temperature)
        self.register_buffer("temperature", torch.tensor(float(temperature), device=device))


def set_temperature(model: nn.Module, temperature: float) -> int:
    """Set the temperature of every attention in `model` (the gates of spatial masks have their own).

    Returns:
        How many were set.
    Raises:
        ValueError: temperature not positive.

    >>> from dynaconv.nn import DYConv2d
    >>> set_temperature(DYConv2d(8, 8, 1), 30.0)
    1
    """
    _checks.positive("temperature", temperature)
    found = [m for m in model.modules() if isinstance(m, Tempered)]
    for module in found:
        module.temperature.fill_(float(temperature))
    return len(found)


class TemperatureSchedule:
    """Anneals the temperature linearly: tau(i) = end + (start - end) * max(0, 1 - i / steps).

    Args:
        model: every attention in it follows.
        steps: iterations until `end` is reached (the papers take those of the first 10 epochs).
    Raises:
        ValueError: start or end not positive, steps below 1.
    Source: DY-Conv (arXiv 1912.03458), section 3.3; ODConv (2209.07947), released code.

    >>> from dynaconv.nn import DYConv2d
    >>> schedule = TemperatureSchedule(DYConv2d(8, 8, 1), steps=10)
    >>> schedule.temperature, schedule.step()
    (30.0, 27.1)
    """

    def __init__(self, model: nn.Module, start: float = 30.0, end: float = 1.0, *, steps: int) -> None:
        _checks.positive("start", start)
        _checks.positive("end", end)
        _checks.count("steps", steps)
        self._model, self.start, self.end, self.steps = model, float(start), float(end), int(steps)
        self.iteration = 0
        set_temperature(model, self.temperature)

    @property
    def temperature(self) -> float:
        """tau at the current iteration."""
        return round(self.end + (self.start - self.end) * max(0.0, 1 - self.iteration / self.steps), 12)

    def step(self) -> float:
        """One training iteration has passed; sets and returns the new temperature."""
        self.iteration += 1
        set_temperature(self._model, self.temperature)
        return self.temperature

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule is."""
        return {"iteration": self.iteration, "start": self.start, "end": self.end, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.iteration, self.steps = int(state["iteration"]), int(state["steps"])
        self.start, self.end = float(state["start"]), float(state["end"])
        set_temperature(self._model, self.temperature)
