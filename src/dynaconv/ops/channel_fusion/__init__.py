"""Dynamic channel fusion: a static convolution, scaled, plus a small dynamic matrix between two projections."""

from dynaconv.ops.channel_fusion.api import (
    FORMS,
    Affine,
    channel_fusion,
    cheaper_form,
    factored_macs,
    folded_macs,
    fused_kernels,
)

__all__ = [
    "FORMS",
    "Affine",
    "channel_fusion",
    "cheaper_form",
    "factored_macs",
    "folded_macs",
    "fused_kernels",
]
