"""From an exported graph to the compiler's graph: one handler for each operation that it knows.

A handler returns the `View` of the result, or a text with the reason why ATen has to run the operation.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree

from dynaconv.engine.export import Exported
from dynaconv.engine.ir import Constant, Graph, Node, Ref, View

Handler = Callable[
    ["Builder", fx.Node, list[Any], dict[str, Any]], "View | Constant | list[View] | str | None"
]
HANDLERS: dict[str, Handler] = {}


def handles(*names: str) -> Callable[[Handler], Handler]:
    """Register a handler for ATen operations, by name without overload."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


class Builder:
    """Walks over the exported graph; `env` holds what each of its nodes became."""

    def __init__(self, exported: Exported) -> None:
        self.exported = exported
        self.env: dict[fx.Node, Any] = {}
        self.nodes: list[Node] = []

    def build(self) -> Graph:
        """The graph, with one node for each operation that is not just another view."""
        outputs: list[Any] = []
        for node in self.exported.graph.nodes:
            if node.op == "placeholder":
                self.env[node] = self._placeholder(node)
            elif node.op == "output":
                outputs = _pytree.tree_map(self.value, list(node.args[0]))
            else:
                self.env[node] = self._call(node)
        graph = Graph(self.nodes, outputs)
        graph.tidy()
        return graph

    def add(self, op: str, node: fx.Node, size, layout: str, inputs: dict[str, Node], **attrs: Any) -> View:
        """A new node and how the exported graph looks at it."""
        made = Node(op, inputs, size, attrs, layer_of(node))
        self.nodes.append(made)
        return View(made, layout)

    def value(self, arg: Any) -> Any:
        """What an argument became."""
        return self.env[arg] if isinstance(arg, fx.Node) else arg

    def shape(self, node: fx.Node) -> tuple[int, ...] | None:
        """Sizes of one image behind the batch axis, or None when the first axis is not the batch or others vary."""
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.dim() == 0 or not self._is_batch(value.shape[0]):
            return None
        rest = value.shape[1:]
        return tuple(int(d) for d in rest) if all(isinstance(d, int) for d in rest) else None

    def map_size(self, node: fx.Node, layout: str) -> tuple[int, int, int] | None:
        """Size (h, w, channels) of a result in a layout."""
        shape = self.shape(node)
        if shape is None or node.meta["val"].dtype != torch.float32:
            return None
        if layout == "nc" and len(shape) == 1:
            return 1, 1, shape[0]
        if len(shape) != 3:
            return None
        c, h, w = shape if layout == "nchw" else (shape[2], shape[0], shape[1])
        return h, w, c

    def _is_batch(self, size: Any) -> bool:
        batch = self.exported.batch
        if batch is None:
            return size == self.exported.fixed_batch
        return isinstance(size, torch.SymInt) and size.node.expr == batch.node.expr

    def _placeholder(self, node: fx.Node) -> Any:
        if node.name in self.exported.constants:
            return Constant(self.exported.constants[node.name])
        index = self.exported.inputs.index(node)
        # Only the first input takes the native path.
        size = self.map_size(node, "nchw") if index == 0 else None
        return self.add("input", node, size, "nchw" if size else "raw", {}, index=index)

    def _call(self, node: fx.Node) -> Any:
        args = [_pytree.tree_map(self.value, a) for a in node.args]
        kwargs = {k: _pytree.tree_map(self.value, v) for k, v in node.kwargs.items()}
        if node.op == "get_attr":
            return getattr(node.graph.owning_module, node.target)
        name = target_name(node.target)
        if name in _REGIONS and not (name == "wrap_with_autocast" and args[2]):
            body = _REGIONS[name]
            return self._inline(args[body], args[body + 1 :])
        if name == "getitem" and isinstance(args[0], list):
            return args[0][args[1]]
        folded = _evaluate(node, args, kwargs)
        if folded is not None:
            return folded
        handler = HANDLERS.get(name)
        result = f"no kernel for {name}" if handler is None else handler(self, node, args, kwargs)
        if isinstance(result, (View, Constant, list)):
            return result
        return self.aten(node, result or f"this form of {name} has no kernel")

    def _inline(self, body: fx.GraphModule, args: list[Any]) -> list[Any]:
        """The results of a region of the graph, walked through in place."""
        values, results = iter(args), []
        for node in body.graph.nodes:
            if node.op == "placeholder":
                self.env[node] = next(values)
            elif node.op == "output":
                results = _pytree.tree_map(self.value, list(node.args[0]))
            else:
                self.env[node] = self._call(node)
        return results

    def aten(self, node: fx.Node, reason: str) -> View:
        """The operation as it is, for ATen."""
        inputs: dict[str, Node] = {}

        def place(arg: Any) -> Any:
            arg = self.value(arg)
            if not isinstance(arg, View):
                return _tree(arg, place) if isinstance(arg, list) else arg
            role = str(len(inputs))
            inputs[role] = arg.node
            return Ref(role, arg.layout)

        args = _tree(node.args, place)
        kwargs = _tree(node.kwargs, place)
        layout = {1: "nc", 3: "nchw"}.get(len(self.shape(node) or ()), "raw")
        size = None if layout == "raw" else self.map_size(node, layout)
        layout = "raw" if size is None else layout
        target = _STRIDE_FREE.get(node.target, node.target)
        attrs = {"target": target, "args": args, "kwargs": kwargs, "reason": reason, "held": layout}
        return self.add("aten", node, size, layout, inputs, **attrs)


