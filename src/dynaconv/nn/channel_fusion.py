"""What DCD's convolutions and its classifier share: projections, norms, coefficients, folding (arXiv 2103.08756)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dynaconv import _checks
from dynaconv.nn.branch_norm import BranchNorm, Shift, affine
from dynaconv.nn.dcd_router import DCDRouter, DCDSizes
from dynaconv.nn.dynamic_conv import norm_scale_and_shift
from dynaconv.ops.channel_fusion import Affine, fused_kernels


class ChannelFusion(nn.Module):
    """A layer with W(x) = Lambda(x) W0 + P (Phi(x) + I) Q, with two norms."""

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

    def is_fixed(self) -> bool:
        """A compiler is looking at the layer in evaluation, where both norms are fixed scales and shifts."""
        training = self.training or self.norm1.training or self.norm2.training
        return torch.compiler.is_compiling() and not training

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
                self.norm1 = Shift(shift).train(self.norm1.training)
            if isinstance(self.norm2, _BatchNorm) and self.router is not None:
                scale, shift = norm_scale_and_shift(self.norm2)
                self.router.fusion.weight.mul_(scale.repeat_interleave(self.latent_channels)[:, None])
                self.norm2 = Shift(shift).train(self.norm2.training)

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
