"""ODConv's attention over input channels, output channels, taps and kernels (arXiv 2209.07947)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dynaconv import _checks
from dynaconv.nn.branch_norm import BranchNorm
from dynaconv.nn.dynamic_conv import norm_scale_and_shift
from dynaconv.nn.routers import Router
from dynaconv.nn.temperature import Tempered

NORMS = ("batch", "layer", "none")


class ODCoefficients(NamedTuple):
    """Attention of one layer; a part that the layer does not have is None."""

    channel: Tensor | None
    filter: Tensor | None
    spatial: Tensor | None
    kernel: Tensor | None


class ODSizes(NamedTuple):
    """How many coefficients each part has: I, O, taps, K; 0 for a part that the layer does not have."""

    channel: int
    filter: int
    spatial: int
    kernel: int

    @property
    def sigmoids(self) -> int:
        """Parts whose neutral value is one half."""
        return sum(1 for n in self[:3] if n)

    def split(self, coefficients: Tensor) -> ODCoefficients:
        """[B, total] -> the parts."""
        pieces = iter(coefficients.split([n for n in self if n], dim=1))
        return ODCoefficients(*(next(pieces) if n else None for n in self))


class ODRouter(Tempered, Router):
    """ODConv's attention: GAP, linear, norm, ReLU, then a linear head for each part.

    Sigmoids of z / temperature over input channels, output channels and taps, a softmax of z / temperature over
    kernels; the coefficients are [B, I + O + taps + K] in this order, without the parts that the layer does not have.

    Source: arXiv 2209.07947, section 3.2; github.com/OSVAI/ODConv.
    """

    def __init__(
        self,
        in_channels: int,
        hidden: int,
        sizes: ODSizes,
        *,
        temperature: float = 1.0,
        norm: str = "batch",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(temperature, device=device)
        _checks.one_of("norm", norm, NORMS)
        made = {"device": device, "dtype": dtype}
        self.sizes = sizes
        self.trunk = nn.Linear(in_channels, hidden, bias=False, **made)
        kinds = {"batch": BranchNorm, "layer": nn.LayerNorm}
        self.norm = kinds[norm](hidden, **made) if norm in kinds else nn.Identity()
        for part, width in sizes._asdict().items():
            setattr(self, part, nn.Linear(hidden, width, **made) if width else None)

    def coefficients(self, pooled: Tensor) -> Tensor:
        """[B, C] -> [B, I + O + taps + K]."""
        hidden = F.relu(self.norm(self.trunk(pooled)))
        temperature = self.temperature.to(hidden.dtype)
        parts = [
            torch.sigmoid(head(hidden) / temperature)
            for head in (self.channel, self.filter, self.spatial)
            if head is not None
        ]
        if self.kernel is not None:
            parts.append(torch.softmax(self.kernel(hidden) / temperature, dim=1))
        return torch.cat(parts, dim=1)

    def reset_parameters(self) -> None:
        """As released: normal with variance 2 / fan out, head biases zero."""
        for linear in (self.trunk, self.channel, self.filter, self.spatial, self.kernel):
            if linear is not None:
                nn.init.normal_(linear.weight, 0.0, math.sqrt(2 / linear.out_features))
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)

    def make_neutral_(self) -> None:
        """Every sigmoid one half, whatever the input and the temperature; the softmax stays as it is."""
        for head in (self.channel, self.filter, self.spatial):
            if head is not None:
                nn.init.zeros_(head.weight)
                nn.init.zeros_(head.bias)

    def fold_own_norms_(self) -> None:
        """Absorb the batch norm, as it is in evaluation mode, into the trunk, exactly."""
        if not isinstance(self.norm, _BatchNorm):
            return
        scale, shift = norm_scale_and_shift(self.norm)
        with torch.no_grad():
            self.trunk.weight.mul_(scale[:, None])
            bias = shift if self.trunk.bias is None else self.trunk.bias * scale + shift
        self.trunk.bias = nn.Parameter(bias.detach().clone())
        self.norm = nn.Identity()
