"""DCD: dynamic convolution decomposition, by dynamic channel fusion (arXiv 2103.08756)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaconv import _checks
from dynaconv.nn.channel_fusion import ChannelFusion
from dynaconv.nn.dcd_router import dcd_sizes
from dynaconv.nn.dynamic_conv import DynamicConv, DynamicLayer, KernelMacs
from dynaconv.ops.channel_fusion import FORMS, channel_fusion, cheaper_form, factored_macs, folded_macs


class _DCDConv(ChannelFusion, DynamicConv):
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
        latent_channels: int | None = None,
        squeeze_channels: int | None = None,
        pool_size: int | None = None,
        rule: str = "mobilenetv2",
        fc_squeeze: int = 16,
        norm: str = "batch",
        form: str = "auto",
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
        _checks.one_of("form", form, FORMS)
        if form == "folded":
            _checks.fusion_foldable(groups, True)
        self.form = form
        sizes = dcd_sizes(
            in_channels, out_channels, rule=rule, fc_squeeze=fc_squeeze, dims=self.dims,
            latent_channels=latent_channels, squeeze_channels=squeeze_channels, pool_size=pool_size,
        )  # fmt: skip
        made = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(
            torch.empty(out_channels, in_channels // groups, *self.kernel_size, **made)
        )
        self.register_parameter("bias", nn.Parameter(torch.empty(out_channels, **made)) if bias else None)
        self._make_fusion(sizes, (in_channels, out_channels), self.dims, norm, rule, router, **made)
        self.reset_parameters()

    @property
    def has_kernels(self) -> bool:
        """The dynamic part is dense over channels, so a grouped kernel cannot hold it."""
        return self.groups == 1

    def form_for(self, positions: int) -> str:
        """Form that runs for this many output positions: factored in training, else as asked or the cheaper one."""
        if self.training or self.form == "factored":
            return "factored"
        if self.form == "folded":
            return "folded"
        channels = self.in_channels, self.out_channels, self.latent_channels
        return cheaper_form(*channels, math.prod(self.kernel_size), positions, self.groups)

    def forward(self, x: Tensor, routing: Tensor | None = None) -> Tensor:
        """x [B, I, *size] -> [B, O, *size']; `routing` [B, O + L * L] replaces the layer's own router.

        Raises:
            ValueError: x has other channels, or routing has another shape.
        """
        _checks.input_of(type(self).__name__, x, self.in_channels, self.dims)
        scale, fusion = self.split(self._routing_of(x, routing))
        x, padding = self.padded(x)
        geometry = self.geometry(padding)
        form = self.form_for(math.prod(geometry.output_size(x.shape[2:], self.kernel_size)))
        norms = self.norms() if form == "folded" or self.is_fixed() else (self.norm1, self.norm2)
        y = channel_fusion(
            x, self.weight, self.bias, self.q, self.p, scale, fusion, self.stride, padding, self.dilation,
            self.groups, norms=norms, form=form, execution=self.execution,
        )  # fmt: skip
        if self.static_bias is not None:
            y = y + self.static_bias.to(y.dtype).reshape(-1, *(1,) * self.dims)
        return y

    def macs(self, positions: int) -> KernelMacs:
        """Static convolution; Q, Phi and P at every position, or one kernel, as `form_for` chooses; the router."""
        channels = self.in_channels, self.out_channels, self.latent_channels
        if self.form_for(positions) == "folded":
            mixing = folded_macs(*channels, math.prod(self.kernel_size))
        else:
            mixing = factored_macs(*channels, positions)
        routing = 0 if self.router is None else self.router.macs
        return KernelMacs(self.kernel_numel * positions, mixing, routing)

    @classmethod
    def from_conv(cls, conv: nn.Module, *, init: str = "exact", noise: float = 0.0, **options):
        """A DCD convolution that equals `conv` before training (init="exact"), or one drawn anew (init="fresh").

        W0 is the weight; P and E_Lambda start at zero, in training mode too, and receive gradient from the first step.

        Args:
            noise: not needed here, and only zero is exact.
            options: keywords of the constructor, such as `rule` and `form`.
        Raises:
            TypeError: `conv` is not a plain static convolution. ValueError: noise with init="exact".
        """
        arguments = cls.conv_arguments(conv)
        _checks.noise_free(cls.__name__, noise, init)
        new = cls(**arguments, bias=conv.bias is not None, **options)
        new._take(conv, init)
        return new.train(conv.training)

    def to_conv(self) -> nn.Module:
        """The static convolution at Lambda = 1 and Phi = 0, norms in evaluation mode.

        With groups, the dense part P Q has no place in a grouped convolution and is left out.
        """
        if self.groups == 1:
            return self.static_conv(*self._neutral())
        bias = self.bias
        if self.static_bias is not None:
            bias = self.static_bias if bias is None else bias + self.static_bias
        return self.static_conv(self.weight, bias)

    def extra_repr(self) -> str:
        """Settings shown by print(model)."""
        sizes = f"latent_channels={self.latent_channels}, squeeze_channels={self.squeeze_channels}"
        text = f"{super().extra_repr()}, {sizes}, pool_size={self.pool_size}"
        text += "" if self.norm == "batch" else f", norm={self.norm!r}"
        return text if self.form == "auto" else f"{text}, form={self.form!r}"


class DCDConv2d(_DCDConv):
    """Convolution plus dynamic channel fusion: y = Lambda(x) (W0 x + b) + P (norm2(Phi(x) u) + u), u = norm1(Q x).

    A kernel of several taps is dynamic at its centre tap: Q and P are 1x1, and Q reads what the centre taps read.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            in `nn.Conv2d`. weight is W0 [O, I/g, kh, kw]; q [L, I, 1, 1]; p [O, L, 1, 1].
        latent_channels, squeeze_channels, pool_size: L, s and the bins of the predictor's pool along each axis; None
            for the published rule, see `dcd_sizes` for `rule` and `fc_squeeze`.
        norm: "batch", or "none" for no norms after Q and Phi.
        form: how evaluation computes: "factored" as trained, "folded" to one kernel for each image, or "auto", the one
            with fewer multiply-adds at the size of the input. Training is factored.
        router: False leaves the layer without a predictor; `forward` then needs `routing` [B, O + L * L].
        execution: how folded kernels are applied: "auto", "grouped", "unfold", "bmm" or "single" (docs/kernels.md).
    Raises:
        ValueError: channels not divisible by groups, a size below 1, form="folded" with groups, unknown names.
    Source: arXiv 2103.08756, equation 6; norms and identity as released in github.com/liyunsheng13/dcd.

    >>> DCDConv2d(8, 16, 3, padding=1)(torch.zeros(2, 8, 5, 5)).shape
    torch.Size([2, 16, 5, 5])
    """

    dims = 2


class DCDConv1d(_DCDConv):
    """`DCDConv2d` over one axis: x [B, I, L] -> [B, O, L']; arguments as `nn.Conv1d`, extras as `DCDConv2d`."""

    dims = 1


class DCDConv3d(_DCDConv):
    """`DCDConv2d` over three axes: x [B, I, D, H, W]; arguments as `nn.Conv3d`, extras as `DCDConv2d`."""

    dims = 3


class DCDLinear(ChannelFusion, DynamicLayer):
    """DCD's dynamic classifier: y = Lambda (W0 x + b) + P (norm2(Phi u) + u), u = norm1(Q x); x [B, I] -> [B, O].

    Args:
        in_features, out_features, bias, device, dtype: as in `nn.Linear`; Lambda scales the bias too.
        latent_channels, squeeze_channels: L and s.
        norm: "batch" (running statistics in training at batch size 1) or "none".
        rule: how the predictor is initialised, see `dcd_sizes`.
    Source: github.com/liyunsheng13/dcd.

    >>> DCDLinear(64, 10)(torch.zeros(2, 64)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        latent_channels: int = 32,
        squeeze_channels: int = 32,
        norm: str = "batch",
        rule: str = "mobilenetv2",
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        made = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **made))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features, **made)) if bias else None)
        self.register_parameter("static_bias", None)
        given = {"latent_channels": latent_channels, "squeeze_channels": squeeze_channels, "pool_size": 1}
        sizes = dcd_sizes(in_features, out_features, rule=rule, **given)
        self._make_fusion(sizes, (in_features, out_features), 0, norm, rule, True, **made)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Q and P as in the convolutions; W0 as `nn.Linear`, or normal with deviation 0.01 for MobileNetV2."""
        super().reset_parameters()
        if self.rule == "mobilenetv2":
            nn.init.normal_(self.weight, 0.0, 0.01)
        else:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def route(self, x: Tensor) -> Tensor:
        """Coefficients [B, O + L * L] for x [B, I]."""
        return self.router(x[:, :, None])

    def forward(self, x: Tensor, routing: Tensor | None = None) -> Tensor:
        """x [B, I] -> [B, O]; `routing` [B, O + L * L] replaces the layer's own router."""
        _checks.features(type(self).__name__, x, self.in_features)
        scale, fusion = self.split(self._routing_of(x, routing))
        if self.is_fixed():
            weight = self.weight[:, :, None, None]
            parts = (weight, self.bias, self.q, self.p, scale, fusion)
            y = channel_fusion(x[:, :, None, None], *parts, norms=self.norms()).flatten(1)
            return y if self.static_bias is None else y + self.static_bias.to(y.dtype)
        y = F.linear(x, self.weight, self.bias)
        u = self.norm1(F.linear(x, self.q))
        fused = self.norm2(torch.bmm(fusion.to(u.dtype), u[:, :, None])[:, :, 0]) + u
        y = y * scale.to(y.dtype) + F.linear(fused, self.p)
        return y if self.static_bias is None else y + self.static_bias.to(y.dtype)

    def macs(self, positions: int = 1) -> KernelMacs:
        """The product, the factored dynamic part, and the router."""
        mixing = factored_macs(self.in_features, self.out_features, self.latent_channels, 1)
        return KernelMacs(self.in_features * self.out_features, mixing, self.router.macs)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, init: str = "exact", **options):
        """Equal to `linear` before training (init="exact"), or drawn anew (init="fresh")."""
        weight = linear.weight
        made = {"device": weight.device, "dtype": weight.dtype}
        new = cls(linear.in_features, linear.out_features, linear.bias is not None, **made, **options)
        new._take(linear, init)
        return new.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """The static layer at Lambda = 1 and Phi = 0, norms in evaluation mode."""
        weight, bias = self._neutral()
        made = {"device": weight.device, "dtype": weight.dtype}
        linear = nn.Linear(self.in_features, self.out_features, bias is not None, **made)
        with torch.no_grad():
            linear.weight.copy_(weight)
            if bias is not None:
                linear.bias.copy_(bias)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        """Settings shown by print(model)."""
        sizes = f"latent_channels={self.latent_channels}, squeeze_channels={self.squeeze_channels}"
        return f"{self.in_features}, {self.out_features}, {sizes}"
