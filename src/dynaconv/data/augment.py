"""Random crops and flips on whole batches, as a function of (seed, epoch, index)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class Augmentation:
    """Shift by up to `pad` pixels (what comes in is `fill`) and flip left-right.

    Args:
        pad: largest shift in pixels, each way. flip: mirror half of the pictures (never for digits).
        seed: the draw of picture i in epoch e depends on (seed, e, i) and nothing else.
        fill: "zeros", or "reflect" for the picture's own border.
    """

    def __init__(self, pad: int, flip: bool, seed: int = 0, fill: str = "zeros") -> None:
        self.pad, self.flip, self.seed, self.fill = pad, flip, seed, fill
        self.draws: Tensor | None = None

    def set_epoch(self, epoch: int, count: int) -> None:
        """Draw the shifts and flips of every picture for this epoch."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        self.draws = torch.rand(count, 3, generator=generator)

    def offsets(self, indices: Sequence[int]) -> Tensor:
        """How far the pictures `indices` are shifted, [B, 2] as x, y in pixels (before a flip)."""
        shifts = (self._drawn(indices)[:, :2] * (2 * self.pad + 1)).long()
        return (self.pad - shifts).flip(1)

    def _drawn(self, indices: Sequence[int]) -> Tensor:
        if self.draws is None or len(self.draws) <= max(indices):
            self.set_epoch(0, max(indices) + 1)
        assert self.draws is not None
        return self.draws[list(indices)]

    def __call__(self, images: Tensor, indices: Sequence[int]) -> Tensor:
        """Augment uint8 [B, 3, H, W], the pictures `indices`."""
        draws = self._drawn(indices)
        shifts = (draws[:, :2] * (2 * self.pad + 1)).long()
        b, c, h, w = images.shape
        rows = shifts[:, :1] + torch.arange(h)
        columns = torch.arange(w).expand(b, w)
        if self.flip:
            columns = torch.where(draws[:, 2:] < 0.5, columns.flip(1), columns)
        columns = columns + shifts[:, 1:]
        padded = self._padded(images)
        batch, channel = torch.arange(b)[:, None, None, None], torch.arange(c)[None, :, None, None]
        return padded[batch, channel, rows[:, None, :, None], columns[:, None, None, :]]

    def _padded(self, images: Tensor) -> Tensor:
        widths = (self.pad,) * 4
        if self.fill == "zeros" or not self.pad:
            return F.pad(images, widths)
        return F.pad(images.float(), widths, mode="reflect").to(images.dtype)
