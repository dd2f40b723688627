"""Nodes of our own: layers that are known by name in the graph until they are lowered.

Such a node stands beside the operations that compute its result densely, and the last of its inputs is that result. The
sparse lowering takes the other inputs; anything else takes the dense result. No such node is left in a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dynaconv.ops.dynamic_conv2d.geometry import ConvGeometry

# A convolution with a kernel for each image, of (x, kernels, experts, routing, taps, y); see `computed`.
COMPUTED = "ComputedConv"
# A convolution with dynamic channel fusion, of (x, weight, bias, q, p, scale, fusion, four of norms, y); see `fused`.
FUSED = "FusedConv"
# Means over the parts of a map, of (x, y); see `bins`.
BINNED = "BinnedMean"


def known_by_name(
    kind: str, inputs: Sequence[Tensor | None], y: Tensor, attributes: Mapping[str, Any]
) -> Tensor:
    """The result of a node of our own, computed densely as y."""
    return torch.onnx.ops.symbolic(
        f"dynaconv::{kind}", (*inputs, y), dict(attributes), dtype=y.dtype, shape=y.shape, version=1
    )


def geometry_attributes(geometry: ConvGeometry) -> dict[str, Any]:
    """As a Conv has them."""
    return {
        "strides": list(geometry.stride),
        "pads": [*geometry.padding, *geometry.padding],
        "dilations": list(geometry.dilation),
        "group": geometry.groups,
    }


def write_densely(graph: Any, keep: Iterable[Any] = ()) -> None:
    """Let every node of our own be what computes it densely, apart from those to keep."""
    kept = set(keep)
    for node in list(graph):
        if node.op_type in (COMPUTED, FUSED, BINNED) and node not in kept:
            node.outputs[0].replace_all_uses_with(node.inputs[-1], replace_graph_outputs=True)
            graph.remove(node, safe=True)
