"""Integral control of a budget: what the loss alone misses, and what training pictures hide, is taken from its aim."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# The aim moves by the error in a twentieth of training.
_PER_TRAINING = 20.0
# No aim lies further from the target.
_FURTHEST = 0.5
# Weight of the newest step in the running mean of executed shares.
_NEWEST = 0.05


class Hold:
    """Where the budget loss has to aim so that the target is met.

    A squared loss comes to rest where its pull equals that of the task, some way above the target; that error is summed
    up over steps and taken from the aim. Augmented pictures with empty borders cost less than whole ones, and a gate
    without noise opens at other places than one with it; that difference is known after each validation.

    >>> hold = Hold(total_steps=100)
    >>> hold.saw(torch.tensor(0.6)); hold.step(0.5)
    >>> round(hold.aim(0.5), 3)
    0.48
    """

    def __init__(self, total_steps: int) -> None:
        self.total_steps = total_steps
        self.shift, self.gap, self.mean = 0.0, 0.0, math.nan
        # A tensor, so that a compiled step can write it.
        self._seen = torch.full((), math.nan, dtype=torch.float64)

    def aim(self, target: float) -> float:
        """The share to aim at, for a target share of the conditional multiply-adds."""
        return target - self.gap - self.shift

    def saw(self, ratio: Tensor) -> None:
        """Note the executed share of a step, a scalar."""
        self._seen.copy_(ratio.detach())

    def step(self, target: float) -> None:
        """Add up the error of the step that aimed at a target; nothing happens where none was seen."""
        ratio = float(self._seen)
        if math.isnan(ratio):
            return
        self._seen.fill_(math.nan)
        self.mean = ratio if math.isnan(self.mean) else self.mean + _NEWEST * (ratio - self.mean)
        error = ratio - (target - self.gap)
        self.shift = _bounded(self.shift + error * _PER_TRAINING / self.total_steps)

    def evaluated(self, ratio: float) -> None:
        """Compare the executed share of a validation with that of the last training steps."""
        if not math.isnan(self.mean):
            self.gap = _bounded(ratio - self.mean)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"shift": self.shift, "gap": self.gap, "mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.shift, self.gap, self.mean = (float(state[name]) for name in ("shift", "gap", "mean"))


def _bounded(value: float) -> float:
    return min(max(value, -_FURTHEST), _FURTHEST)
