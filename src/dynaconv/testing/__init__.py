"""Public helpers for testing and timing dynamic networks without training them."""

from dynaconv.testing.masks import blob_mask, force_masks, random_mask

__all__ = ["blob_mask", "force_masks", "random_mask"]
