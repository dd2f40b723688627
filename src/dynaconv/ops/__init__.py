"""Functions on tensors; one folder an op, each with a readable reference."""

from dynaconv.ops._conv import ACTIVATIONS, ConvSpec
from dynaconv.ops.mask_ops import dilate, gumbel_mask
from dynaconv.ops.masked_conv2d import masked_conv2d
from dynaconv.ops.masked_residual import PackedBranch, masked_residual

__all__ = [
    "ACTIVATIONS",
    "ConvSpec",
    "PackedBranch",
    "dilate",
    "gumbel_mask",
    "masked_conv2d",
    "masked_residual",
]
