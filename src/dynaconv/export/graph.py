"""Reading and writing nodes of an ONNX graph (`onnx_ir`) with few words."""

from __future__ import annotations

from typing import Any

import numpy as np


def constant(value: Any) -> np.ndarray | None:
    """The array of a value that does not depend on the input, or None."""
    if value is None or value.is_graph_input() or value.const_value is None:
        return None
    return value.const_value.numpy()


def initializer(graph: Any, array: np.ndarray, name: str = "constant") -> Any:
    """A new constant of the graph, under a free name that starts with `name`."""
    import onnx_ir as ir

    name, i = name or "constant", 0
    unique = name
    while unique in graph.initializers:
        i += 1
        unique = f"{name}.{i}"
    tensor = ir.tensor(np.ascontiguousarray(array), name=unique)
    value = ir.Value(
        name=unique, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def ir_tensor(array: np.ndarray) -> Any:
    """An array as an attribute takes it."""
    import onnx_ir as ir

    return ir.tensor(array)


def attribute(node: Any, name: str, default: Any = None) -> Any:
    """The value of an attribute."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def only_user(value: Any) -> Any:
    """The node that alone reads a value which the graph does not return, or None."""
    uses = value.uses()
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def _result_type(op: str, inputs: tuple[Any, ...]) -> Any:
    """The type of what an operation makes: that of its first input, apart from those that make sizes or places."""
    import onnx_ir as ir

    if op in ("Shape", "NonZero"):
        return ir.DataType.INT64
    if op in ("Equal", "GreaterOrEqual", "Less", "And"):
        return ir.DataType.BOOL
    if op == "Where":
        return inputs[1].dtype
    return ir.DataType.FLOAT if op == "ConstantOfShape" else inputs[0].dtype


class Writer:
    """Writes nodes in front of another one: `write("Add", a, b)` returns the result.

    share: constants that were written before, by content.
    """

    def __init__(self, graph: Any, before: Any, share: dict[Any, Any] | None = None) -> None:
        self.graph, self.before = graph, before
        self._share = {} if share is None else share

    def __call__(self, op: str, *inputs: Any, like: Any = None, shape: Any = None, **attributes: Any) -> Any:
        """One node with one result; its shape and type as given, as of `like`, or unknown."""
        import onnx_ir as ir

        node = ir.node(op, list(inputs), attributes)
        self.graph.insert_before(self.before, node)
        y = node.outputs[0]
        if like is not None:
            y.shape, y.type = like.shape, like.type
        if shape is not None:
            y.shape = ir.Shape([d if isinstance(d, int) else getattr(d, "value", d) for d in shape])
        if y.type is None:
            filled = attributes.get("value") if op == "ConstantOfShape" else None
            kind = ir.DataType(attributes["to"]) if op == "Cast" else _result_type(op, inputs)
            y.type = ir.TensorType(kind if filled is None else filled.dtype)
        return y

    def constant(self, array: Any, name: str = "constant") -> Any:
        """A constant, shared with equal ones."""
        array = np.ascontiguousarray(array)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._share:
            self._share[key] = initializer(self.graph, array, name)
        return self._share[key]

    def integers(self, *numbers: int) -> Any:
        """A constant vector of int64."""
        return self.constant(np.array(numbers, np.int64))
