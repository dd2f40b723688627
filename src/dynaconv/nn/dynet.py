"""DyNet: dynamic convolution with coefficients for every output channel (arXiv 2004.10694, OpenReview SyeZIkrKwS)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dynaconv import _checks
from dynaconv.nn.mixture import MixtureConv
from dynaconv.nn.routers import ChannelRouter


class _DyNetConv(MixtureConv):
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
        group_size: int = 6,
        hidden: int | None = None,
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
        _checks.count("group_size", group_size)
        self.group_size = group_size
        made = {"device": device, "dtype": dtype}
        shape = (out_channels * group_size, in_channels // groups, *self.kernel_size)
        self.weight = nn.Parameter(torch.empty(shape, **made))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_channels * group_size, **made)) if bias else None
        )
        self.router = (
            ChannelRouter(in_channels, [out_channels], group_size, hidden, **made) if router else None
        )
        self.reset_parameters()

    def experts(self) -> Tensor:
        """[g_t, O, I/g, *kernel]: expert i of every output channel, a view of `weight`."""
        return self.weight.unflatten(0, (self.out_channels, self.group_size)).transpose(0, 1)

    def expert_biases(self) -> Tensor | None:
        """[g_t, O] or None, a view of `bias`."""
        return None if self.bias is None else self.bias.unflatten(0, (self.out_channels, self.group_size)).t()

    @property
    def routing_shape(self) -> tuple[int, ...]:
        """(O, g_t)."""
        return self.out_channels, self.group_size

    @classmethod
    def from_conv(
        cls,
        conv: nn.Module,
        *,
        group_size: int = 6,
        hidden: int | None = None,
        init: str = "exact",
        noise: float = 0.1,
        router: bool = True,
        execution: str = "auto",
    ):
        """A DyNet convolution that equals `conv` before training (init="exact"), or one drawn anew (init="fresh").

        Every coefficient starts at one half; the experts are 2 / g_t times the weight plus noise that sums to zero.

        Raises:
            TypeError: `conv` is not a plain static convolution.
        """
        arguments = cls.conv_arguments(conv)
        new = cls(
            **arguments, bias=conv.bias is not None, group_size=group_size, hidden=hidden, router=router,
            execution=execution,
        )  # fmt: skip
        new._take(conv, 2 / group_size, noise, init)
        if new.router is not None and init == "exact":
            new.router.make_neutral_()
        return new.train(conv.training)

    def to_conv(self) -> nn.Module:
        """The static convolution of neutral coefficients (one half each)."""
        return self._mean_conv(0.5)

    def extra_repr(self) -> str:
        """Settings shown by print(model)."""
        return f"{super().extra_repr()}, group_size={self.group_size}"


class DyNetConv2d(_DyNetConv):
    """Convolution in which every output channel t mixes g_t experts of its own: w_t(x) = sum of eta_t,i(x) w[t, i].

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            in `nn.Conv2d`.
        group_size: g_t >= 1, experts of one output channel. weight is [O * g_t, I/g, kh, kw], output channel slow;
            bias [O * g_t].
        hidden: width between two linear layers of the predictor; None for a single one.
        router: False leaves the layer without a predictor of its own; `forward` then needs `routing` [B, O, g_t].
        execution: "auto", "grouped", "feature", "unfold", "bmm" or "single" (docs/kernels.md).
    Raises:
        ValueError: channels not divisible by groups, group_size < 1, unknown execution.
    Source: OpenReview SyeZIkrKwS, equation 1; `execution="feature"` is its equation 2.

    >>> DyNetConv2d(8, 16, 3, padding=1)(torch.zeros(2, 8, 5, 5)).shape
    torch.Size([2, 16, 5, 5])
    """

    dims = 2


class DyNetConv1d(_DyNetConv):
    """`DyNetConv2d` over one axis: x [B, I, L] -> [B, O, L']; arguments as `nn.Conv1d`, extras as `DyNetConv2d`."""

    dims = 1


class DyNetConv3d(_DyNetConv):
    """`DyNetConv2d` over three axes: x [B, I, D, H, W]; arguments as `nn.Conv3d`, extras as `DyNetConv2d`."""

    dims = 3
