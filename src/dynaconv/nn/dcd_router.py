"""DCD's predictor of scale and fusion matrix, and the published rules for its sizes (arXiv 2103.08756)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaconv import _checks
from dynaconv.nn.routers import Router, hard_gate, pool_active

RULES = ("mobilenetv2", "resnet_basic", "resnet_bottleneck")
_POOLS = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)


class DCDSizes(NamedTuple):
    """Widths of a dynamic channel fusion: L, s, and the bins of the predictor's pool along each axis."""

    latent_channels: int
    squeeze_channels: int
    pool_size: int


def dcd_sizes(
    in_channels: int,
    out_channels: int,
    *,
    rule: str = "mobilenetv2",
    fc_squeeze: int = 16,
    dims: int = 2,
    latent_channels: int | None = None,
    squeeze_channels: int | None = None,
    pool_size: int | None = None,
) -> DCDSizes:
    """The sizes that the released networks use; what is given is kept, and the rest follows from it.

    Args:
        rule: "mobilenetv2" (1x1 expansion where in_channels < out_channels, else projection), "resnet_basic" or
            "resnet_bottleneck".
        fc_squeeze: what s is divided by (16 in the ResNets and MobileNetV2 x1.0).
        dims: axes of the feature map; the pool has m = pool_size ** dims bins.
    Raises:
        ValueError: unknown rule, or a size below 1.
    Source: github.com/liyunsheng13/dcd.

    >>> dcd_sizes(960, 320)
    DCDSizes(latent_channels=40, squeeze_channels=100, pool_size=1)
    >>> dcd_sizes(64, 64, rule="resnet_basic")
    DCDSizes(latent_channels=16, squeeze_channels=16, pool_size=2)
    """
    _checks.one_of("rule", rule, RULES)
    _checks.count("fc_squeeze", fc_squeeze)
    given = {"latent_channels": latent_channels, "squeeze_channels": squeeze_channels, "pool_size": pool_size}
    for name, value in given.items():
        if value is not None:
            _checks.count(name, value)
    wide = rule == "resnet_basic" or (rule == "mobilenetv2" and in_channels < out_channels)
    pool = pool_size or (2 if wide else 1)
    pooled = in_channels * pool**dims
    latent = latent_channels or _latent(rule, in_channels, out_channels, pooled)
    least = 1 if rule == "resnet_bottleneck" else 4
    return DCDSizes(latent, squeeze_channels or max(max(pooled, latent**2) // fc_squeeze, least), pool)


def _latent(rule: str, in_channels: int, out_channels: int, pooled: int) -> int:
    if rule != "mobilenetv2":
        return max(math.isqrt(pooled), 1)
    reduction = 8 if in_channels < out_channels else 2
    latent = min(pooled // reduction, out_channels // reduction)
    while latent**2 > 2 * pooled:
        reduction *= 2
        latent = min(pooled // reduction, out_channels // reduction)
    return max(latent, 4)


def pool_bins(x: Tensor, bins: int, mask: Tensor | None = None) -> Tensor:
    """Adaptive average of x [B, C, *size] over `bins` parts of each axis -> [B, C * bins ** axes], channel-major.

    In float32 under autocast.

    Args:
        mask: [B, 1, *size] of 0 and 1; only open positions count, and a bin without any gives zeros.
    """
    if bins == 1:
        return pool_active(x, mask)
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        x = x.float()
    pool = _POOLS[x.dim() - 3]
    if mask is None:
        return pool(x, bins).flatten(1)
    mask = mask.to(x.dtype)
    density = pool(mask, bins)
    return (pool(x * mask, bins) / torch.where(density > 0, density, 1)).flatten(1)


class DCDRouter(Router):
    """Lambda = h(E_Lambda v) and Phi = E_Phi v, where v <- A pool(x), then v <- v * h(G v); no biases.

    The coefficients are [B, O + L * L]: Lambda, then Phi by rows.

    Source: github.com/liyunsheng13/dcd; h is `hard_gate`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, sizes: DCDSizes, dims: int = 2, *, device=None, dtype=None
    ) -> None:
        super().__init__()
        latent, squeezed, self.pool_size = sizes
        made = {"device": device, "dtype": dtype}
        self.squeeze = nn.Linear(in_channels * self.pool_size**dims, squeezed, bias=False, **made)
        self.gate = nn.Linear(squeezed, squeezed, bias=False, **made)
        self.scale = nn.Linear(squeezed, out_channels, bias=False, **made)
        self.fusion = nn.Linear(squeezed, latent * latent, bias=False, **made)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [B, C, *size] (mask [B, 1, *size]) -> [B, O + L * L], in float32 under autocast."""
        return self.decide(x, pool_bins(x, self.pool_size, mask))

    def coefficients(self, pooled: Tensor) -> Tensor:
        """[B, m * C] -> [B, O + L * L]."""
        v = self.squeeze(pooled)
        v = v * hard_gate(self.gate(v))
        return torch.cat([hard_gate(self.scale(v)), self.fusion(v)], dim=1)

    def make_neutral_(self) -> None:
        """Lambda one, whatever the input; Phi stays free, since P is zero in a converted layer."""
        nn.init.zeros_(self.scale.weight)
