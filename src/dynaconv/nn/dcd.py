"""DCD: dynamic convolution decomposition, by dynamic channel fusion (arXiv 2103.08756)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dynaconv import _checks
from dynaconv.nn.branch_norm import BranchNorm, Shift, affine
from dynaconv.nn.dcd_router import DCDRouter, DCDSizes, dcd_sizes
from dynaconv.nn.dynamic_conv import DynamicConv, DynamicLayer, KernelMacs, norm_scale_and_shift
from dynaconv.ops.channel_fusion import (
    FORMS,
    Affine,
    channel_fusion,
    cheaper_form,
    factored_macs,
    folded_macs,
    fused_kernels,
)


class ChannelFusion(nn.Module):
    """What DCD's convolutions and its classifier share: W(x) = Lambda(x) W0 + P (Phi(x) + I) Q, with two norms."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    static_bias: nn.Parameter | None
    router: DCDRouter | None

    def _make_fusion(
        self,
        sizes: DCDSizes,
        channels: tuple[int, int],
        dims: int,
        norm: str,
        rule: str,
        router: bool,
        **made,
    ) -> None:
        _checks.one_of("norm", norm, ("batch", "none"))
        self.latent_channels, self.squeeze_channels, self.pool_size = sizes
        self.rule, self.norm = rule, norm
        latent, ones = sizes.latent_channels, (1,) * dims
        self.q = nn.Parameter(torch.empty(latent, channels[0], *ones, **made))
        self.p = nn.Parameter(torch.empty(channels[1], latent, *ones, **made))
        self.norm1 = BranchNorm(latent, **made) if norm == "batch" else nn.Identity()
        self.norm2 = BranchNorm(latent, **made) if norm == "batch" else nn.Identity()
        self.router = DCDRouter(*channels, sizes, dims, **made) if router else None

    def split(self, routing: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients [B, O + L * L] -> Lambda [B, O] and Phi [B, L, L]."""
        outputs, latent = self.weight.shape[0], self.latent_channels
        scale, fusion = routing.split([outputs, latent * latent], dim=1)
        return scale, fusion.unflatten(1, (latent, latent))

    @property
    def routing_shape(self) -> tuple[int, ...]:
        """Shape of one sample's coefficients."""
        return (self.weight.shape[0] + self.latent_channels**2,)

    def norms(self) -> tuple[Affine, Affine]:
        """Both norms as they are in evaluation mode."""
        return affine(self.norm1), affine(self.norm2)

    def kernels(self, routing: Tensor) -> tuple[Tensor, Tensor | None]:
        """Folded kernel [B, O, I, *kernel] and bias [B, O] (or None) of each sample, norms in evaluation mode.

        Raises:
            ValueError: groups > 1, where the dense dynamic part does not fit into a grouped kernel.
        """
        parts = (self.weight, self.bias, self.q, self.p, *self.split(routing))
        kernels, bias = fused_kernels(*parts, norms=self.norms())
        if self.static_bias is not None:
            bias = self.static_bias.expand(routing.shape[0], -1) if bias is None else bias + self.static_bias
        return kernels, bias

    def _routing_of(self, x: Tensor, routing: Tensor | None) -> Tensor:
        if routing is None:
            return self.route(x)
        _checks.routing(type(self).__name__, routing, (x.shape[0], *self.routing_shape))
        return routing

    def fold_own_norms_(self) -> None:
        """Absorb the norms after Q and Phi, as they are in evaluation mode, exactly; what stays is a shift each.

        The norm after Phi goes into the router, so a layer whose coefficients come from outside keeps it.
        """
        with torch.no_grad():
            if isinstance(self.norm1, _BatchNorm):
                scale, shift = norm_scale_and_shift(self.norm1)
                self.q.mul_(scale.reshape(-1, *(1,) * (self.q.dim() - 1)))
                self.norm1 = Shift(shift)
            if isinstance(self.norm2, _BatchNorm) and self.router is not None:
                scale, shift = norm_scale_and_shift(self.norm2)
                self.router.fusion.weight.mul_(scale.repeat_interleave(self.latent_channels)[:, None])
                self.norm2 = Shift(shift)

    def fold_norm_(self, norm: nn.Module) -> None:
        """Absorb a batch norm that follows into W0, P and the biases, and both own norms; exact in evaluation mode."""
        scale, shift = norm_scale_and_shift(norm)
        with torch.no_grad():
            for rows in (self.weight, self.p, self.bias, self.static_bias):
                if rows is not None:
                    rows.mul_(scale.reshape(-1, *(1,) * (rows.dim() - 1)))
            self.static_bias = nn.Parameter(shift if self.static_bias is None else self.static_bias + shift)
        self.fold_own_norms_()

    def reset_parameters(self) -> None:
        """As released: W0, Q and P normal with variance 2 / (k * k * O); linear layers by the rule; biases zero."""
        for kernel in (self.weight, self.q, self.p):
            nn.init.normal_(kernel, 0.0, math.sqrt(2 / (kernel.shape[0] * math.prod(kernel.shape[2:]))))
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if self.router is not None and self.rule == "mobilenetv2":
            for linear in self.router.children():
                nn.init.normal_(linear.weight, 0.0, 0.01)

    def _take(self, static: nn.Module, init: str) -> None:
        """exact: W0 = W, P = 0 and E_Lambda = 0, so that Lambda = 1 and the dynamic part is 0, in training too."""
        _checks.one_of("init", init, ("exact", "fresh"))
        if init == "fresh":
            return
        with torch.no_grad():
            self.weight.copy_(static.weight)
            if self.bias is not None:
                self.bias.copy_(static.bias)
            self.p.zero_()
        if self.router is not None:
            self.router.make_neutral_()

    def _neutral(self) -> tuple[Tensor, Tensor | None]:
        """Kernel and bias at Lambda = 1 and Phi = 0; a bias that only the dynamic part could have had is dropped."""
        routing = self.weight.new_zeros(1, *self.routing_shape)
        routing[:, : self.weight.shape[0]] = 1
        with torch.no_grad():
            kernels, bias = self.kernels(routing)
        own = self.bias is not None or self.static_bias is not None
        return kernels[0], bias[0] if bias is not None and (own or bool(bias.any())) else None


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
        norms = self.norms() if form == "folded" else (self.norm1, self.norm2)
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
