"""Short definitions of sampling and dilation; correctness of every faster form is measured against these.

Source: DynConv, arXiv 1912.03203, sections 3.1 and 3.3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sample_logistic(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Logistic(0, 1) noise with the shape of `like`, always drawn in float32 (float64 for float64 input).

    The difference of two Gumbel variables; U is clamped to [2^-24, 1 - 2^-24] so that no sample is infinite.
    """
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    uniform = torch.rand(like.shape, dtype=dtype, device=like.device, generator=generator)
    uniform = uniform.clamp(2.0**-24, 1.0 - 2.0**-24)
    return uniform.log() - (-uniform).log1p()


def gumbel_mask(logits: Tensor, noise: Tensor | float, temperature: Tensor | float) -> Tensor:
    """Forward 1[logits + noise >= 0]; gradient of sigmoid((logits + noise) / temperature)."""
    noisy = logits + noise
    soft = torch.sigmoid(noisy / temperature)
    hard = (noisy >= 0).to(soft.dtype)
    return hard + (soft - soft.detach())


def dilate(
    mask: Tensor,
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor:
    """Positions of the `size` grid that an active output of the convolution reads: [N,1,h,w] -> [N,1,H,W]."""
    return (reader_count(mask, size, kernel, stride, padding, dilation) > 0.5).to(mask.dtype)


def reader_count(
    mask: Tensor,
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor:
    """For every input position, how many active outputs read it: [N,1,h,w] -> [N,1,H,W]."""
    ones = torch.ones(1, 1, *kernel, dtype=mask.dtype, device=mask.device)
    extra = [
        size[i] - ((mask.shape[2 + i] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (kernel[i] - 1) + 1)
        for i in (0, 1)
    ]
    full = F.conv_transpose2d(mask, ones, stride=stride, dilation=dilation)
    # conv_transpose2d refuses an output_padding >= stride, which a strided 1x1 can need: crop and pad by hand.
    # sym_max, because sizes may be free in a traced network.
    more = [torch.sym_max(0, e + p) for e, p in zip(extra, padding, strict=True)]
    full = F.pad(full, (0, more[1], 0, more[0]))
    return full[:, :, padding[0] : padding[0] + size[0], padding[1] : padding[1] + size[1]]
