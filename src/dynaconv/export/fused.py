"""Dynamic channel fusion of listed rows: Lambda (W0 x + b) + P (norm2(Phi u) + u), where u = norm1(Q x).

In the graph a node `FusedConv` of our own, see `own`. W0 is a convolution like any other. Between Q and P a row holds
L numbers, and no row gets a matrix of its own: as many rows of each image as the fullest has make one batched product
with Phi. Source: DCD, arXiv 2103.08756, equation 6.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from dynaconv.export.graph import ir_tensor
from dynaconv.export.own import FUSED, geometry_attributes, known_by_name
from dynaconv.export.parts import FusedStage
from dynaconv.export.regions import rows_of_images
from dynaconv.export.slots import image_slots
from dynaconv.export.tables import Grid
from dynaconv.ops.channel_fusion.reference import Affine, factored
from dynaconv.ops.dynamic_conv2d.geometry import ConvGeometry


def of_any_batch(
    x: Tensor, weight: Tensor, bias, q: Tensor, p: Tensor, scale: Tensor, fusion: Tensor, scale1, shift1, scale2,
    shift2, stride, padding, dilation, groups,
) -> Tensor:  # fmt: skip
    """A convolution with dynamic channel fusion, by the name `FUSED`."""
    geometry = ConvGeometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    norms = Affine(scale1, shift1), Affine(scale2, shift2)
    y = factored(x, weight, bias, q, p, scale, fusion, geometry, norms)
    parts = (x, weight, bias, q, p, scale, fusion, scale1, shift1, scale2, shift2)
    return known_by_name(FUSED, parts, y, geometry_attributes(geometry))


class CentreTap(NamedTuple):
    """The window of what Q reads: a convolution's middle tap, on the same grid of outputs."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    pads: tuple[int, int, int, int]


def centre_tap(stage: FusedStage) -> CentreTap:
    """Of a convolution; pads below zero leave out what lies before the first centre."""
    before = [p - k // 2 * d for p, k, d in zip(stage.pads, stage.kernel, stage.dilation, strict=False)]
    after = [
        p - (k - 1 - k // 2) * d for p, k, d in zip(stage.pads[2:], stage.kernel, stage.dilation, strict=True)
    ]
    return CentreTap((1, 1), stage.stride, (1, 1), (*before, *after))


def fuse(lowering: Any, stage: FusedStage, y: Any, centres: Any, places: Any, need: Any, grid: Grid) -> Any:
    """Rows [K, O] of the layer.

    Args:
        lowering: the `Rows` in work. y: rows [K, O] of W0 x + b. centres: rows [K, C] of what the centre taps read.
            places: [K, 1] of the rows. need: the mask that lists them. grid: of the output.
    """
    write, (scale1, shift1) = lowering.write, stage.norms[0]
    q = stage.q if scale1 is None else stage.q * scale1[:, None]
    shift = [] if shift1 is None else [write.constant(shift1)]
    u = write("Gemm", centres, write.constant(q.T, "q"), *shift)
    fused = _of_each_image(lowering, stage, u, places, need, grid)
    shift2 = stage.norms[1][1]
    shift = [] if shift2 is None else [write.constant(stage.p @ shift2)]
    scaled = write("Mul", y, rows_of_images(lowering, stage.scale, len(stage.p), places, need, grid))
    return write("Add", scaled, write("Gemm", fused, write.constant(stage.p.T, "p"), *shift))


def _of_each_image(lowering: Any, stage: FusedStage, u: Any, places: Any, need: Any, grid: Grid) -> Any:
    """Rows u [K, L] times scale2 * Phi + I of each row's image."""
    write, latent, scale2 = lowering.write, len(stage.q), stage.norms[1][0]
    matrix = write("Transpose", stage.fusion, perm=(0, 2, 1))
    matrix = matrix if scale2 is None else write("Mul", matrix, write.constant(scale2))
    matrix = write("Add", matrix, write.constant(np.eye(latent, dtype=np.float32)))
    if stage.fusion.shape[0] == 1:
        return write("MatMul", u, write("Reshape", matrix, write.integers(latent, latent)))
    order = image_slots(lowering, places, need, grid)
    length = write("Concat", write("Shape", order.places, start=0, end=1), write.integers(latent), axis=0)
    free = write("ConstantOfShape", length, value=ir_tensor(np.zeros(1, np.float32)))
    shape = write("Concat", write.integers(-1), order.most, write.integers(latent), axis=0)
    whole = write("Reshape", write("ScatterND", free, order.rows, u), shape)
    product = write("Reshape", write("MatMul", whole, matrix), write.integers(-1, latent))
    return write("GatherND", product, order.rows)
