"""What an executor needs to know of one convolution, with batch norm folded in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaconv import _checks

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
    "leaky_relu": F.leaky_relu,
    "gelu": F.gelu,
}

_IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": F.relu_,
    "relu6": lambda y: F.hardtanh_(y, 0.0, 6.0),
    "silu": lambda y: F.silu(y, inplace=True),
    "hardswish": lambda y: F.hardswish(y, inplace=True),
    "sigmoid": torch.sigmoid_,
    "hardsigmoid": lambda y: F.hardsigmoid(y, inplace=True),
    "leaky_relu": lambda y: F.leaky_relu_(y, 0.01),
    "gelu": lambda y: y.copy_(F.gelu(y)),
}


def activate_(y: Tensor, name: str) -> Tensor:
    """Apply an activation in place (no gradient needed)."""
    return _IN_PLACE[name](y)


@dataclass(frozen=True)
class Geometry:
    """How a convolution moves between grids: kernel, stride, padding, dilation, each (vertical, horizontal)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @classmethod
    def of(cls, conv: nn.Conv2d) -> Geometry:
        """Geometry of an `nn.Conv2d`, whose padding may be a word.

        Raises:
            ValueError: padding="same" of a kernel that reaches farther to one side.
        """
        padding = numeric_padding(conv.padding, conv.kernel_size, conv.dilation)
        return cls(conv.kernel_size, conv.stride, padding, conv.dilation)

    @property
    def pointwise(self) -> bool:
        """Output position p reads input position p and nothing else."""
        return self.kernel == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0)

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Output grid (h, w) for an input grid `size`."""
        h, w = (
            (size[i] + 2 * self.padding[i] - self.dilation[i] * (self.kernel[i] - 1) - 1) // self.stride[i]
            + 1
            for i in (0, 1)
        )
        return h, w


def numeric_padding(
    padding: str | tuple[int, int], kernel: tuple[int, int], dilation: tuple[int, int]
) -> tuple[int, int]:
    """Padding (vertical, horizontal) of a convolution that may say "same" or "valid".

    Raises:
        ValueError: "same" of a kernel that reaches farther to one side.
    """
    if not isinstance(padding, str):
        return padding
    vertical, horizontal = (
        0 if padding == "valid" else d * (k - 1) for k, d in zip(kernel, dilation, strict=True)
    )
    if vertical % 2 or horizontal % 2:
        raise ValueError(f"padding={padding!r} of a kernel {kernel} pads more on one side than on the other")
    return vertical // 2, horizontal // 2


@dataclass(frozen=True, eq=False)
class ConvSpec:
    """One convolution of a branch: folded weight [O, I/g, kh, kw], bias [O], geometry, activation name."""

    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    activation: str = "none"

    def __post_init__(self) -> None:
        _checks.one_of("activation", self.activation, tuple(ACTIVATIONS))

    @property
    def geometry(self) -> Geometry:
        """Kernel, stride, padding and dilation."""
        return Geometry(
            (self.weight.shape[2], self.weight.shape[3]), self.stride, self.padding, self.dilation
        )

    @property
    def n_taps(self) -> int:
        """Positions the kernel reads."""
        return self.weight.shape[2] * self.weight.shape[3]

    @property
    def depthwise(self) -> bool:
        """One filter a channel."""
        return self.groups > 1 and self.groups == self.weight.shape[0] and self.weight.shape[1] == 1

    @property
    def macs_per_position(self) -> int:
        """Multiply-adds for one output position, bias excluded (folded batch norm costs nothing)."""
        return self.weight.numel()

    def activate(self, y: Tensor) -> Tensor:
        """Apply the activation out of place."""
        return ACTIVATIONS[self.activation](y)
