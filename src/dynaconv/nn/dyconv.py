"""DY-Conv: dynamic convolution, attention over convolution kernels (arXiv 1912.03458)."""

from __future__ import annotations

import torch
from torch import nn

from dynaconv import _checks
from dynaconv.nn.mixture import MixtureConv
from dynaconv.nn.routers import SoftmaxRouter


class _DYConv(MixtureConv):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device=None,
        dtype=None,
        *,
        num_kernels: int = 4,
        reduction: float = 1 / 4,
        temperature: float = 1.0,
        router: bool = True,
        execution: str = "auto",
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            padding_mode,
            execution=execution,
        )
        _checks.count("num_kernels", num_kernels)
        _checks.positive("reduction", reduction)
        self.num_kernels = num_kernels
        made = {"device": device, "dtype": dtype}
        shape = (num_kernels, out_channels, in_channels // groups, *self.kernel_size)
        self.weight = nn.Parameter(torch.empty(shape, **made))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(num_kernels, out_channels, **made)) if bias else None
        )
        hidden = max(1, int(in_channels * reduction))
        _checks.positive("temperature", temperature)
        self.router = SoftmaxRouter(in_channels, hidden, num_kernels, temperature, **made) if router else None
        self.reset_parameters()

    @classmethod
    def from_conv(
        cls,
        conv: nn.Module,
        *,
        num_kernels: int = 4,
        reduction: float = 1 / 4,
        temperature: float = 1.0,
        init: str = "exact",
        noise: float = 0.0,
        router: bool = True,
        execution: str = "auto",
    ):
        """A DY-Conv that equals `conv` before training (init="exact"), or one drawn anew (init="fresh").

        The coefficients sum to one, so K copies of the weight are exact at any attention and temperature; different
        attention for different images pulls the copies apart, so that noise is not needed.

        Raises:
            TypeError: `conv` is not a plain static convolution. ValueError: noise with init="exact" (no longer exact).
        """
        arguments = cls.conv_arguments(conv)
        if noise and init == "exact":
            raise ValueError(
                f"noise={noise} would make the conversion inexact: attention weighs the kernels unequally"
            )
        new = cls(
            **arguments, bias=conv.bias is not None, num_kernels=num_kernels, reduction=reduction,
            temperature=temperature, router=router, execution=execution,
        )  # fmt: skip
        new._take(conv, 1.0, 0.0, init)
        return new.train(conv.training)

    def to_conv(self) -> nn.Module:
        """The static convolution of uniform attention (1 / K each): the mean kernel."""
        return self._mean_conv(1 / self.num_kernels)

    def extra_repr(self) -> str:
        """Settings shown by print(model)."""
        return f"{super().extra_repr()}, num_kernels={self.num_kernels}"


class DYConv2d(_DYConv):
    """Convolution whose kernel is a convex sum of kernels: W(x) = sum of pi_k(x) W_k, pi from a softmax.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            in `nn.Conv2d`.
        num_kernels: K >= 1. weight is [K, O, I/g, kh, kw], bias [K, O].
        reduction: hidden width of the attention relative to in_channels.
        temperature: of the softmax, > 0, a buffer; anneal it from 30 to 1 with `TemperatureSchedule`.
        router: False leaves the layer without attention of its own; `forward` then needs `routing` [B, K].
        execution: "auto", "grouped", "feature", "unfold", "bmm" or "single" (docs/kernels.md).
    Raises:
        ValueError: channels not divisible by groups, num_kernels < 1, temperature <= 0, unknown execution.
    Source: arXiv 1912.03458, equations 2 and 3.

    >>> DYConv2d(8, 16, 3, padding="same")(torch.zeros(2, 8, 5, 5)).shape
    torch.Size([2, 16, 5, 5])
    """

    dims = 2


class DYConv1d(_DYConv):
    """`DYConv2d` over one axis: x [B, I, L] -> [B, O, L']; arguments as `nn.Conv1d`, extras as `DYConv2d`."""

    dims = 1


class DYConv3d(_DYConv):
    """`DYConv2d` over three axes: x [B, I, D, H, W]; arguments as `nn.Conv3d`, extras as `DYConv2d`."""

    dims = 3
