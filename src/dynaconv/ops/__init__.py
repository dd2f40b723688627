"""Functions on tensors; one folder an op, each with a readable reference."""

from dynaconv.ops import _native
from dynaconv.ops._conv import ACTIVATIONS, ConvSpec
from dynaconv.ops._registry import decompositions
from dynaconv.ops.dynamic_conv2d import dynamic_conv2d, mix_kernels, per_sample_conv
from dynaconv.ops.mask_ops import dilate, gumbel_mask, mask_logits
from dynaconv.ops.masked_conv2d import masked_conv2d
from dynaconv.ops.masked_mean import masked_mean
from dynaconv.ops.masked_residual import PackedBranch, masked_residual

__all__ = [
    "ACTIVATIONS",
    "ConvSpec",
    "PackedBranch",
    "decompositions",
    "dilate",
    "dynamic_conv2d",
    "gumbel_mask",
    "mask_logits",
    "masked_conv2d",
    "masked_mean",
    "masked_residual",
    "mix_kernels",
    "per_sample_conv",
]

_native.load_operators()
