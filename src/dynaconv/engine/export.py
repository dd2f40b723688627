"""From a module to a graph of pure operations: `torch.export`, dynamic batch, in-place operations made functional."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind

from dynaconv import _checks

# They may return their input itself, or a view of it.
_VIEWS = {
    "view", "reshape", "flatten", "permute", "transpose", "squeeze", "unsqueeze", "slice", "select", "expand",
    "dropout",
    "contiguous", "to", "detach", "chunk", "split", "alias", "t", "unflatten", "movedim", "narrow", "split_with_sizes",
    "unbind", "_unsafe_view", "lift_fresh_copy", "diagonal", "expand_as", "view_as", "reshape_as", "feature_dropout",
}  # fmt: skip


@dataclass
class Exported:
    """A functional graph: constants by placeholder, the image's placeholder, and the structure of the result."""

    graph: fx.Graph
    constants: dict[str, Tensor]
    inputs: list[fx.Node]
    out_spec: Any
    batch: Any
    fixed_batch: int | None
    keep: Any = field(repr=False, default=None)


def export(model: nn.Module, example: tuple[Any, ...]) -> Exported:
    """Export a copy of `model` in evaluation mode.

    The batch axis (the first axis of the first input) stays dynamic where the network allows it; otherwise
    `fixed_batch` holds the size that the graph is made for.

    Raises:
        ValueError: `torch.export` cannot follow the forward.
    """
    model = copy.deepcopy(model)
    for module in model.modules():
        module._forward_hooks = type(module._forward_hooks)(
            (k, h) for k, h in module._forward_hooks.items() if not getattr(h, "forces_masks", False)
        )
    with torch.no_grad(), warnings.catch_warnings():
        # Third-party notices about torch.export's own inner workings.
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        program, fixed = _program(model, example)
        bodies = [m for m in program.graph_module.modules() if isinstance(m, fx.GraphModule)]
        if not all(functionalise(body.graph) for body in bodies):
            program = program.run_decompositions({})
    signature = program.graph_signature
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        names = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
        raise _checks.engine_mutates(names)
    constants, inputs = {}, []
    placeholders = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    for spec in signature.input_specs:
        node = placeholders[spec.arg.name]
        if spec.kind == InputKind.USER_INPUT:
            inputs.append(node)
        elif spec.kind == InputKind.PARAMETER or (spec.kind == InputKind.BUFFER and spec.persistent):
            constants[node.name] = program.state_dict[spec.target].detach()
        else:
            constants[node.name] = program.constants[spec.target]
    batch = None if fixed is not None else inputs[0].meta["val"].shape[0]
    return Exported(program.graph, constants, inputs, program.call_spec.out_spec, batch, fixed, program)


def _program(model: nn.Module, example: tuple[Any, ...]):
    """The exported program, and the batch size that it is tied to (None: any)."""
    x = example[0]
    pair = torch.cat([x, x]) if x.shape[0] == 1 else x
    if len(example) == 1:
        try:
            program = torch.export.export(
                model, (pair,), dynamic_shapes=({0: torch.export.Dim.AUTO},), strict=False
            )
            size = _first_input(program).shape[0]
            if isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None:
                return program, None
        except Exception as error:  # noqa: BLE001  whatever it is, the second try reports it
            del error
    try:
        return torch.export.export(model, example, strict=False), int(x.shape[0])
    except Exception as error:
        raise _checks.engine_not_exportable(type(model).__name__, error) from error


def _first_input(program) -> Tensor:
    name = program.graph_signature.user_inputs[0]
    return next(n.meta["val"] for n in program.graph.nodes if n.name == name)


def functionalise(graph: fx.Graph) -> bool:
    """Replace operations that write into their first argument by those that return the result.

    Returns:
        False when that is not safe, because another tensor shares the memory and is read later.
    """
    place = {node: i for i, node in enumerate(graph.nodes)}
    writers = [n for n in graph.nodes if _schema(n) is not None and _schema(n).is_mutable]
    twins = {}
    for node in writers:
        twin = _functional(node)
        if twin is None or not isinstance(node.args[0], fx.Node) or node.args[0].op == "placeholder":
            return False
        shared = _sharing(node.args[0])
        if any(
            place[u] > place[node]
            for s in shared
            if s is not node.args[0]
            for u in s.users
            if u not in shared
        ):
            return False
        twins[node] = twin
    for node in writers:
        target = node.args[0]
        node.target = twins[node]
        for user in list(target.users):
            if place.get(user, -1) > place[node]:
                user.replace_input_with(target, node)
    return True


def _schema(node: fx.Node):
    return getattr(node.target, "_schema", None) if node.op == "call_function" else None


def _functional(node: fx.Node):
    name = node.target._schema.name.removeprefix("aten::")
    packet = getattr(torch.ops.aten, name[:-1], None) if name.endswith("_") else None
    overload = node.target._overloadname
    return getattr(packet, overload, None) if packet is not None and overload in packet.overloads() else None


def _sharing(node: fx.Node) -> set[fx.Node]:
    """Nodes that may share memory with this one."""
    found, stack = set(), [node]
    while stack:
        current = stack.pop()
        if current in found:
            continue
        found.add(current)
        if _is_view(current) and current.args and isinstance(current.args[0], fx.Node):
            stack.append(current.args[0])
        stack += [user for user in current.users if _is_view(user)]
    return found


def _is_view(node: fx.Node) -> bool:
    schema = _schema(node)
    if schema is None:
        return node.op == "call_function"
    return schema.name.removeprefix("aten::").removesuffix("_") in _VIEWS
