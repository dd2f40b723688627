"""The pass that makes one convolution of a sum of convolutions of one map, as RepVGG's deployment does.

A scale and shift of each channel, as a batch norm leaves, counts as a 1 x 1 convolution of each channel (RepGhost).
Source: arXiv 2101.03697, section 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dynaconv.export.graph import attribute, constant, initializer, only_user
from dynaconv.export.parts import channel_constant, is_static_conv
from dynaconv.nn._fold import kernel_within


@dataclass(eq=False)
class _Part:
    """One addend: a convolution of `source`, and the nodes that it stands for, the last first."""

    source: Any
    weight: np.ndarray
    bias: np.ndarray
    groups: int
    stride: tuple[int, int]
    pads: tuple[int, int, int, int]
    nodes: list[Any]

    @property
    def extent(self) -> list[int]:
        """Rows and columns that the output is short of the padded map."""
        begin, end = self.pads[:2], self.pads[2:]
        return [k - b - e for k, b, e in zip(self.weight.shape[2:], begin, end, strict=True)]


def merge_parallel(graph: Any) -> None:
    """Sums of static convolutions whose taps fit one kernel."""
    for node in list(graph):
        values = list(node.inputs) if node.op_type == "Add" else []
        if len(set(values)) != 2 or any(only_user(value) is not node for value in values):
            continue
        parts = [_convolution(value.producer()) or _scaling(value) for value in values]
        if None in parts or not any(part.nodes[0].op_type == "Conv" for part in parts):
            continue
        narrow, wide = sorted(parts, key=lambda part: (part.nodes[0].op_type == "Conv", part.weight.size))
        laid = _laid_within(narrow, wide)
        if laid is None:
            continue
        conv = wide.nodes[0]
        bias = (wide.bias.astype(np.float64) + narrow.bias).astype(np.float32)
        conv.resize_inputs(3)
        conv.replace_input_with(
            1, initializer(graph, (wide.weight + laid).astype(np.float32), conv.inputs[1].name)
        )
        conv.replace_input_with(2, initializer(graph, bias, "bias"))
        node.outputs[0].replace_all_uses_with(conv.outputs[0], replace_graph_outputs=True)
        graph.remove([node, *narrow.nodes], safe=True)


def _convolution(conv: Any) -> _Part | None:
    """A convolution with constant weights and numeric padding, without dilation."""
    if not is_static_conv(conv) or set(attribute(conv, "dilations", (1, 1))) != {1}:
        return None
    weight, bias = constant(conv.inputs[1]), conv.inputs[2] if len(conv.inputs) > 2 else None
    return _Part(
        conv.inputs[0],
        weight,
        np.zeros(len(weight), np.float32) if bias is None else constant(bias),
        attribute(conv, "group", 1),
        tuple(attribute(conv, "strides", (1, 1))),
        tuple(attribute(conv, "pads", (0, 0, 0, 0))),
        [conv],
    )


def _scaling(value: Any) -> _Part | None:
    """Products and sums with a number for each channel, which nobody else reads."""
    scale, shift, nodes = np.float64(1), np.float64(0), []
    while True:
        node = value.producer()
        place = channel_constant(node) if not nodes or only_user(value) is nodes[-1] else None
        if place is None or node.op_type not in ("Mul", "Add"):
            break
        numbers = constant(node.inputs[place]).astype(np.float64).reshape(-1)
        if node.op_type == "Mul":
            scale = scale * numbers
        else:
            shift = shift + scale * numbers
        nodes.append(node)
        value = node.inputs[1 - place]
    if not nodes or value.shape is None or not isinstance(value.shape[1], int):
        return None
    every = np.ones(value.shape[1])
    weight, bias = ((every * part).astype(np.float32) for part in (scale, shift))
    return _Part(value, weight.reshape(-1, 1, 1, 1), bias, len(every), (1, 1), (0, 0, 0, 0), nodes)


def _laid_within(narrow: _Part, wide: _Part) -> np.ndarray | None:
    """The kernel of one addend in the shape of another's, or None where results or taps would not be the same."""
    if narrow.source is not wide.source or narrow.stride != wide.stride or narrow.extent != wide.extent:
        return None
    laid = kernel_within(
        torch.from_numpy(narrow.weight), narrow.groups, narrow.pads[:2], wide.weight.shape, wide.groups, wide.pads[:2]
    )  # fmt: skip
    return None if laid is None else laid.numpy()
