"""Stride, padding, dilation and groups of a convolution over any number of axes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


@dataclass(frozen=True)
class ConvGeometry:
    """How a convolution moves over its input; one number per axis, zero padding on both sides."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    @classmethod
    def of(cls, dims: int, stride, padding, dilation, groups: int) -> ConvGeometry:
        """From what `F.conv2d` takes: numbers or tuples."""
        return cls(per_axis(stride, dims), per_axis(padding, dims), per_axis(dilation, dims), groups)

    @property
    def numbers(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
        """Stride, padding, dilation and groups, in the order of `F.conv2d`."""
        return self.stride, self.padding, self.dilation, self.groups

    @property
    def unpadded(self) -> ConvGeometry:
        """The same on an input that was padded already."""
        return replace(self, padding=(0,) * len(self.padding))

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, groups: int = 0) -> Tensor:
        """Plain convolution with this geometry."""
        conv = CONVOLUTIONS[weight.dim() - 2]
        return conv(x, weight, bias, self.stride, self.padding, self.dilation, groups or self.groups)

    def output_size(self, size, kernel) -> tuple[int, ...]:
        """Output extent for an input extent."""
        return tuple(
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(size, kernel, self.stride, self.padding, self.dilation, strict=True)
        )


def per_axis(value, dims: int) -> tuple[int, ...]:
    """One number for every axis."""
    return (int(value),) * dims if isinstance(value, int) else tuple(int(v) for v in value)


def pad_axes(x: Tensor, before, after, mode: str = "zeros") -> Tensor:
    """Pad every spatial axis by (before, after); negative values crop."""
    amounts = [amount for pair in reversed(list(zip(before, after, strict=True))) for amount in pair]
    if not any(amounts):
        return x
    y = F.pad(x, amounts, mode="constant" if mode == "zeros" else mode)
    # Circular padding is the one mode in which PyTorch forgets the memory format.
    forgot = mode == "circular" and is_channels_last(x)
    return y.contiguous(memory_format=torch.channels_last) if forgot else y


def is_channels_last(x: Tensor) -> bool:
    """x is an image batch [B, C, H, W] with the channels innermost; False where a function transform cannot tell."""
    if x.dim() != 4 or x.is_contiguous():
        return False
    if not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(x):
        return False
    return x.is_contiguous(memory_format=torch.channels_last)


def same_padding(kernel, dilation) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What padding="same" puts before and after each axis; the odd one goes after, as in PyTorch."""
    totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    return tuple(t // 2 for t in totals), tuple(t - t // 2 for t in totals)
