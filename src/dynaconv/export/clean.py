"""Passes over a traced ONNX graph: constants and batch norm folded, weights laid out for products, dead code out."""

from __future__ import annotations

from typing import Any

import numpy as np

from dynaconv.export.graph import Writer, constant, initializer, only_user
from dynaconv.export.program import quiet


def simplify(model: Any) -> None:
    """What onnxscript's optimiser knows: constant folding, common expressions, trivial reshapes, conv + batch norm."""
    import onnxscript.optimizer

    with quiet():
        onnxscript.optimizer.optimize_ir(model, num_iterations=3, onnx_shape_inference=False)


def fold_norms(graph: Any) -> None:
    """Batch norms that follow a convolution into it; those that stand alone become a scale and a shift."""
    for node in list(graph):
        if node.op_type != "BatchNormalization" or node.domain:
            continue
        parts = [constant(v) for v in node.inputs[1:5]]
        if any(part is None for part in parts):
            continue
        weight, bias, mean, var = (part.astype(np.float64) for part in parts)
        epsilon = node.attributes["epsilon"].value if "epsilon" in node.attributes else 1e-5
        scale = weight / np.sqrt(var + epsilon)
        shift = bias - mean * scale
        conv = node.inputs[0].producer()
        if (
            conv is not None
            and conv.op_type == "Conv"
            and only_user(node.inputs[0]) is node
            and _absorb(graph, conv, scale, shift)
        ):
            node.outputs[0].replace_all_uses_with(conv.outputs[0], replace_graph_outputs=True)
        else:
            _scale_and_shift(graph, node, scale, shift)


def _absorb(graph: Any, conv: Any, scale: np.ndarray, shift: np.ndarray) -> bool:
    weight = constant(conv.inputs[1])
    bias = constant(conv.inputs[2]) if len(conv.inputs) > 2 and conv.inputs[2] is not None else np.zeros(1)
    if weight is None or bias is None:
        return False
    folded = (weight * scale.reshape(-1, *(1,) * (weight.ndim - 1))).astype(np.float32)
    conv.resize_inputs(3)
    conv.replace_input_with(1, initializer(graph, folded, conv.inputs[1].name))
    conv.replace_input_with(2, initializer(graph, (shift + bias * scale).astype(np.float32), "bias"))
    return True


def _scale_and_shift(graph: Any, node: Any, scale: np.ndarray, shift: np.ndarray) -> None:
    rank = len(node.inputs[0].shape) if node.inputs[0].shape is not None else 4
    form = (-1, *(1,) * (rank - 2))
    write = Writer(graph, node)
    scales = write.constant(scale.reshape(form).astype(np.float32))
    y = write("Mul", node.inputs[0], scales, like=node.outputs[0])
    y = write("Add", y, write.constant(shift.reshape(form).astype(np.float32)), like=node.outputs[0])
    node.outputs[0].replace_all_uses_with(y, replace_graph_outputs=True)


def transpose_weights(graph: Any) -> None:
    """Weights of products as [inputs, outputs], so that no runtime has to turn them."""
    for node in graph:
        if node.op_type != "Gemm" or node.attributes.get_int("transB", 0) != 1:
            continue
        weight = constant(node.inputs[1])
        if weight is not None:
            node.replace_input_with(
                1, initializer(graph, np.ascontiguousarray(weight.T), node.inputs[1].name)
            )
            node.attributes.pop("transB")


def average_pools(graph: Any) -> None:
    """Means over the grid as global pooling, which runtimes compute without leaving their own layout of channels."""
    for node in list(graph):
        if node.op_type != "ReduceMean" or len(node.inputs) < 2:
            continue
        x, axes = node.inputs[0], constant(node.inputs[1])
        if axes is None or x.shape is None:
            continue
        flat = x.producer() is not None and x.producer().op_type == "Reshape" and len(x.shape) == 3
        if flat and not node.attributes.get_int("keepdims", 1):
            # Positions along one axis.
            source = x.producer().inputs[0]
            if (
                source.shape is None
                or list(source.shape)[:2] != list(x.shape)[:2]
                or axes.tolist() not in ([2], [-1])
            ):
                continue
            x = source
        elif sorted(a % 4 for a in axes.tolist()) != [2, 3]:
            continue
        if len(x.shape) != 4:
            continue
        write = Writer(graph, node)
        y = write("GlobalAveragePool", x, shape=[*x.shape[:2], 1, 1])
        if not node.attributes.get_int("keepdims", 1):
            y = write("Squeeze", y, write.constant(np.array([2, 3])), like=node.outputs[0])
        node.outputs[0].replace_all_uses_with(y, replace_graph_outputs=True)


def drop_expands(graph: Any) -> None:
    """Products broadcast by themselves what is spread to the shape of their other factor first (ECA attention)."""
    for node in graph:
        if node.op_type != "Mul":
            continue
        for i, value in enumerate(node.inputs):
            spread, other = value.producer(), node.inputs[1 - i]
            if spread is not None and spread.op_type == "Expand" and _spans(other, spread.inputs[0]):
                node.replace_input_with(i, spread.inputs[0])


def _spans(value: Any, small: Any) -> bool:
    """A value has more than one number along the axes on which `small` has one; torch's free sizes are never 1."""
    if value.shape is None or small.shape is None or len(value.shape) != len(small.shape):
        return False
    return all(d != 1 for d, s in zip(value.shape, small.shape, strict=True) if s == 1)


def drop_unused(model: Any) -> None:
    """Copies, equal nodes, and nodes and constants that no output needs."""
    import onnx_ir.passes.common as passes

    passes.IdentityEliminationPass()(model)
    passes.CommonSubexpressionEliminationPass()(model)
    drop_unread(model)


def drop_unread(model: Any) -> None:
    """Nodes and constants that no output needs, and nothing else."""
    import onnx_ir.passes.common as passes

    passes.RemoveUnusedNodesPass()(model)


def convert(model: Any, opset: int) -> None:
    """Write the graph in a newer version of the operator set."""
    if model.graph.opset_imports[""] == opset:
        return
    import onnxscript.version_converter

    with quiet():
        onnxscript.version_converter.convert_version(model, opset)


def strip(model: Any) -> None:
    """Leave out how the graph came about: traces of source files, module names, shapes of inner values."""
    import onnx_ir.passes.common as passes

    passes.ClearMetadataAndDocStringPass()(model)
    model.graph.name = "dynaconv"
