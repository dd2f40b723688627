"""What all gates share: the decision, its schedule state, its threshold and the table of calibrated budgets."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dynaconv import _checks
from dynaconv.ops.mask_ops import gumbel_mask


class Gate(nn.Module):
    """Base class of everything that decides what a block computes.

    A subclass implements `logits(x)`; `forward(x)` turns them into a mask of 0 and 1. All state that changes during
    training or calibration is a buffer, so that it survives saving, copying and resuming:

    * `temperature`, `noise` (1 while noise is on, 0 when off): set by the budget's schedules;
    * `threshold`: a logit opens its position when it is at least this; set by calibration;
    * `budget_table` [K, 4]: measured (budget, threshold, 1 when the budget was asked for, open share of this gate's
      mask), see `calibrate_`; tables of earlier versions lack the last column.

    `scope` says what one decision is about: a "position", a whole "image" (its mask is constant within an image), or
    "channels" (a mask [N, G, 1, 1] of groups of hidden channels). `dial`: the mask is the comparison of the logits with
    the threshold, so that a compiled model can turn it.
    """

    scope: str = "position"
    dial: bool = True

    temperature: Tensor
    noise: Tensor
    threshold: Tensor
    budget_table: Tensor

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        _checks.positive("temperature", temperature)
        self.register_buffer("temperature", torch.tensor(float(temperature)))
        self.register_buffer("noise", torch.tensor(1.0))
        self.register_buffer("threshold", torch.tensor(0.0))
        self.register_buffer("budget_table", torch.zeros(0, 4))

    def logits(self, x: Tensor) -> Tensor:
        """Scores of the decisions, [N, 1, h, w]; higher means rather compute."""
        raise TypeError(f"{type(self).__name__} must implement logits(x)")

    def forward(self, x: Tensor) -> Tensor:
        """Mask [N, 1, h, w] of 0 and 1: sampled in training, thresholded in evaluation."""
        return self.decide(self.logits(x))

    def decide(self, logits: Tensor, noise: Tensor | None = None) -> Tensor:
        """Turn logits into a mask; `noise` replaces the sampled noise (for tests)."""
        if not self.training:
            return (logits >= self.threshold).to(logits.dtype)
        if noise is None:
            noise = self.sample_noise(logits)
        return gumbel_mask(logits - self.threshold, temperature=self.temperature, noise=noise)

    def sample_noise(self, logits: Tensor) -> Tensor:
        """Logistic noise in float32, scaled by the `noise` flag."""
        from dynaconv.ops.mask_ops import sample_logistic

        return sample_logistic(logits) * self.noise

    def macs(self, size: tuple[int, int]) -> int:
        """Multiply-adds of deciding for one image whose block input is `size` = (H, W)."""
        raise TypeError(f"{type(self).__name__} must implement macs(size)")

    def spent_macs(self, x: Tensor, *state: Tensor) -> Tensor | None:
        """What deciding cost each image [N]; None where that is `macs` for every one."""
        return None

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        # The table's length depends on the calibration that was saved.
        table = state_dict.get(f"{prefix}budget_table")
        if table is not None:
            self.budget_table = self.budget_table.new_zeros(table.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)
