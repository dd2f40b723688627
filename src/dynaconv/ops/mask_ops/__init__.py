"""Sampling, dilating and resizing binary masks."""

from dynaconv.ops.mask_ops.api import DILATION_GRADIENTS, dilate, gumbel_mask, upsample_mask
from dynaconv.ops.mask_ops.branch import branch_masks, branch_sizes
from dynaconv.ops.mask_ops.cpu import conv3x3_to_one, nine_taps
from dynaconv.ops.mask_ops.logits import mask_logits
from dynaconv.ops.mask_ops.reference import sample_logistic

__all__ = [
    "DILATION_GRADIENTS",
    "branch_masks",
    "branch_sizes",
    "conv3x3_to_one",
    "dilate",
    "gumbel_mask",
    "mask_logits",
    "nine_taps",
    "sample_logistic",
    "upsample_mask",
]
