"""How large the digit of a scene is, and the clutter that resembles it."""

from __future__ import annotations

from dataclasses import dataclass

from dynaconv import _checks

# Mean share of its square sprite that a digit's box covers: the 8x8 pictures leave empty columns at the sides.
FILL = 0.64
# Sprites below eight pixels no longer show eight cells; above, the tallest and widest leaves the canvas.
LEAST_SIDE, LARGEST_SHARE = 8, 0.3


@dataclass(frozen=True)
class ObjectScale:
    """side: of the digit's sprite in pixels, None for mixed sizes around a third of the canvas."""

    side: int | None = None

    def heights(self, size: int) -> tuple[int, int]:
        """Least height of a digit's sprite on a canvas of `size` pixels, and one above the largest."""
        if self.side is None:
            return 26 * size // 96, 40 * size // 96 + 1
        return self.side - self.side // 10, self.side + self.side // 10 + 1

    def clutter(self, size: int, low: int, high: int) -> tuple[int, int]:
        """The same for clutter of `low` to `high` 96ths of a canvas, never larger than beside digits of mixed sizes."""
        if self.side is None or self.side >= 33 * size // 96:
            return low * size // 96, high * size // 96 + 1
        return max(2, low * self.side // 33), max(2, high * self.side // 33) + 1


MIXED = ObjectScale()


def object_scale(image_size: int, share: float | None) -> ObjectScale:
    """The scale at which digits' boxes cover a mean share of a canvas; mixed sizes for None.

    Raises:
        ValueError: a share out of range, or digits of fewer than eight pixels.
    """
    if share is None:
        return MIXED
    if not 0 < share <= LARGEST_SHARE:
        raise _checks.data_object_share(share, LARGEST_SHARE)
    side = round(image_size * (share / FILL) ** 0.5)
    if side < LEAST_SIDE:
        needed = -int(-LEAST_SIDE // (share / FILL) ** 0.5)
        raise _checks.data_small_object(share, image_size, side, needed)
    return ObjectScale(side)
