"""Masked blocks that compute densely: the product with the mask in the layout that runtimes convolve in."""

from __future__ import annotations

from typing import Any

import numpy as np

from dynaconv.export.branches import Branch
from dynaconv.export.graph import Writer


def spread_masks(graph: Any, branches: list[Branch]) -> None:
    """Multiply by masks that have all channels, made by a convolution with ones.

    ONNX Runtime holds maps in blocks of channels between convolutions; a mask of one channel would force it out of that
    layout and back around every product.
    """
    constants: dict[Any, Any] = {}
    spread: dict[Any, Any] = {}
    for branch in branches:
        mask, shape = branch.mask, branch.product.outputs[0].shape
        if shape is None or mask.shape is None or list(mask.shape[2:]) == [1, 1]:
            continue
        key = (mask, shape[1])
        if key not in spread:
            write = Writer(graph, branch.product, constants)
            ones = write.constant(np.ones((shape[1], 1, 1, 1), np.float32))
            spread[key] = write("Conv", mask, ones, kernel_shape=(1, 1), shape=shape)
        place = next(i for i, value in enumerate(branch.product.inputs) if value is mask)
        branch.product.replace_input_with(place, spread[key])


__all__ = ["spread_masks"]
