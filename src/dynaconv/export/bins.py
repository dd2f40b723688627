"""Means over the parts of a map, bins along each axis, as adaptive pooling takes them; also of listed rows.

A bin i of b along an axis of size s begins at floor(i s / b) and ends before ceil((i + 1) s / b).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dynaconv.export import tables
from dynaconv.export.graph import attribute
from dynaconv.export.own import BINNED, known_by_name


def adaptive_pool(x: Tensor, output_size: list[int]) -> Tensor:
    """`aten.adaptive_avg_pool2d` for graphs of any size: PyTorch's own keeps the windows of the example's size."""
    bins = tuple(output_size)
    size = tuple(x.shape[2:])
    if bins == (1, 1):
        return x.mean((2, 3), keepdim=True)
    if all(isinstance(s, int) and s % b == 0 for s, b in zip(size, bins, strict=True)):
        window = tuple(s // b for s, b in zip(size, bins, strict=True))
        y = F.avg_pool2d(x, window, window)
    else:
        rows, columns = (_axis(s, b, x) for s, b in zip(size, bins, strict=True))
        shares = (rows[:, None, :, None] * columns[None, :, None, :]).flatten(0, 1).flatten(1)
        y = torch.matmul(x.flatten(2), shares.t()).unflatten(2, bins)
    return known_by_name(BINNED, (x,), y, {"bins": list(bins)})


def _axis(size: Any, bins: int, like: Tensor) -> Tensor:
    """The share that each place along an axis has in each bin's mean, [bins, size]."""
    i = torch.arange(bins, device=like.device)[:, None]
    start, end = i * size // bins, ((i + 1) * size + bins - 1) // bins
    at = torch.arange(size, device=like.device)
    return ((at >= start) & (at < end)).to(like.dtype) / (end - start)


def bins_of(node: Any) -> tuple[int, int]:
    """Along each axis, of a node that takes means; (1, 1) of any but `BINNED`."""
    return tuple(attribute(node, "bins", (1, 1)))


def shares(write: Any, grid: tables.Grid, bins: tuple[int, int]) -> Any:
    """The share that each position of a map has in each bin's mean, [h * w, bins]."""
    sizes = grid.height, grid.width
    if grid.fixed:
        rows, columns = (_axis(s, b, torch.empty(0)).numpy() for s, b in zip(sizes, bins, strict=True))
        whole = rows[:, None, :, None] * columns[None, :, None, :]
        return write.constant(np.ascontiguousarray(whole.reshape(int(np.prod(bins)), -1).T))
    rows, columns = (_free_axis(write, s, b) for s, b in zip(sizes, bins, strict=True))
    rows = write("Unsqueeze", rows, write.integers(1, 3))
    whole = write("Mul", rows, write("Unsqueeze", columns, write.integers(0, 2)))
    return write("Reshape", whole, write.integers(-1, int(np.prod(bins))))


def _free_axis(write: Any, size: Any, bins: int) -> Any:
    """`_axis` for a size that is a value [1] or a number, turned: [size, bins]."""
    i = np.arange(bins)
    length = tables.length(write, size)

    def bound(first: np.ndarray, more: int) -> Any:
        scaled = write("Add", write("Mul", write.constant(first), length), write.integers(more))
        return write("Div", scaled, write.integers(bins))

    start, end = bound(i, 0), bound(i + 1, bins - 1)
    at = write("Unsqueeze", tables.count(write, size), write.integers(1))
    inside = write("And", write("GreaterOrEqual", at, start), write("Less", at, end))
    return write("Div", write("Cast", inside, to=1), write("Cast", write("Sub", end, start), to=1))
