"""Public helpers for testing and timing dynamic networks without training them."""

from dynaconv.testing.masks import blob_mask, force_masks, random_mask
from dynaconv.testing.tolerances import TOLERANCES, assert_agree

__all__ = ["TOLERANCES", "assert_agree", "blob_mask", "force_masks", "random_mask"]
