"""How noise and temperature of the gates change over training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from dynaconv import _checks
from dynaconv.convert import gates

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class GateSchedule:
    """State of the gates as a function of training progress (0..1).

    Args:
        noise_until: Gumbel noise is on while progress <= this (0.8 in the paper).
        temperature: None keeps each gate's own; otherwise steps (from progress, value), such as the paper's ImageNet
            schedule ((0, 5.0), (0.3, 2.5), (0.6, 1.0)).
    """

    noise_until: float = 0.8
    temperature: Points | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.noise_until <= 1:
            raise ValueError(f"noise_until must lie in [0, 1], got {self.noise_until!r}")
        for _, value in self.temperature or ():
            _checks.positive("temperature", value)

    def apply_(self, model: nn.Module, progress: float) -> None:
        """Set noise and temperature of every gate."""
        temperature = self.temperature_at(progress)
        for gate in gates(model).values():
            gate.noise.fill_(1.0 if progress <= self.noise_until else 0.0)
            if temperature is not None:
                gate.temperature.fill_(temperature)

    def temperature_at(self, progress: float) -> float | None:
        """Scheduled temperature, or None."""
        past = [value for start, value in self.temperature or () if start <= progress]
        return past[-1] if past else None
