"""Batch norm inside a small predictor or residual, where a training batch may hold one value a channel."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dynaconv.nn.dynamic_conv import norm_scale_and_shift
from dynaconv.ops.channel_fusion import Affine


class BranchNorm(_BatchNorm):
    """Batch norm over x [B, C, ...] that trains at batch size 1.

    Where training offers a single value a channel there is no variance to normalise by, and `nn.BatchNorm1d`
    raises; this layer then normalises by its running statistics and leaves them as they are.

    >>> import torch
    >>> BranchNorm(4).train()(torch.ones(1, 4)).shape
    torch.Size([1, 4])
    """

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"BranchNorm expects x [B, C, ...], got {list(x.shape)}; add the missing axis")

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, ...] -> the same shape."""
        if self.training and self.track_running_stats and x.numel() == x.shape[1]:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        return super().forward(x)


class Shift(nn.Module):
    """What a batch norm leaves behind when its scale went into the linear map before it: `x + bias`, x [B, C, ...]."""

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, ...] -> the same shape."""
        return x + self.bias.to(x.dtype).reshape(-1, *(1 for _ in x.shape[2:]))


def affine(norm: nn.Module) -> Affine:
    """What a norm does in evaluation mode, for `dynaconv.ops.channel_fusion`."""
    if isinstance(norm, Shift):
        return Affine(None, norm.bias)
    return Affine(*norm_scale_and_shift(norm)) if isinstance(norm, _BatchNorm) else Affine()
