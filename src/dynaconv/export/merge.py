"""The pass that makes one convolution of a sum of convolutions of one map, as RepVGG's deployment does.

Source: arXiv 2101.03697, section 3.3.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dynaconv.export.branches import is_static_conv
from dynaconv.export.graph import attribute, constant, initializer, only_user
from dynaconv.nn._fold import kernel_within


def merge_parallel(graph: Any) -> None:
    """Sums of static convolutions whose taps fit one kernel."""
    for node in list(graph):
        pair = [v.producer() for v in node.inputs] if node.op_type == "Add" else []
        alone = all(_is_plain(conv) and only_user(conv.outputs[0]) is node for conv in pair)
        if len(pair) != 2 or not alone or pair[0] is pair[1] or not _alike(*pair):
            continue
        narrow, wide = sorted(pair, key=lambda conv: constant(conv.inputs[1]).size)
        laid = _laid_within(narrow, wide)
        if laid is None:
            continue
        weight = (constant(wide.inputs[1]) + laid).astype(np.float32)
        bias = (_bias(wide).astype(np.float64) + _bias(narrow)).astype(np.float32)
        wide.resize_inputs(3)
        wide.replace_input_with(1, initializer(graph, weight, wide.inputs[1].name))
        wide.replace_input_with(2, initializer(graph, bias, "bias"))
        node.outputs[0].replace_all_uses_with(wide.outputs[0], replace_graph_outputs=True)
        graph.remove([node, narrow], safe=True)


def _is_plain(conv: Any) -> bool:
    """A convolution with constant weights and numeric padding, without dilation."""
    return is_static_conv(conv) and set(attribute(conv, "dilations", (1, 1))) == {1}


def _alike(a: Any, b: Any) -> bool:
    """Two convolutions read the same map at the same stride."""
    return a.inputs[0] is b.inputs[0] and attribute(a, "strides", (1, 1)) == attribute(b, "strides", (1, 1))


def _laid_within(narrow: Any, wide: Any) -> np.ndarray | None:
    """The kernel of a convolution in the shape of another's, or None where results or taps would not be the same."""
    small, large = (constant(conv.inputs[1]) for conv in (narrow, wide))
    pads = [tuple(attribute(conv, "pads", (0, 0, 0, 0))) for conv in (narrow, wide)]
    extents = [
        [k - begin - end for k, begin, end in zip(array.shape[2:], pad[:2], pad[2:], strict=True)]
        for array, pad in zip((small, large), pads, strict=True)
    ]
    if extents[0] != extents[1]:
        return None
    groups = [attribute(conv, "group", 1) for conv in (narrow, wide)]
    laid = kernel_within(torch.from_numpy(small), groups[0], pads[0][:2], large.shape, groups[1], pads[1][:2])
    return None if laid is None else laid.numpy()


def _bias(conv: Any) -> np.ndarray:
    bias = conv.inputs[2] if len(conv.inputs) > 2 else None
    return np.zeros(constant(conv.inputs[1]).shape[0], np.float32) if bias is None else constant(bias)