def _tree(arg: Any, place: Callable[[Any], Any]) -> Any:
    if isinstance(arg, (list, tuple)):
        return [_tree(a, place) for a in arg]
    if isinstance(arg, dict):
        return {k: _tree(v, place) for k, v in arg.items()}
    return place(arg)


def _evaluate(node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Constant | list[Constant] | None:
    """The value, or values, of an operation that reads constants only, or nothing."""
    leaves = _pytree.tree_leaves((args, kwargs), is_leaf=lambda v: isinstance(v, (View, Constant)))
    if any(isinstance(v, (View, fx.Node)) for v in leaves) or node.op != "call_function":
        return None
    value = node.meta.get("val")
    several = isinstance(value, (tuple, list)) and all(isinstance(v, Tensor) for v in value)
    if not (several or isinstance(value, Tensor)) or torch.Tag.nondeterministic_seeded in getattr(
        node.target, "tags", ()
    ):
        return None
    args, kwargs = _pytree.tree_map(
        lambda v: v.tensor if isinstance(v, Constant) else v,
        (args, kwargs),
        is_leaf=lambda v: isinstance(v, Constant),
    )
    with torch.no_grad():
        result = node.target(*args, **kwargs)
    return [Constant(r) for r in result] if several else Constant(result)


def target_name(target: Any) -> str:
    """conv2d for torch.ops.aten.conv2d.default; the function's own name for others."""
    if isinstance(target, torch._ops.HigherOrderOperator):
        return target.name()
    if target is GETITEM:
        return "getitem"
    schema = getattr(target, "_schema", None)
    if schema is None:
        # Arithmetic with sizes is no arithmetic with maps.
        return f"{getattr(target, '__module__', '')}.{getattr(target, '__name__', target)}"
    return schema.name.removeprefix("aten::")


def layer_of(node: fx.Node) -> str:
    """Path of the innermost module whose forward made this node."""
    stack = node.meta.get("nn_module_stack") or {}
    path = list(stack.values())[-1][0] if stack else ""
    return path.removeprefix("L['self'].") or node.name


def channel_vector(view: View, constant: Any) -> Tensor | None:
    """A constant that broadcasts over channels (or everywhere) as [channels]; None when it does not."""
    size = view.node.size
    if size is None or view.layout not in ("nchw", "nhwc", "nc"):
        return None
    if isinstance(constant, (int, float)):
        return torch.full((size[2],), float(constant))
    if not isinstance(constant, Constant) or not constant.tensor.is_floating_point():
        return None
    tensor, axes = constant.tensor, {"nchw": 4, "nhwc": 4, "nc": 2}[view.layout]
    if tensor.numel() == 1:
        return tensor.reshape(1).expand(size[2]).float()
    if tensor.dim() > axes:
        return None
    shape = (1,) * (axes - tensor.dim()) + tuple(tensor.shape)
    axis = 1 if view.layout == "nchw" else axes - 1
    return tensor.reshape(-1).float() if shape[axis] == size[2] == tensor.numel() else None


# Regions that change nothing here (gradients are off, and so is autocast), by where their body stands in the arguments.
_REGIONS = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}
GETITEM = operator.getitem
# Maps come as channels-last views, whose strides the exported graph did not see.
_STRIDE_FREE = {
    torch.ops.aten.view.default: torch.ops.aten.reshape.default,
    torch.ops.aten._unsafe_view.default: torch.ops.aten.reshape.default,
}
