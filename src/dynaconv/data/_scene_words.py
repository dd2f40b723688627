"""Random whole numbers for scenes: one stream of raw PCG64 words per image, the same in every numpy version."""

from __future__ import annotations

import numpy as np


class SceneWords:
    """Raw words of a batch of images, used up one after the other.

    Only `SeedSequence` and `PCG64.random_raw` are used: numpy promises that these streams never change; the methods of
    `Generator` may.

    Args:
        seed, part: choose the family of streams.
        indices: images of the batch; each has its own stream, whatever else is in the batch.
        count: words to draw for each image.
    """

    def __init__(self, seed: int, part: int, indices: range, count: int) -> None:
        rows = [np.random.PCG64(np.random.SeedSequence((seed, part, i))).random_raw(count) for i in indices]
        self._words = np.stack(rows)
        self.used = 0

    def take(self, count: int) -> np.ndarray:
        """The next `count` raw words of every image: uint64 [B, count]."""
        words = self._words[:, self.used : self.used + count]
        assert words.shape[1] == count, "the word budget of a scene is too small"
        self.used += count
        return words

    def integers(self, low: int | np.ndarray, high: int | np.ndarray, count: int) -> np.ndarray:
        """Whole numbers in [low, high), int64 [B, count]; the bounds may be arrays [B, count]."""
        span = np.asarray(high, dtype=np.int64) - np.asarray(low, dtype=np.int64)
        high_half = self.take(count) >> np.uint64(32)
        return ((high_half * span.astype(np.uint64)) >> np.uint64(32)).astype(np.int64) + low

    def bytes(self, count: int) -> np.ndarray:
        """Uniform bytes, uint8 [B, count]; count must be a multiple of 8. Little-endian on every machine."""
        return self.take(count // 8).astype("<u8", copy=True).view(np.uint8)
