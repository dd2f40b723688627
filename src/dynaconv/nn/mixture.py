"""Kernels that are weighted sums of experts: what CondConv, DY-Conv and DyNet have in common."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dynaconv import _checks
from dynaconv.nn.dynamic_conv import DynamicConv, KernelMacs, norm_scale_and_shift
from dynaconv.ops.dynamic_conv2d import dynamic_conv2d, mix_kernels
from dynaconv.ops.dynamic_conv2d.reference import mix_biases


class MixtureConv(DynamicConv):
    """W(x) = sum over k of a_k(x) * W_k; the bias is mixed likewise.

    `experts()` gives the kernels as [K, O, I/g, *kernel] and `expert_biases()` the biases as [K, O] (or None).
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    mixes_experts = True

    def experts(self) -> Tensor:
        """The experts' kernels, [K, O, I/g, *kernel]."""
        return self.weight

    def expert_biases(self) -> Tensor | None:
        """The experts' biases, [K, O] or None."""
        return self.bias

    @property
    def routing_shape(self) -> tuple[int, ...]:
        """Shape of one sample's coefficients."""
        return (self.weight.shape[0],)

    def forward(self, x: Tensor, routing: Tensor | None = None) -> Tensor:
        """x [B, I, *size] -> [B, O, *size']; `routing` replaces the layer's own router.

        Raises:
            ValueError: x has other channels, or routing has another shape than [B, K] (DyNet: [B, O, g_t]).
        """
        _checks.input_of(type(self).__name__, x, self.in_channels, self.dims)
        if routing is None:
            routing = self.route(x)
        else:
            _checks.routing(type(self).__name__, routing, (x.shape[0], *self.routing_shape))
        x, padding = self.padded(x)
        return dynamic_conv2d(
            x,
            self.experts(),
            routing,
            self.expert_biases(),
            self.stride,
            padding,
            self.dilation,
            self.groups,
            static_bias=self.static_bias,
            execution=self.execution,
            packed=None if self.training else self.packed,
        )

    def kernels(self, routing: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mixed kernel [B, O, I/g, *kernel] and bias [B, O] of each sample."""
        bias = mix_biases(self.expert_biases(), routing)
        if self.static_bias is not None:
            bias = self.static_bias.expand(routing.shape[0], -1) if bias is None else bias + self.static_bias
        return mix_kernels(self.experts(), routing), bias

    def macs(self, positions: int) -> KernelMacs:
        """P per position, K * P to mix, the router's linear layers to decide (none where it is shared)."""
        routing = 0 if self.router is None else self.router.macs
        return KernelMacs(self.kernel_numel * positions, self.weight.numel(), routing)

    def fold_norm_(self, norm: nn.Module) -> None:
        """Scale every expert's output channels; the shift goes outside the mixture."""
        scale, shift = norm_scale_and_shift(norm)
        with torch.no_grad():
            experts = self.experts()
            experts.mul_(scale.reshape(1, -1, *(1,) * (experts.dim() - 2)))
            biases = self.expert_biases()
            if biases is not None:
                biases.mul_(scale)
            if self.static_bias is not None:
                self.static_bias.mul_(scale)
        self.add_static_bias_(shift)

    def reset_parameters(self) -> None:
        """Each expert as `nn.Conv2d` initialises its weight: uniform with bound 1 / sqrt(fan in)."""
        bound = 1 / math.sqrt(self.in_channels // self.groups * math.prod(self.kernel_size))
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def _take(self, conv: nn.Module, scale: float, noise: float, init: str) -> None:
        """Fill the experts from a static convolution.

        exact: scale * W + zero-sum noise of `noise` times the standard deviation of W; fresh: each expert drawn with
        the standard deviation of W, which is what the initialiser of the network itself would have done.
        """
        _checks.one_of("init", init, ("exact", "fresh"))
        with torch.no_grad():
            experts, spread = self.experts(), conv.weight.std(correction=0)
            draw = torch.randn_like(experts) * spread
            if init == "fresh":
                experts.copy_(draw)
            else:
                draw -= draw.mean(0, keepdim=True)
                experts.copy_(scale * conv.weight + noise * draw)
            if self.bias is not None:
                self.expert_biases().copy_((scale * conv.bias).expand(experts.shape[:2]))

    def _mean_conv(self, coefficient: float) -> nn.Module:
        """Static convolution with the same coefficient for every expert."""
        with torch.no_grad():
            weight, bias = coefficient * self.experts().sum(0), self.expert_biases()
            bias = None if bias is None else coefficient * bias.sum(0)
            if self.static_bias is not None:
                bias = self.static_bias if bias is None else bias + self.static_bias
        return self.static_conv(weight, bias)
