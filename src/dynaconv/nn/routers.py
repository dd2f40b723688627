"""Predictors of coefficients: from the mean over positions of a feature map to one number per expert."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaconv import _checks
from dynaconv.nn.temperature import Tempered
from dynaconv.ops.dynamic_conv2d.reference import full_precision


def pool_active(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of x [B, C, *size] over positions -> [B, C], in float32 under autocast.

    Args:
        mask: [B, 1, *size] of 0 and 1; only open positions count. An image without any gives zeros.
    """
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        x = x.float()
    x = x.flatten(2)
    if mask is None:
        return x.mean(2)
    mask = mask.to(x.dtype).flatten(2)
    return (x * mask).sum(2) / mask.sum(2).clamp(min=1)


def hard_gate(z: Tensor) -> Tensor:
    """h(z) = relu6(z + 3) / 3: in [0, 2], and 1 at 0. Source: DCD, arXiv 2103.08756, released code."""
    return F.relu6(z + 3) / 3


class Router(nn.Module):
    """Base class: pools its input and predicts coefficients in its own precision, also under autocast."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [B, C, *size] (mask [B, 1, *size]) -> coefficients."""
        return self.decide(x, pool_active(x, mask))

    def decide(self, x: Tensor, pooled: Tensor) -> Tensor:
        """Coefficients for x from what was pooled of it, without autocast."""
        if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
            pooled = pooled.to(next(self.parameters()).dtype)
        with full_precision(x):
            return self.coefficients(pooled)

    def coefficients(self, pooled: Tensor) -> Tensor:
        """Coefficients from the pooled input [B, C]."""
        raise TypeError(f"{type(self).__name__} must implement coefficients(pooled)")

    @property
    def macs(self) -> int:
        """Multiply-adds of one decision: its linear layers."""
        return sum(m.in_features * m.out_features for m in self.modules() if isinstance(m, nn.Linear))


class SigmoidRouter(Router):
    """CondConv's router: r = sigmoid(R * GAP(x) + b), [B, K], not normalised.

    Source: arXiv 1904.04971, equation 2.
    """

    def __init__(self, in_channels: int, num_experts: int, *, device=None, dtype=None) -> None:
        super().__init__()
        self.fc = nn.Linear(in_channels, num_experts, device=device, dtype=dtype)

    def coefficients(self, pooled: Tensor) -> Tensor:
        """[B, C] -> [B, K], each in (0, 1)."""
        return torch.sigmoid(self.fc(pooled))

    def make_neutral_(self) -> None:
        """Every coefficient one half, whatever the input."""
        nn.init.zeros_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)


class SoftmaxRouter(Tempered, Router):
    """DY-Conv's attention: softmax(FC2(relu(FC1(GAP(x)))) / temperature), [B, K], sums to one.

    Source: arXiv 1912.03458, equation 2 and figure 3; both linear layers have a bias.
    """

    def __init__(
        self, in_channels: int, hidden: int, num_kernels: int, temperature: float, *, device=None, dtype=None
    ) -> None:
        super().__init__(temperature, device=device)
        self.fc1 = nn.Linear(in_channels, hidden, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, num_kernels, device=device, dtype=dtype)

    def coefficients(self, pooled: Tensor) -> Tensor:
        """[B, C] -> [B, K], rows sum to one."""
        z = self.fc2(F.relu(self.fc1(pooled)))
        return torch.softmax(z / self.temperature.to(z.dtype), dim=1)


class ChannelRouter(Router):
    """DyNet's predictor: sigmoid of one linear layer (or two with a ReLU between), for several layers at once.

    Args:
        sizes: output channels of each layer that it serves; every one of them has `group_size` coefficients.
        hidden: width between two linear layers; None for one.
    Source: OpenReview SyeZIkrKwS, section 3.2. With one layer the output is [B, O, g_t], else a tuple of them.
    """

    def __init__(
        self,
        in_channels: int,
        sizes: Sequence[int],
        group_size: int,
        hidden: int | None = None,
        *,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if hidden is not None:
            _checks.count("hidden", hidden)
        self.sizes, self.group_size = tuple(sizes), group_size
        self.fc1 = None if hidden is None else nn.Linear(in_channels, hidden, device=device, dtype=dtype)
        total = sum(self.sizes) * group_size
        self.fc = nn.Linear(in_channels if hidden is None else hidden, total, device=device, dtype=dtype)

    def coefficients(self, pooled: Tensor) -> Tensor | tuple[Tensor, ...]:
        """[B, C] -> [B, O, g_t] for each layer."""
        if self.fc1 is not None:
            pooled = F.relu(self.fc1(pooled))
        eta = torch.sigmoid(self.fc(pooled)).unflatten(1, (-1, self.group_size))
        return eta if len(self.sizes) == 1 else eta.split(self.sizes, dim=1)

    def make_neutral_(self) -> None:
        """Every coefficient one half, whatever the input."""
        nn.init.zeros_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)
