"""Logits of gates written so that runtimes compute them fast: one product for all taps, then a sum of shifted maps.

Runtimes spend more on a convolution to a single channel than on one to sixteen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dynaconv.export import tables
from dynaconv.export.graph import Writer, constant, only_user
from dynaconv.export.parts import Stage, is_static_conv

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
    """Replace a gate's logits [N, 1, h, w], from the map or, where there are and they fit, its rows [N * H * W, C].

    Where logits are only compared with a threshold, what comes from the mean [N, 1, 1, 1] moves to the other side of
    the comparison, which saves an addition for each position; and a constant threshold moves to this side.
    """
    old = gate.node.outputs[0]
    compare = None if gate.linear is None else _comparison(old)
    threshold = None if compare is None else _number(compare.inputs[1])
    z, minus_mean = _logits(write, gate, rows, grid, threshold or 0.0)
    if compare is not None:
        beside = Writer(write.graph, compare)
        other = minus_mean if threshold is not None else beside("Add", compare.inputs[1], minus_mean)
        compare.replace_input_with(1, other)
    elif minus_mean is not None:
        z = write("Sub", z, minus_mean, like=old)
    old.replace_all_uses_with(z, replace_graph_outputs=True)


def _comparison(logits: Any) -> Any:
    """The comparison that alone reads them, or None."""
    node, uses = only_user(logits), logits.uses()
    return node if node is not None and node.op_type in _COMPARISONS and uses[0].idx == 0 else None


def _number(value: Any) -> float | None:
    """A constant finite number, or None."""
    array = constant(value)
    finite = array is not None and array.size == 1 and np.isfinite(array).all()
    return float(array.reshape(-1)[0]) if finite else None


def tap_weights(stage: Stage) -> tuple[np.ndarray, float]:
    """Of a convolution to one channel: weights [C, taps] and the bias."""
    weight = stage.weight[0]
    return weight.reshape(len(weight), -1), 0.0 if stage.bias is None else float(stage.bias[0])


def _logits(
    write: Writer, gate: GateLogits, rows: Any, grid: tables.Grid, threshold: float
) -> tuple[Any, Any]:
    """What the convolution gives less the threshold, [N, 1, h, w], and minus what comes from the mean, [N, 1, 1, 1].

    The latter is None where nothing does.
    """
    stage = gate.stage
    weight, bias = tap_weights(stage)
    bias = write.constant(np.array([bias + gate.shift - threshold], np.float32))
    if rows is not None and _fits_rows(stage):
        return _from_rows(write, gate, rows, grid, weight, bias)
    kernel, (channels, taps) = stage.kernel, weight.shape
    padded = np.zeros((BLOCK, channels, 1, 1), np.float32)
    padded[:taps, :, 0, 0] = weight.T
    if gate.linear is not None:
        padded[taps, :, 0, 0] = -gate.linear
    answers = write("Conv", gate.source, write.constant(padded), kernel_shape=(1, 1))
    shifts = np.zeros((1, BLOCK, *kernel), np.float32)
    shifts[0, np.arange(taps), np.arange(taps) // kernel[1], np.arange(taps) % kernel[1]] = 1
    z = write(
        "Conv", answers, write.constant(shifts), bias, kernel_shape=kernel, strides=stage.stride, pads=stage.pads,
        dilations=stage.dilation, like=gate.node.outputs[0],
    )  # fmt: skip
    if gate.linear is None:
        return z, None
    means = write("GlobalAveragePool", answers)
    return z, write("Gather", means, write.integers(taps), axis=1)


def _fits_rows(stage: Stage) -> bool:
    """Whether `_from_rows` serves a gate: its paddings would be none below zero."""
    _, left, _, right = stage.pads
    return stage.dilation[1] == 1 and min(left, right) * int(np.prod(stage.kernel)) >= stage.kernel[1]


def _from_rows(
    write: Writer, gate: GateLogits, rows: Any, grid: tables.Grid, weight: np.ndarray, bias: Any
) -> tuple[Any, Any]:
    """`_logits` without a change of layout, by one convolution over all numbers of the rows and one mean of them.

    A position has `width` numbers, one for each tap and one more. Taps are ordered so that the numbers which an output
    adds up lie in their rows of the image at equal distances, and the last number completes the sum of all to what the
    mean is wanted of.
    """
    stage, (high, wide) = gate.stage, gate.stage.kernel
    count = high * wide
    width = count + 1
    # Tap (y, x) is number y * wide + (wide - 1 - x).
    ordered = weight.reshape(-1, high, wide)[:, :, ::-1].reshape(-1, count)
    wanted = 0.0 if gate.linear is None else -width * gate.linear
    numbers = np.concatenate([ordered, (wanted - ordered.sum(1))[:, None]], 1).astype(np.float32)
    flat = write("MatMul", rows, write.constant(numbers))
    across = tables.multiply(write, grid.width, width)
    answers = write("Reshape", flat, tables.shape_of(write, grid, front=(-1, 1, grid.height, across)))
    # Number x * high + y of those that an output reads in line y of its window is tap (y, x); others belong elsewhere.
    adds = np.zeros((1, 1, high, wide, high), np.float32)
    adds[0, 0, np.arange(high), :, np.arange(high)] = 1
    top, left, bottom, right = stage.pads
    z = write(
        "Conv", answers, write.constant(adds.reshape(1, 1, high, count)), bias, kernel_shape=(high, count),
        strides=(stage.stride[0], stage.stride[1] * width), dilations=(stage.dilation[0], wide),
        pads=(top, width * left - wide + 1, bottom, width * right - wide), like=gate.node.outputs[0],
    )  # fmt: skip
    return z, None if gate.linear is None else write("GlobalAveragePool", answers)


def rewrite(graph: Any) -> None:
    """Every gate of a graph that stays dense."""
    constants: dict[Any, Any] = {}
    for gate in find_gates(graph):
        write_gate(Writer(graph, gate.node, constants), gate, None, tables.Grid(None, None, None))
