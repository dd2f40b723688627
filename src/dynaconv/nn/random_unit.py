"""A gate that does not look: random positions, as a control for gates that do."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from dynaconv import _checks
from dynaconv.nn.gate import Gate
from dynaconv.ops.mask_ops import sample_logistic, upsample_mask


class RandomUnit(Gate):
    """Random masks whose density is learned and whose positions are not.

    One logit for all positions, trained by the budget loss. Training draws new positions for every image, also where a
    schedule has switched the noise of other gates off; evaluation uses one fixed field for every image, so that results
    repeat and do not depend on the batch.

    Args:
        stride: the block's stride; the mask lies on the block's output grid.
        granularity_px: one decision for granularity_px x granularity_px output positions.
        temperature: of the straight-through gradient.
        open_bias: logit at the start; 2 means 88 % open.
        seed: of the fixed field; blocks need different ones.
    Shapes:
        x [N, C, H, W] -> mask [N, 1, h, w] with h = (H - 1) // stride + 1.
    Source: the control of arXiv 2210.06223 and others; ours in that calibration meets budgets as with any other gate.

    >>> RandomUnit(stride=2).eval()(torch.randn(2, 16, 9, 8)).shape
    torch.Size([2, 1, 5, 4])
    """

    def __init__(
        self,
        *,
        stride: int = 1,
        granularity_px: int = 1,
        temperature: float = 1.0,
        open_bias: float = 2.0,
        seed: int = 0,
    ) -> None:
        super().__init__(temperature)
        _checks.positive("granularity_px", granularity_px)
        self.stride, self.granularity_px, self.seed = stride, granularity_px, seed
        self.logit = nn.Parameter(torch.tensor(float(open_bias)))

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """The block's output grid (h, w) for an input grid (H, W)."""
        return (size[0] - 1) // self.stride + 1, (size[1] - 1) // self.stride + 1

    def logits(self, x: Tensor) -> Tensor:
        """The one logit for every decision [N, 1, h', w'], in evaluation plus the fixed field."""
        h, w = (-(-side // self.granularity_px) for side in self.grid((x.shape[2], x.shape[3])))
        logits = self.logit.expand(x.shape[0], 1, h, w)
        return logits if self.training else logits + self.field((h, w)).to(logits)

    def field(self, size: tuple[int, int]) -> Tensor:
        """Fixed logistic noise [1, 1, h, w]: a hash of the position, so that exporters can follow."""
        h, w = size
        state = (torch.arange(h * w) + 1) * 0x9E3779B1 + self.seed
        for shift, factor in ((16, 0x45D9F3B), (15, 0x2C1B3C6D), (16, 1)):
            state = ((state ^ (state >> shift)) * factor) & 0xFFFFFFFF
        uniform = (state.double() + 0.5) / 2**32
        return torch.logit(uniform).float().view(1, 1, h, w)

    def sample_noise(self, logits: Tensor) -> Tensor:
        """Logistic noise, whatever the schedule says."""
        return sample_logistic(logits)

    def forward(self, x: Tensor) -> Tensor:
        """Mask [N, 1, h, w] of 0 and 1."""
        mask = self.decide(self.logits(x))
        return upsample_mask(mask, self.granularity_px, self.grid((x.shape[2], x.shape[3])))

    def macs(self, size: tuple[int, int]) -> int:
        """Deciding costs nothing."""
        return 0

    def extra_repr(self) -> str:
        """Settings shown by print(model)."""
        return f"stride={self.stride}, granularity_px={self.granularity_px}, seed={self.seed}"


def seed_of(name: str, seed: int = 0) -> int:
    """A seed for a block's name, the same on every machine."""
    return seed * 1_000_003 + int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
