"""CondConv: conditionally parameterised convolutions (arXiv 1904.04971)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dynaconv import _checks
from dynaconv.nn.dynamic_conv import DynamicLayer, KernelMacs
from dynaconv.nn.mixture import MixtureConv
from dynaconv.nn.routers import SigmoidRouter
from dynaconv.ops.dynamic_conv2d import dynamic_conv2d, mix_kernels
from dynaconv.ops.dynamic_conv2d.reference import mix_biases


class _CondConv(MixtureConv):
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
        num_experts: int = 8,
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
        _checks.count("num_experts", num_experts)
        self.num_experts = num_experts
        made = {"device": device, "dtype": dtype}
        shape = (num_experts, out_channels, in_channels // groups, *self.kernel_size)
        self.weight = nn.Parameter(torch.empty(shape, **made))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(num_experts, out_channels, **made)) if bias else None
        )
        self.router = SigmoidRouter(in_channels, num_experts, **made) if router else None
        self.reset_parameters()

    @classmethod
    def from_conv(
        cls,
        conv: nn.Module,
        *,
        num_experts: int = 8,
        init: str = "exact",
        noise: float = 0.1,
        router: bool = True,
        execution: str = "auto",
    ):
        """A CondConv that equals `conv` before training (init="exact"), or one drawn anew (init="fresh").

        Every coefficient starts at one half; the experts are 2 / K times the weight plus zero-sum noise, without
        which identical experts would receive identical gradients for ever.

        Args:
            noise: standard deviation of that noise relative to the weight's.
            router: False where a block shares one router and passes `routing`.
        Raises:
            TypeError: `conv` is not a plain static convolution.
        """
        arguments = cls.conv_arguments(conv)
        new = cls(
            **arguments,
            bias=conv.bias is not None,
            num_experts=num_experts,
            router=router,
            execution=execution,
        )
        new._take(conv, 2 / num_experts, noise, init)
        if new.router is not None and init == "exact":
            new.router.make_neutral_()
        return new.train(conv.training)

    def to_conv(self) -> nn.Module:
        """The static convolution of neutral coefficients (one half each)."""
        return self._mean_conv(0.5)

    def extra_repr(self) -> str:
        """Settings shown by print(model)."""
        return f"{super().extra_repr()}, num_experts={self.num_experts}"


class CondConv2d(_CondConv):
    """Convolution whose kernel is a sum of experts weighted by sigmoids: W(x) = sum of r_k(x) W_k.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            in `nn.Conv2d`.
        num_experts: K >= 1. weight is [K, O, I/g, kh, kw], bias [K, O].
        router: False leaves the layer without a router of its own; `forward` then needs `routing` [B, K].
        execution: "auto", "grouped", "feature", "unfold", "bmm" or "single" (docs/kernels.md).
    Raises:
        ValueError: channels not divisible by groups, num_experts < 1, unknown execution.
    Source: arXiv 1904.04971, equations 1 and 2: r = sigmoid(R GAP(x) + b).

    >>> CondConv2d(8, 16, 3, padding=1, num_experts=4)(torch.zeros(2, 8, 5, 5)).shape
    torch.Size([2, 16, 5, 5])
    """

    dims = 2


class CondConv1d(_CondConv):
    """`CondConv2d` over one axis: x [B, I, L] -> [B, O, L']; arguments as `nn.Conv1d`, extras as `CondConv2d`."""

    dims = 1


class CondConv3d(_CondConv):
    """`CondConv2d` over three axes: x [B, I, D, H, W]; arguments as `nn.Conv3d`, extras as `CondConv2d`."""

    dims = 3


class CondLinear(DynamicLayer):
    """CondConv's classifier: a 1x1 CondConv on pooled features, with its own router; x [B, I] -> [B, O].

    Args:
        bias: mixed bias [K, O]; the published classifier has none.
        static_bias: a bias [O] outside the mixture, which a converted classifier needs to stay exact.
        num_experts: K >= 1. weight is [K, O, I].
    Source: arXiv 1904.04971, section 4 (the final fully connected layer).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        device=None,
        dtype=None,
        *,
        num_experts: int = 8,
        static_bias: bool = False,
    ) -> None:
        super().__init__()
        _checks.count("num_experts", num_experts)
        self.in_features, self.out_features, self.num_experts = in_features, out_features, num_experts
        made = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features, **made))
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(num_experts, out_features, **made)) if bias else None
        )
        self.register_parameter(
            "static_bias", nn.Parameter(torch.zeros(out_features, **made)) if static_bias else None
        )
        self.router = SigmoidRouter(in_features, num_experts, **made)
        nn.init.uniform_(self.weight, -(in_features**-0.5), in_features**-0.5)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, num_experts: int = 8, init: str = "exact", noise: float = 0.1):
        """Equal to `linear` before training (its bias outside the mixture), or "fresh" as published, without bias."""
        _checks.one_of("init", init, ("exact", "fresh"))
        weight = linear.weight
        keep = init == "exact" and linear.bias is not None
        new = cls(
            linear.in_features,
            linear.out_features,
            device=weight.device,
            dtype=weight.dtype,
            num_experts=num_experts,
            static_bias=keep,
        )
        with torch.no_grad():
            draw = torch.randn_like(new.weight) * weight.std(correction=0)
            if init == "fresh":
                new.weight.copy_(draw)
            else:
                new.weight.copy_(2 / num_experts * weight + noise * (draw - draw.mean(0, keepdim=True)))
                new.router.make_neutral_()
            if keep:
                new.static_bias.copy_(linear.bias)
        return new.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """The static layer of neutral coefficients (one half each)."""
        bias = None if self.bias is None else 0.5 * self.bias.sum(0)
        if self.static_bias is not None:
            bias = self.static_bias if bias is None else bias + self.static_bias
        made = {"device": self.weight.device, "dtype": self.weight.dtype}
        linear = nn.Linear(self.in_features, self.out_features, bias is not None, **made)
        with torch.no_grad():
            linear.weight.copy_(0.5 * self.weight.sum(0))
            if bias is not None:
                linear.bias.copy_(bias)
        return linear.train(self.training)

    def route(self, x: Tensor) -> Tensor:
        """Coefficients [B, K] for x [B, I]."""
        return self.router(x[:, :, None])

    def forward(self, x: Tensor, routing: Tensor | None = None) -> Tensor:
        """x [B, I] -> [B, O]."""
        _checks.features(type(self).__name__, x, self.in_features)
        if routing is None:
            routing = self.route(x)
        else:
            _checks.routing(type(self).__name__, routing, (x.shape[0], self.num_experts))
        if torch.compiler.is_compiling() and not self.training:
            # One node for compilers, as the convolutions are.
            experts = self.weight[:, :, :, None, None]
            bias, static = self.bias, self.static_bias
            return dynamic_conv2d(x[:, :, None, None], experts, routing, bias, static_bias=static).flatten(1)
        y = torch.bmm(mix_kernels(self.weight, routing), x[:, :, None])[:, :, 0]
        mixed = mix_biases(self.bias, routing)
        for bias in (mixed, self.static_bias):
            if bias is not None:
                y = y + bias.to(y.dtype)
        return y

    def macs(self, positions: int = 1) -> KernelMacs:
        """One product, mixing K of them, and the router."""
        return KernelMacs(self.in_features * self.out_features, self.weight.numel(), self.router.macs)

    def extra_repr(self) -> str:
        """Settings shown by print(model)."""
        return f"{self.in_features}, {self.out_features}, num_experts={self.num_experts}"
