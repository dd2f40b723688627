"""Adaptive computation time over the units of a stage, for each position (SACT) or each image (ACT).

Source: "Spatially Adaptive Computation Time for Residual Networks", arXiv 1612.02297, section 3 and the released code.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dynaconv import _checks
from dynaconv.nn.gate import Gate
from dynaconv.nn.masked_block import MaskedBlock
from dynaconv.ops import masked_conv2d
from dynaconv.ops.mask_ops import gumbel_mask

EPSILON = 0.01
LEVELS = ("position", "image")
GRADIENTS = ("none", "straight_through")


class HaltingUnit(Gate):
    """Decides where the unit behind it still runs: where the halting scores up to here sum to less than 1 - 0.01.

    The score of the unit before is computed from that unit's output, which is this unit's input x:
    position: `h = sigmoid(Conv3x3(C -> 1)(BN(x)) + w BN(mean(x)) + threshold)`;
    image: `h = sigmoid(w BN(mean(x)) + b + threshold)`. Biases start at -3, so nothing halts at first. A larger
    threshold halts earlier and computes less.

    Args:
        in_channels: C of the unit's input.
        level: "position" (SACT) or "image" (ACT).
        gradient: of the decision: "none" (paper: only the ponder cost and the weights of the outputs train the
            scores) or "straight_through", with which a budget loss trains them, too.
        temperature: of the straight-through gradient.
    Shapes:
        x [N, C, h, w], reached [N, 1, h, w] -> mask [N, 1, h, w].
    """

    dial = False

    def __init__(
        self,
        in_channels: int,
        *,
        level: str = "position",
        gradient: str = "straight_through",
        temperature: float = 1.0,
    ) -> None:
        super().__init__(temperature)
        _checks.positive("in_channels", in_channels)
        _checks.one_of("level", level, LEVELS)
        _checks.one_of("gradient of the decision", gradient, GRADIENTS)
        self.in_channels, self.level, self.gradient = in_channels, level, gradient
        self.scope = level
        whole = level == "image"
        self.mean_norm = nn.BatchNorm1d(in_channels)
        self.linear = nn.Linear(in_channels, 1, bias=whole)
        self.norm = None if whole else nn.BatchNorm2d(in_channels)
        self.conv = None if whole else nn.Conv2d(in_channels, 1, 3, padding=1)
        nn.init.constant_(self.linear.bias if whole else self.conv.bias, -3.0)

    def logits(self, x: Tensor, active: Tensor | None = None) -> Tensor:
        """Halting logits of the unit before, without the threshold: [N, 1, h, w] or [N, 1, 1, 1].

        Args:
            active: where that unit ran, [N, 1, h, w]; in evaluation the convolution computes only there.
        """
        _checks.images(x, self.in_channels, f"HaltingUnit({self.in_channels})")
        whole = self.linear(self.mean_norm(x.mean((2, 3))))[:, :, None, None]
        if self.conv is None:
            return whole
        z, conv = self.norm(x), self.conv
        if self.training or active is None or torch.compiler.is_compiling():
            return conv(z) + whole
        return masked_conv2d(z, active.to(z.dtype), conv.weight, conv.bias, 1, 1) + whole

    def score(self, x: Tensor, active: Tensor) -> Tensor:
        """h [N, 1, h, w] of the unit before; 0 where it did not run."""
        z = self.logits(x, active)
        return torch.sigmoid(z.to(active.dtype) + self.threshold) * active

    def forward(self, x: Tensor, reached: Tensor, active: Tensor) -> Tensor:
        """Mask [N, 1, h, w] of 0 and 1 from the sum of all scores so far (`active` is where the unit before ran)."""
        # One comparison, which compilers take for a mask; 2^-26 is less than any difference above 0 can be in float32.
        left = (1 - EPSILON - 2.0**-26) - reached - 2 * (1 - active)
        if self.gradient == "none" or not torch.is_grad_enabled():
            return (left >= 0.0).to(reached.dtype)
        return gumbel_mask(left, temperature=self.temperature, noise=0.0)

    def macs(self, size: tuple[int, int]) -> int:
        """Multiply-adds for one image: C, and 9 C + 1 for each position where the unit before ran, all of them here."""
        c = self.in_channels
        return c + 1 if self.conv is None else c + (9 * c + 1) * size[0] * size[1]

    def spent_macs(self, x: Tensor, *state: Tensor) -> Tensor | None:
        """The same, with the positions where the unit before really ran, [N]."""
        if self.conv is None:
            return None
        ran = state[1].detach().sum((1, 2, 3), dtype=torch.float64)
        return self.in_channels + (9 * self.in_channels + 1) * ran

    def extra_repr(self) -> str:
        """Settings shown by print(model)."""
        return f"{self.in_channels}, level={self.level!r}, gradient={self.gradient!r}"


class HaltingSequential(nn.Sequential):
    """`nn.Sequential` in which runs of halting units share one sum of scores.

    Masked blocks whose gate is a `HaltingUnit`, and the module before them, which always runs, are a stage of L units:
    `x_l = shortcut(x_{l-1}) + A_l F_l(x_{l-1})` with `A_l = 1[sum of h_j, j < l, is below 1 - 0.01]`. Its output is
    `sum of p_l x_l` with `p_l = h_l` before the last unit that ran and the remainder `1 - sum of h_j` there.
    """

    def forward(self, input: Tensor) -> Tensor:
        """As in `nn.Sequential`."""
        x, stage = input, []
        for child in [*self, None]:
            if is_halting(child):
                stage.append(child)
                continue
            if stage:
                x, stage = _halted(x, stage), []
            x = x if child is None else child(x)
        return x


def is_halting(module: nn.Module | None) -> bool:
    """A unit whose gate is a `HaltingUnit`."""
    return isinstance(module, MaskedBlock) and isinstance(module.gate, HaltingUnit)


def _halted(x: Tensor, units: list[MaskedBlock]) -> Tensor:
    """Output of a stage whose first unit gave x; `units` are the others."""
    # Half precision would not tell 0.99 from 1.
    dtype = torch.promote_types(x.dtype, torch.float32)
    active = torch.ones_like(x[:, :1], dtype=dtype)
    total = output = torch.zeros_like(active)
    for unit in units:
        score = unit.gate.score(x, active)
        # Forced masks may open what has halted; a halted position stays halted.
        mask = unit.gate(x, total + score, active).to(dtype) * active
        goes_on = mask.detach()
        output = output + (goes_on * score + (active - goes_on) * (1 - total)) * x
        x = unit.run(x, mask.to(x.dtype))
        total, active = total + goes_on * score, goes_on
    return (output + active * (1 - total) * x).to(x.dtype)


def ponder_cost(reached: Iterable[Tensor], masks: Iterable[Tensor]) -> Tensor:
    """rho = N + R of every position, [N, 1, h, w], with gradient -1 for every score before the last unit.

    Args:
        reached: for the units behind the first, the sums of scores that their gates saw. masks: what they decided.
    Source: arXiv 1612.02297, equation 4.
    """
    steps = halted_at = None
    for total, mask in zip(reached, masks, strict=True):
        mask = mask.detach()
        steps = mask if steps is None else steps + mask
        # Of the units that ran, the last one's sum remains.
        halted_at = mask * total if halted_at is None else torch.where(mask > 0.5, total, halted_at)
    assert steps is not None and halted_at is not None
    return (1 + steps) + (1 - halted_at)
