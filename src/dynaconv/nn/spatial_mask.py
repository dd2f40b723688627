"""A spatial mask as a value: which output positions of which images are computed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dynaconv import _checks
from dynaconv.ops.mask_ops import dilate


class SpatialMask(Tensor):
    """A mask [N, 1, h, w] of 0 and 1 that also answers questions about itself.

    It is an ordinary tensor (operations on it return plain tensors) with the field's vocabulary added.

    >>> mask = SpatialMask(torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]]))
    >>> mask.density, mask.active_positions.item(), mask.total_positions
    (0.25, 1.0, 4)
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, mask: Tensor) -> SpatialMask:
        """Wrap a tensor [N, 1, h, w]; bool and integer masks become float32."""
        if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[1] != 1:
            got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"a spatial mask must be a tensor [N, 1, h, w], got {got}")
        return (mask if mask.is_floating_point() else mask.float()).as_subclass(cls)

    @property
    def density(self) -> float:
        """Share of open positions over the whole batch, 0..1."""
        return float(self.detach().float().mean())

    @property
    def densities(self) -> Tensor:
        """Share of open positions of every image, [N]."""
        return self.detach().float().mean((1, 2, 3))

    @property
    def active_positions(self) -> Tensor:
        """Number of open positions over the whole batch (scalar, carries gradient)."""
        return self.sum()

    @property
    def total_positions(self) -> int:
        """Number of positions over the whole batch."""
        return self.numel()

    def dilate(
        self,
        size: tuple[int, int] | None = None,
        *,
        kernel_size=3,
        stride=1,
        padding=1,
        dilation=1,
        gradient: str = "none",
    ) -> SpatialMask:
        """The positions that a convolution with this output mask reads; see `dynaconv.ops.dilate`.

        Args:
            size: the convolution's input grid (H, W); by default this grid times the stride.
        """
        if size is None:
            size = (self.shape[2] * stride, self.shape[3] * stride)
        plain = self.as_subclass(Tensor)
        return SpatialMask(
            dilate(
                plain,
                size,
                kernel_size=kernel_size,
                stride=stride,
                padding=padding,
                dilation=dilation,
                gradient=gradient,
            )
        )

    def resize(self, size: tuple[int, int]) -> SpatialMask:
        """Nearest-neighbour resize to (h, w), so that the mask fits another grid."""
        _checks.positive("mask height", size[0])
        _checks.positive("mask width", size[1])
        return SpatialMask(F.interpolate(self.as_subclass(Tensor), size=tuple(size), mode="nearest"))
