"""A faster mask convolution for the CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def conv3x3_to_one(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1) -> Tensor:
    """`F.conv2d(x, weight, bias, stride, padding=1)` for weight [1, C, 3, 3], about twice as fast on a CPU.

    A direct convolution to one channel wastes the vector units. Here every position first answers all nine
    taps (a pointwise convolution C -> 9) and `fold` then adds the nine shifted answers.

    Args:
        x: [N, C, H, W].
    Returns:
        [N, 1, h, w] with h = (H - 1) // stride + 1.
    """
    n, c, height, width = x.shape
    # fold adds answer k of position p at p + offset(k); a convolution reads at p + offset(k), hence the flip.
    taps = weight.flip(2, 3).permute(2, 3, 1, 0).reshape(9, c)
    if n == 1:
        # One image: the nine answers of all positions are a small matrix product that needs no reordering.
        answers = torch.mm(taps, x.permute(0, 2, 3, 1).reshape(-1, c).t())
    else:
        answers = F.conv2d(x, taps.view(9, c, 1, 1))
    z = F.fold(answers.reshape(n, 9, height * width), (height, width), 3, padding=1)
    if stride != 1:
        z = z[:, :, ::stride, ::stride]
    return z if bias is None else z + bias
