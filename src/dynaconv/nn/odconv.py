"""ODConv: omni-dimensional dynamic convolution (arXiv 2209.07947)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dynaconv import _checks
from dynaconv.nn.dynamic_conv import DynamicConv, KernelMacs, norm_scale_and_shift
from dynaconv.nn.od_router import NORMS, ODCoefficients, ODRouter, ODSizes
from dynaconv.ops.dynamic_conv2d import dynamic_conv2d, mix_kernels


class _ODConv(DynamicConv):
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
        num_kernels: int = 1,
        reduction: float = 1 / 16,
        min_channels: int = 16,
        temperature: float = 1.0,
        norm: str = "batch",
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
        _checks.count("min_channels", min_channels)
        _checks.positive("reduction", reduction)
        _checks.positive("temperature", temperature)
        _checks.one_of("norm", norm, NORMS)
        self.num_kernels, taps = num_kernels, math.prod(self.kernel_size)
        self.sizes = ODSizes(
            channel=in_channels,
            filter=0 if groups == in_channels == out_channels else out_channels,
            spatial=taps if taps > 1 else 0,
            kernel=num_kernels if num_kernels > 1 else 0,
        )
        made = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(
            torch.empty(num_kernels, out_channels, in_channels // groups, *self.kernel_size, **made)
        )
        if bias:
            self.static_bias = nn.Parameter(torch.empty(out_channels, **made))
        hidden = max(int(in_channels * reduction), min_channels)
        settings = {"temperature": temperature, "norm": norm, **made}
        self.router = ODRouter(in_channels, hidden, self.sizes, **settings) if router else None
        self.reset_parameters()

    @property
    def bias(self) -> nn.Parameter | None:
        """[O] or None: the bias, outside the attention (`static_bias`)."""
        return self.static_bias

    def reset_parameters(self) -> None:
        """As released: every kernel, the trunk and the heads normal with variance 2 / fan out; biases zero."""
        fan_out = self.out_channels * math.prod(self.kernel_size)
        nn.init.normal_(self.weight, 0.0, math.sqrt(2 / fan_out))
        if self.static_bias is not None:
            nn.init.zeros_(self.static_bias)
        if self.router is not None:
            self.router.reset_parameters()

    @property
    def routing_shape(self) -> tuple[int, ...]:
        """Shape of one sample's coefficients."""
        return (sum(self.sizes),)

    def split(self, routing: Tensor) -> ODCoefficients:
        """Coefficients [B, I + O + taps + K] -> channel [B, I], filter [B, O], spatial [B, taps], kernel [B, K]."""
        return self.sizes.split(routing)

    def forward(self, x: Tensor, routing: Tensor | None = None) -> Tensor:
        """x [B, I, *size] -> [B, O, *size']; `routing` [B, I + O + taps + K] replaces the layer's own router.

        The attention over input channels scales the input and the one over output channels the output, so that only
        the attention over taps and kernels touches weights.

        Raises:
            ValueError: x has other channels, or routing has another shape.
        """
        _checks.input_of(type(self).__name__, x, self.in_channels, self.dims)
        if routing is None:
            routing = self.route(x)
        else:
            _checks.routing(type(self).__name__, routing, (x.shape[0], *self.routing_shape))
        parts = self.split(routing)
        x, padding = self.padded(_scaled(x, parts.channel))
        if parts.spatial is None and parts.kernel is None:
            y = self.geometry(padding).convolve(x, self.weight[0])
        else:
            y = dynamic_conv2d(
                x, self.weight, self._mixture(parts), None, self.stride, padding, self.dilation, self.groups,
                taps=parts.spatial, execution=self.execution, packed=None if self.training else self.packed,
            )  # fmt: skip
        y = _scaled(y, parts.filter)
        if self.static_bias is not None:
            y = y + self.static_bias.to(y.dtype).reshape(-1, *(1,) * self.dims)
        return y

    def _mixture(self, parts: ODCoefficients) -> Tensor:
        """[B, K]: the attention over kernels, one where there is a single kernel."""
        if parts.kernel is not None:
            return parts.kernel
        return parts.channel.new_ones(parts.channel.shape[0], 1)

    def kernels(self, routing: Tensor) -> tuple[Tensor, Tensor | None]:
        """Kernel [B, O, I/g, *kernel] of each sample with all four attentions in it, and the bias [B, O] or None."""
        parts = self.split(routing)
        kernels = mix_kernels(self.weight, self._mixture(parts), parts.spatial)
        by_group = kernels.unflatten(1, (self.groups, self.out_channels // self.groups))
        channel = parts.channel.to(kernels.dtype).unflatten(1, (self.groups, 1, -1))
        kernels = (by_group * channel.reshape(*channel.shape, *(1,) * self.dims)).flatten(1, 2)
        if parts.filter is not None:
            kernels = kernels * parts.filter.to(kernels.dtype).reshape(
                -1, self.out_channels, *(1,) * (1 + self.dims)
            )
        bias = self.static_bias
        return kernels, None if bias is None else bias.expand(routing.shape[0], -1)

    def macs(self, positions: int) -> KernelMacs:
        """Static convolution; K * P to mix, P for the taps of a single kernel, 0 without either; the router."""
        mixes = self.sizes.kernel or self.sizes.spatial
        routing = 0 if self.router is None else self.router.macs
        return KernelMacs(self.kernel_numel * positions, self.weight.numel() if mixes else 0, routing)

    def fold_norm_(self, norm: nn.Module) -> None:
        """Scale every kernel's output channels; the shift goes to the static bias; the trunk's own norm is absorbed."""
        scale, shift = norm_scale_and_shift(norm)
        with torch.no_grad():
            self.weight.mul_(scale.reshape(1, -1, *(1,) * (self.weight.dim() - 2)))
            if self.static_bias is not None:
                self.static_bias.mul_(scale)
        self.add_static_bias_(shift)
        self.fold_own_norms_()

    def fold_own_norms_(self) -> None:
        """Absorb the router's batch norm into its trunk, exactly in evaluation mode."""
        if self.router is not None:
            self.router.fold_own_norms_()

    @classmethod
    def from_conv(cls, conv: nn.Module, *, init: str = "exact", noise: float = 0.0, **options):
        """An ODConv that equals `conv` before training (init="exact"), or one drawn anew (init="fresh").

        The sigmoids start at one half, so that each of K equal kernels is 2^n times the weight with n sigmoid parts;
        the softmax sums to one whatever it is, and being random it tells the kernels apart. Exact at every temperature.

        Args:
            noise: not needed here, and only zero is exact.
            options: keywords of the constructor, such as `num_kernels` and `temperature`.
        Raises:
            TypeError: `conv` is not a plain static convolution. ValueError: noise with init="exact".
        """
        arguments = cls.conv_arguments(conv)
        _checks.one_of("init", init, ("exact", "fresh"))
        _checks.noise_free(cls.__name__, noise, init)
        new = cls(**arguments, bias=conv.bias is not None, **options)
        if init == "exact":
            with torch.no_grad():
                new.weight.copy_((2**new.sizes.sigmoids * conv.weight).expand_as(new.weight))
                if conv.bias is not None:
                    new.static_bias.copy_(conv.bias)
            if new.router is not None:
                new.router.make_neutral_()
        return new.train(conv.training)

    def to_conv(self) -> nn.Module:
        """The static convolution of neutral attention: one half for each sigmoid, 1 / K for each kernel."""
        return self.static_conv(self.weight.mean(0) / 2**self.sizes.sigmoids, self.static_bias)

    def extra_repr(self) -> str:
        """Settings shown by print(model)."""
        text = f"{super().extra_repr()}, num_kernels={self.num_kernels}"
        return text if self.static_bias is not None else f"{text}, bias=False"


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None:
        return x
    return x * scale.to(x.dtype).reshape(*scale.shape, *(1,) * (x.dim() - 2))


class ODConv2d(_ODConv):
    """Convolution with attention over all axes of its kernel: W(x) = sum of a_w,k a_f a_c a_s W_k.

    a_c scales the input channels, a_f the output channels, a_s the taps (all sigmoids, shared by the kernels, as
    released), and a_w mixes K kernels (softmax). A 1x1 kernel has no a_s, a depthwise convolution no a_f, and K = 1 no
    a_w.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            in `nn.Conv2d`. weight is [K, O, I/g, kh, kw]; bias [O] is added after a_f, outside the attention.
        num_kernels: K >= 1; 1 is a published setting.
        reduction, min_channels: width of the attention's trunk, max(int(I * reduction), min_channels).
        temperature: of sigmoids and softmax, > 0, a buffer; anneal it from 30 to 1 with `TemperatureSchedule`.
        norm: of the trunk: "batch" (running statistics in training at batch size 1), "layer" or "none".
        router: False leaves the layer without attention of its own; `forward` then needs `routing`.
        execution: "auto", "grouped", "unfold", "bmm", "single", and "feature" for 1x1 kernels (docs/kernels.md).
    Raises:
        ValueError: channels not divisible by groups, num_kernels < 1, temperature <= 0, unknown names.
    Source: arXiv 2209.07947, equation 4; github.com/OSVAI/ODConv.

    >>> ODConv2d(8, 16, 3, padding=1, num_kernels=4)(torch.zeros(2, 8, 5, 5)).shape
    torch.Size([2, 16, 5, 5])
    """

    dims = 2


class ODConv1d(_ODConv):
    """`ODConv2d` over one axis: x [B, I, L] -> [B, O, L']; arguments as `nn.Conv1d`, extras as `ODConv2d`."""

    dims = 1


class ODConv3d(_ODConv):
    """`ODConv2d` over three axes: x [B, I, D, H, W]; arguments as `nn.Conv3d`, extras as `ODConv2d`."""

    dims = 3
