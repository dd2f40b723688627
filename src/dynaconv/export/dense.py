"""Masked blocks that compute densely: the product with the mask in the layout that runtimes convolve in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dynaconv.export.branches import Branch
from dynaconv.export.gates import BLOCK, GateLogits, find_gates, tap_weights
from dynaconv.export.graph import Writer, attribute, constant

# Steep enough that a logit one rounding off its threshold is closed or open, and finite for any logit.
STEEP = 1e20
_FURTHEST = 1e18
_AT_THRESHOLD = {"Greater": 0.0, "GreaterOrEqual": 1.0}


@dataclass(eq=False)
class Decision:
    """A gate with a constant threshold; `mask` is what it decides and `at_threshold` what it decides there."""

    gate: GateLogits
    mask: Any
    threshold: float
    at_threshold: float


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


def decide_everywhere(graph: Any, branches: list[Branch]) -> list[Branch]:
    """Let gates with constant thresholds decide for all channels at once, where only dense blocks read the mask.

    Everything from the scored map to the product with the mask is a convolution, a global mean or one of their
    activations, so nothing leaves the layout of runtimes: a comparison would. A step of height 1 that is steeper than
    any rounding stands for it.

    Returns:
        The branches that are served; their masks have all channels.
    """
    served: list[Branch] = []
    for gate in find_gates(graph):
        decision = _decision(gate)
        if decision is None:
            continue
        readers = [branch for branch in branches if branch.mask is decision.mask]
        shapes = {
            tuple(map(str, b.product.outputs[0].shape or ())): b.product.outputs[0].shape for b in readers
        }
        if (
            len(shapes) == 1
            and len(decision.mask.uses()) == len(readers)
            and _can_serve(gate, *shapes.values())
        ):
            _write_decision(graph, decision, readers, *shapes.values())
            served += readers
    return served


def _decision(gate: GateLogits) -> Decision | None:
    logits = gate.node.outputs[0]
    compare = _reader(logits, 0)
    if compare is None or compare.op_type not in _AT_THRESHOLD:
        return None
    threshold, cast = constant(compare.inputs[1]), _reader(compare.outputs[0], 0)
    if threshold is None or threshold.size != 1 or cast is None or cast.op_type != "Cast":
        return None
    mask = cast.outputs[0]
    if attribute(cast, "to") != 1 or mask.shape is None or len(mask.shape) != 4 or mask.shape[1] != 1:
        return None
    return Decision(gate, mask, float(threshold.reshape(-1)[0]), _AT_THRESHOLD[compare.op_type])


def _reader(value: Any, place: int) -> Any:
    """The only node that reads a value, as its input at `place`, or None."""
    uses = value.uses()
    alone = len(uses) == 1 and uses[0].idx == place and not value.is_graph_output()
    return uses[0].node if alone else None


def _can_serve(gate: GateLogits, shape: Any) -> bool:
    """The grid of the logits is that of the product; where a mean is spread over it, its size is known."""
    logits = gate.node.outputs[0].shape
    if len(shape) != 4 or not isinstance(shape[1], int) or logits is None:
        return False
    return gate.linear is None or all(isinstance(d, int) for d in logits[2:])


def _write_decision(graph: Any, decision: Decision, readers: list[Branch], shape: Any) -> None:
    """Masks [N, C, h, w] for the products, and their first channel for whoever else asks, such as reports."""
    gate, write = decision.gate, Writer(graph, decision.gate.node)
    taps, bias = _shifted_taps(write, gate)
    offset = np.clip(bias - decision.threshold, -_FURTHEST, _FURTHEST)
    ones = write.constant(np.ones((shape[1], BLOCK, 1, 1), np.float32))
    offsets = write.constant(np.full(shape[1], offset, np.float32))
    logits = write("Conv", taps, ones, offsets, kernel_shape=(1, 1), shape=shape)
    full = write("HardSigmoid", logits, alpha=STEEP, beta=decision.at_threshold, like=logits)
    first = write("Slice", full, *map(write.integers, (0, 1, 1)), like=decision.mask)
    for branch in readers:
        place = next(i for i, value in enumerate(branch.product.inputs) if value is decision.mask)
        branch.product.replace_input_with(place, full)
    decision.mask.replace_all_uses_with(first, replace_graph_outputs=True)


def _shifted_taps(write: Writer, gate: GateLogits) -> tuple[Any, float]:
    """Maps [N, BLOCK, h, w] whose sum over channels, plus the number, makes the logits.

    The mean of every channel is added to it, because one addition within the convolution can do that; the channel
    behind those of the taps takes off again what that adds too much.
    """
    stage, weight = gate.stage, np.zeros((BLOCK, gate.stage.weight.shape[1], 1, 1), np.float32)
    taps, bias = tap_weights(stage)
    count = taps.shape[1]
    weight[:count, :, 0, 0] = taps.T
    if gate.linear is not None:
        weight[count, :, 0, 0] = gate.linear - taps.sum(1)
    answers = write("Conv", gate.source, write.constant(weight), kernel_shape=(1, 1))
    shifts = np.zeros((BLOCK, 1, *stage.kernel), np.float32)
    shifts[np.arange(count), 0, np.arange(count) // stage.kernel[1], np.arange(count) % stage.kernel[1]] = 1
    shifted = write(
        "Conv", answers, write.constant(shifts), kernel_shape=stage.kernel, strides=stage.stride, pads=stage.pads,
        dilations=stage.dilation, group=BLOCK,
    )  # fmt: skip
    if gate.linear is None:
        return shifted, bias
    size = np.array([1, 1, *gate.node.outputs[0].shape[2:]], np.float32)
    mean = write(
        "Resize", write("GlobalAveragePool", answers), None, write.constant(size), mode="nearest",
        coordinate_transformation_mode="asymmetric", nearest_mode="floor",
    )  # fmt: skip
    return write("Add", shifted, mean), bias + gate.shift


__all__ = ["decide_everywhere", "spread_masks"]
