"""Grouped convolutions of listed rows: a batch of products, one for each group, or for each image and group."""

from __future__ import annotations

from typing import Any


def of_rows(write: Any, taps: Any, weight: Any, sizes: tuple[int, int, int, int]) -> Any:
    """Rows [K, O] of windows and weights that all images share.

    Args:
        taps: windows [K, taps, C] in any shape. weight: [groups, taps * I, O / groups].
        sizes: taps, groups, I and O, where C = groups * I.
    """
    count, groups, inner, outputs = sizes
    split = write("Reshape", taps, write.integers(-1, count, groups, inner))
    split = write("Transpose", split, perm=(2, 0, 1, 3))
    flat = write("Reshape", split, write.integers(groups, -1, count * inner))
    y = write("Transpose", write("MatMul", flat, weight), perm=(1, 0, 2))
    return write("Reshape", y, write.integers(-1, outputs))


def of_images(write: Any, taps: Any, weight: Any, sizes: tuple[int, int, int, int], most: Any) -> Any:
    """The same with weights for each image: [N, groups, taps * I, O / groups], and `most` [1] windows of each."""
    count, groups, inner, outputs = sizes
    shape = write("Concat", write.integers(-1), most, write.integers(count, groups, inner), axis=0)
    split = write("Transpose", write("Reshape", taps, shape), perm=(0, 3, 1, 2, 4))
    # The windows are what is left, because a Reshape may ask for that along one axis only.
    flat = write("Reshape", split, write.integers(0, groups, -1, count * inner))
    y = write("Transpose", write("MatMul", flat, weight), perm=(0, 2, 1, 3))
    return write("Reshape", y, write.integers(-1, outputs))
