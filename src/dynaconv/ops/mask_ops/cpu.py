"""A faster mask convolution for the CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def nine_taps(weight: Tensor) -> Tensor:
    """Reorder a mask convolution's weight [1, C, 3, 3] for `conv3x3_to_one`, with gradient: [9, C]."""
    # fold adds answer k of position p at p + offset(k); a convolution reads at p + offset(k), hence the flip.
    return weight.flip(2, 3).permute(2, 3, 1, 0).reshape(9, weight.shape[1]).contiguous()


def conv3x3_to_one(x: Tensor, taps: Tensor, stride: int = 1) -> Tensor:
    """A 3x3 convolution to one channel with padding 1 and no bias, about twice as fast on a CPU as `F.conv2d`.

    A direct convolution to one channel wastes the vector units. Here every position first answers all nine
    taps (a pointwise convolution C -> 9) and `fold` then adds the nine shifted answers.

    Args:
        x: [N, C, H, W].
        taps: [9, C], from `nine_taps`.
    Returns:
        [N, 1, h, w] with h = (H - 1) // stride + 1.
    """
    n, c, height, width = x.shape
    if n == 1:
        # One image: the nine answers of all positions are a small matrix product that needs no reordering.
        answers = torch.mm(taps, x.permute(0, 2, 3, 1).reshape(-1, c).t()).view(1, 9, -1)
    else:
        answers = F.conv2d(x, taps.view(9, c, 1, 1)).reshape(n, 9, height * width)
    z = F.fold(answers, (height, width), 3, padding=1)
    return z if stride == 1 else z[:, :, ::stride, ::stride].contiguous()
