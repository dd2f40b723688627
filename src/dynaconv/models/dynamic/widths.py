"""Channel counts of the mobile families, and their rounding."""

from __future__ import annotations

# (expansion, channels, repeats, stride) of each row, arXiv 1801.04381, table 2.
MOBILENET_V2_ROWS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)

# Stage widths by multiplier in percent, arXiv 1807.11164, table 5; the last convolution has 1024 (2048) channels.
SHUFFLENET_V2_WIDTHS = {50: (48, 96, 192), 100: (116, 232, 464), 150: (176, 352, 704), 200: (244, 488, 976)}

# What WeightNet leaves of them to keep the cost (megvii-model/WeightNet).
WEIGHTNET_WIDTHS = {50: (48, 96, 192), 100: (112, 224, 448), 150: (176, 352, 704), 200: (248, 496, 992)}


def make_divisible(value: float, divisor: int = 8) -> int:
    """The nearest multiple of `divisor` that is not below 0.9 * value (at least `divisor`).

    >>> make_divisible(0.35 * 32), make_divisible(0.75 * 24)
    (16, 24)
    """
    near = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return near + divisor if near < 0.9 * value else near


def round_up(value: int, divisor: int) -> int:
    """The smallest multiple of `divisor` that is not below `value`."""
    return -(-value // divisor) * divisor
