"""Logits of gates written so that runtimes compute them fast: one product for all taps, then a sum of shifted maps.

Runtimes spend more on a convolution to a single channel than on one to sixteen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dynaconv.export import tables
from dynaconv.export.branches import Stage, is_static_conv
from dynaconv.export.graph import Writer, constant

# Channels come in blocks of this many in the layouts of runtimes.
BLOCK = 16
_COMPARISONS = ("Greater", "GreaterOrEqual")
_RESHAPING = ("Squeeze", "Unsqueeze", "Reshape", "Flatten")


@dataclass(eq=False)
class GateLogits:
    """conv(source) to one channel, plus mean(source) @ linear + shift unless linear is None; `node` makes the sum."""

    node: Any
    stage: Stage
    linear: np.ndarray | None = None
    shift: float = 0.0

    @property
    def source(self) -> Any:
        """The map that is scored."""
        return self.stage.conv.inputs[0]


def find_gates(graph: Any) -> list[GateLogits]:
    """Convolutions to one channel, with the linear function of the mean that is added to them (arXiv 1912.03203)."""
    found = []
    for node in graph:
        if not is_static_conv(node) or node.outputs[0].is_graph_output():
            continue
        stage = Stage(node, [])
        taps = int(np.prod(stage.kernel))
        if (
            stage.weight.shape[0] != 1
            or stage.groups != 1
            or not 1 < taps < BLOCK
            or node.inputs[0].shape is None
        ):
            continue
        found.append(_with_mean(node, stage) or GateLogits(node, stage))
    return found


def _with_mean(node: Any, stage: Stage) -> GateLogits | None:
    uses = node.outputs[0].uses()
    total = uses[0].node if len(uses) == 1 and uses[0].node.op_type == "Add" else None
    if total is None:
        return None
    other = next((v for v in total.inputs if v is not node.outputs[0]), None)
    gemm = _behind(other)
    if gemm is None or gemm.op_type != "Gemm" or gemm.attributes.get_int("transA", 0):
        return None
    if gemm.attributes.get_float("alpha", 1.0) != 1.0 or gemm.attributes.get_float("beta", 1.0) != 1.0:
        return None
    weight = constant(gemm.inputs[1])
    shift = constant(gemm.inputs[2]) if len(gemm.inputs) > 2 and gemm.inputs[2] is not None else np.zeros(1)
    pool = _behind(gemm.inputs[0])
    if weight is None or shift is None or pool is None or pool.op_type != "GlobalAveragePool":
        return None
    if pool.inputs[0] is not node.inputs[0] or weight.size != stage.weight.shape[1] or shift.size != 1:
        return None
    return GateLogits(total, stage, weight.reshape(-1), float(shift.reshape(-1)[0]))


def _behind(value: Any) -> Any:
    """What made a value, apart from changes of its shape."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type in _RESHAPING:
        node = node.inputs[0].producer()
    return node


def write_gate(write: Writer, gate: GateLogits, rows: Any, grid: tables.Grid) -> None:
    """Replace a gate's logits [N, 1, h, w], from the map or, where there are, from its rows [N * H * W, C].

    Where logits are only compared with a threshold, what comes from the mean [N, 1, 1, 1] moves to the other side of
    the comparison, which saves an addition for each position.
    """
    old = gate.node.outputs[0]
    z, mean = _logits(write, gate, rows, grid)
    uses = old.uses()
    compared = len(uses) == 1 and uses[0].node.op_type in _COMPARISONS and uses[0].idx == 0
    if mean is not None and compared and not old.is_graph_output():
        threshold = uses[0].node.inputs[1]
        beside = Writer(write.graph, uses[0].node)
        uses[0].node.replace_input_with(1, beside("Sub", threshold, mean))
    elif mean is not None:
        z = write("Add", z, mean, like=old)
    old.replace_all_uses_with(z, replace_graph_outputs=True)


def tap_weights(stage: Stage) -> tuple[np.ndarray, float]:
    """Of a convolution to one channel: weights [C, taps] and the bias."""
    weight = stage.weight[0]
    return weight.reshape(len(weight), -1), 0.0 if stage.bias is None else float(stage.bias[0])


def _logits(write: Writer, gate: GateLogits, rows: Any, grid: tables.Grid) -> tuple[Any, Any]:
    """What the convolution gives, [N, 1, h, w], and the linear function of the mean, [N, 1, 1, 1] or None."""
    stage, kernel = gate.stage, gate.stage.kernel
    weight, bias = tap_weights(stage)
    taps = weight.shape[1]
    used = taps + (gate.linear is not None)
    if gate.linear is not None:
        weight = np.concatenate([weight, gate.linear[:, None]], 1)
    bias += gate.shift
    if rows is None:
        used = BLOCK
        padded = np.zeros((BLOCK, weight.shape[0], 1, 1), np.float32)
        padded[: weight.shape[1], :, 0, 0] = weight.T
        answers = write("Conv", gate.source, write.constant(padded), kernel_shape=(1, 1))
    else:
        flat = write("MatMul", rows, write.constant(weight))
        answers = write("Reshape", flat, tables.shape_of(write, grid, used))
        answers = write("Transpose", answers, perm=(0, 3, 1, 2))
    shifts = np.zeros((1, used, *kernel), np.float32)
    shifts[0, np.arange(taps), np.arange(taps) // kernel[1], np.arange(taps) % kernel[1]] = 1
    z = write(
        "Conv", answers, write.constant(shifts), write.constant(np.array([bias], np.float32)), kernel_shape=kernel,
        strides=stage.stride, pads=stage.pads, dilations=stage.dilation, like=gate.node.outputs[0],
    )  # fmt: skip
    if gate.linear is None:
        return z, None
    means = write("GlobalAveragePool", answers)
    return z, write("Gather", means, write.integers(taps), axis=1)


def rewrite(graph: Any) -> None:
    """Every gate of a graph that stays dense."""
    constants: dict[Any, Any] = {}
    for gate in find_gates(graph):
        write_gate(Writer(graph, gate.node, constants), gate, None, tables.Grid(None, None, None))
