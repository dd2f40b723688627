"""Placing 8x8 sprites on a canvas in whole numbers, so that every machine draws the same picture.

Catmull-Rom weights are rounded to 1/64. Their products with sprite values stay far below 2**24, so float32 products
of them are exact whatever the BLAS does.
"""

from __future__ import annotations

import numpy as np

SPRITE = 8
_STEPS = 64
# A weight of 1 in each direction is 64, so a fully covered sprite cell of value v contributes v * UNIT.
UNIT = _STEPS * _STEPS


def _catmull_rom_table() -> np.ndarray:
    """Weights of the four neighbours for each of the 64 sub-cell positions: int64 [64, 4], every row sums to 64."""
    t = np.arange(_STEPS, dtype=np.int64)
    s = _STEPS
    # Numerators over 2 * 64**3, rounded to the nearest 1/64; the second neighbour takes up what rounding left over.
    before = -(t**3) + 2 * t**2 * s - t * s * s
    after = -3 * t**3 + 4 * t**2 * s + t * s * s
    beyond = t**3 - t**2 * s
    scale = 2 * s * s
    rounded = [(v + scale // 2) // scale for v in (before, after, beyond)]
    here = s - rounded[0] - rounded[1] - rounded[2]
    return np.stack([rounded[0], here, rounded[1], rounded[2]], axis=1)


_TABLE = _catmull_rom_table()


def placement_weights(start: np.ndarray, side: np.ndarray, length: int) -> np.ndarray:
    """Weights that put eight sprite cells on an axis of `length` pixels.

    Args:
        start: int [...] first pixel of the sprite; may be negative.
        side: int [...] pixels that the sprite spans.
        length: pixels of the axis.

    Returns:
        float32 [..., length, 8] of whole numbers; a pixel outside the sprite has zeros.
    """
    pixel = np.arange(length, dtype=np.int64)
    offset = pixel - start[..., None]
    # Centre of the pixel in 1/64 cells, minus half a cell: floor division keeps it exact.
    position = ((2 * offset + 1) * SPRITE * _STEPS) // (2 * side[..., None]) - _STEPS // 2
    base, step = position >> 6, position & (_STEPS - 1)
    cells = np.arange(SPRITE, dtype=np.int64)
    tap = cells - (base[..., None] - 1)
    inside = (tap >= 0) & (tap < 4)
    weights = _TABLE[step[..., None], np.clip(tap, 0, 3)]
    return np.where(inside, weights, 0).astype(np.float32)


def draw_sprites(sprites: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Sum of placed sprites: [B, S, 8, 8], [B, S, H, 8], [B, S, W, 8] -> float32 [B, H, W], value * UNIT."""
    b, s, height, _ = rows.shape
    across = sprites.astype(np.float32) @ columns.transpose(0, 1, 3, 2)
    left = rows.transpose(0, 2, 1, 3).reshape(b, height, s * SPRITE)
    return left @ across.reshape(b, s * SPRITE, -1)
