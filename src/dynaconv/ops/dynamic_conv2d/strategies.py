"""Five ways to run a convolution whose kernel differs from sample to sample; all give the same values.

B samples, K experts, P weights of one expert: `grouped`, `unfold`, `bmm` and `single` mix B * P weights first and then
do the multiply-adds of a static convolution; `feature` runs K convolutions and mixes what comes out.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from dynaconv.ops.dynamic_conv2d.geometry import ConvGeometry, pad_axes
from dynaconv.ops.dynamic_conv2d.reference import mix_kernels

# Mixed kernels above this many bytes leave the last-level cache and come from fresh memory; then one sample at a
# time is faster (measured, docs/blocks.md).
CHUNK_BYTES = 32 << 20

Kernels = Callable[[slice], Tensor]


def grouped(x: Tensor, kernels: Tensor, geometry: ConvGeometry) -> Tensor:
    """The batch becomes groups: one convolution of [1, B * I, *size] with groups = B * g."""
    b, channels = x.shape[0], x.shape[1]
    folded = x.reshape(1, b * channels, *x.shape[2:])
    y = geometry.convolve(
        folded, kernels.reshape(b * kernels.shape[1], *kernels.shape[2:]), groups=b * geometry.groups
    )
    return y.reshape(b, kernels.shape[1], *y.shape[2:])


def grouped_in_chunks(x: Tensor, weight: Tensor, routing: Tensor, taps, geometry: ConvGeometry) -> Tensor:
    """`grouped` sample by sample where all mixed kernels together would not stay in cache; needs no gradient."""
    kernel_bytes = weight[0].numel() * weight.element_size()
    if kernel_bytes * x.shape[0] <= CHUNK_BYTES:
        return grouped(x, mix_kernels(weight, routing, taps), geometry)
    return torch.cat(
        [
            geometry.convolve(x[i : i + 1], mix_kernels(weight, routing[i : i + 1], _one(taps, i))[0])
            for i in range(x.shape[0])
        ]
    )


def _one(taps: Tensor | None, i: int) -> Tensor | None:
    return None if taps is None else taps[i : i + 1]


def single(x: Tensor, kernels: Tensor, geometry: ConvGeometry) -> Tensor:
    """A batch of one: a plain convolution whose weight was computed."""
    return geometry.convolve(x, kernels[0])


def bmm(x: Tensor, kernels: Tensor, geometry: ConvGeometry) -> Tensor:
    """Kernels of one tap: a batched product over positions; stride by slicing."""
    x = pad_axes(x, geometry.padding, geometry.padding)
    x = x[(..., *(slice(None, None, s) for s in geometry.stride))]
    columns = x.reshape(x.shape[0] * geometry.groups, x.shape[1] // geometry.groups, -1)
    return _product(columns, kernels, x.shape[0], x.shape[2:], geometry.groups)


def unfold(x: Tensor, kernels: Tensor, geometry: ConvGeometry, slices: bool = False) -> Tensor:
    """im2col, then a batched product.

    slices: see `sliced_columns`; so graphs should be written.
    """
    kernel = kernels.shape[3:]
    plain = len(kernel) == 2 and not slices
    columns = _columns_2d(x, kernel, geometry) if plain else sliced_columns(x, kernel, geometry)
    return product_of_columns(columns, x, kernels, geometry)


def product_of_columns(columns: Tensor, x: Tensor, kernels: Tensor, geometry: ConvGeometry) -> Tensor:
    """Columns [B, I * taps, positions] of x times kernels [B, O, I/g, *kernel]."""
    kernel = kernels.shape[3:]
    rows = x.shape[1] * kernel.numel() // geometry.groups
    columns = columns.reshape(x.shape[0] * geometry.groups, rows, -1)
    return _product(columns, kernels, x.shape[0], geometry.output_size(x.shape[2:], kernel), geometry.groups)


def _columns_2d(x: Tensor, kernel, geometry: ConvGeometry) -> Tensor:
    return F.unfold(x, tuple(kernel), geometry.dilation, geometry.padding, geometry.stride)


def sliced_columns(x: Tensor, kernel, geometry: ConvGeometry) -> Tensor:
    """[B, I * taps, positions] for any number of axes, one strided slice a tap.

    `F.unfold` becomes a gather of single numbers in graphs.
    """
    size = geometry.output_size(x.shape[2:], kernel)
    x = pad_axes(x, geometry.padding, geometry.padding)
    slices = []
    for taps in product(*(range(k) for k in kernel)):
        starts = [t * d for t, d in zip(taps, geometry.dilation, strict=True)]
        window = tuple(
            slice(a, a + (n - 1) * s + 1, s) for a, n, s in zip(starts, size, geometry.stride, strict=True)
        )
        slices.append(x[(..., *window)])
    return torch.stack(slices, 2).flatten(1, 2).flatten(2)


def _product(columns: Tensor, kernels: Tensor, batch: int, size, groups: int) -> Tensor:
    """columns [B * g, rows, positions], kernels [B, O, ...] -> [B, O, *size]."""
    out_channels = kernels.shape[1]
    flat = kernels.reshape(batch * groups, out_channels // groups, -1)
    return torch.bmm(flat, columns).reshape(batch, out_channels, *size)


def feature(x: Tensor, weight: Tensor, routing: Tensor, geometry: ConvGeometry) -> Tensor:
    """All experts as one wide convolution, then a weighted sum of what they computed.

    Experts are stacked output channel by output channel: stacked expert by expert, grouped convolutions would read
    other groups' inputs. Source: DyNet's training identity (OpenReview SyeZIkrKwS, equation 2).
    """
    experts, out_channels = weight.shape[:2]
    stacked = weight.transpose(0, 1).reshape(out_channels * experts, *weight.shape[2:])
    y = geometry.convolve(x, stacked)
    y = y.reshape(y.shape[0], out_channels, experts, *y.shape[2:])
    ones = (1,) * (y.dim() - 3)
    shape = (routing.shape[0], 1, experts) if routing.dim() == 2 else tuple(routing.shape)
    return (y * routing.to(y.dtype).reshape(*shape, *ones)).sum(2)


MIXED = {"grouped": grouped, "unfold": unfold, "bmm": bmm, "single": single}
