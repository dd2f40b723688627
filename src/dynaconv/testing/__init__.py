"""Public helpers for testing and timing dynamic networks without training them."""

from dynaconv.testing.mask_inputs import MaskInputs, forced
from dynaconv.testing.masks import blob_mask, force_masks, random_mask
from dynaconv.testing.tolerances import TOLERANCES, assert_agree

__all__ = [
    "TOLERANCES",
    "MaskInputs",
    "assert_agree",
    "blob_mask",
    "force_masks",
    "forced",
    "random_mask",
]
