"""What runs through ATen between native steps: references to tensors, JSON form, execution."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dynaconv.engine.plan import AtenStep

# Plans come from files: nothing but arithmetic and registered operators can be named in them.
_NAMESPACES = ("aten", "prims", "dynaconv", "torchvision")
_BUILTINS = ("abs", "bool", "float", "int", "max", "min", "pow", "round", "sum")
_NAMED = {"dtype": torch.dtype, "memory_format": torch.memory_format, "layout": torch.layout}


def slot_ref(slot: int, held: str, layout: str) -> dict[str, Any]:
    """A reference to a tensor: it is held as "rows" [N, h, w, C] or in a layout, and wanted in another."""
    return {"$": "slot", "slot": slot, "held": held, "layout": layout}


def look(rows: Tensor, layout: str) -> Tensor:
    """Rows [N, h, w, C] as the exported graph sees them."""
    n, h, w, c = rows.shape
    if layout == "nhwc":
        return rows
    if layout == "nchw":
        return rows.permute(0, 3, 1, 2)
    if layout == "nc":
        return rows.reshape(n, c)
    if layout == "nc1":
        return rows.reshape(n, c, 1)
    if "/" in layout:
        kind, number = layout.split("/")
        if kind == "nc":
            return rows.reshape(n, -1, int(number))
        groups = rows.permute(0, 3, 1, 2).unflatten(1, (int(number), -1))
        return groups if kind == "grouped" else groups.transpose(1, 2)
    assert layout in ("flat", "ncl")
    return (
        rows.permute(0, 3, 1, 2).reshape(n, c * h * w)
        if layout == "flat"
        else rows.flatten(1, 2).transpose(1, 2)
    )


def as_rows(tensor: Tensor, layout: str) -> Tensor:
    """A tensor in a layout as rows [N, h, w, C], contiguous."""
    if layout == "nchw":
        return tensor.permute(0, 2, 3, 1).contiguous()
    if layout == "nhwc":
        return tensor.contiguous()
    assert layout == "nc"
    return tensor.contiguous()[:, None, None, :]


def encode(value: Any, constants: dict[str, Any]) -> Any:
    """Arguments as JSON; tensors, and objects that JSON has no words for, go to `constants`."""
    if isinstance(value, (list, tuple)):
        return [encode(v, constants) for v in value]
    if isinstance(value, dict):
        return value if "$" in value else {k: encode(v, constants) for k, v in value.items()}
    if isinstance(value, Tensor):
        return {"$": "constant", "name": keep(value, constants)}
    if isinstance(value, torch.device):
        return {"$": "device", "name": str(value)}
    for kind, cls in _NAMED.items():
        if isinstance(value, cls):
            return {"$": kind, "name": str(value).removeprefix("torch.")}
    if isinstance(value, float) and value != value or value in (float("inf"), -float("inf")):
        return {"$": "float", "name": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return {"$": "constant", "name": keep(value, constants)}


def keep(value: Any, constants: dict[str, Any]) -> str:
    """Put a tensor or an object into `constants` once, and return its name there."""
    name = next((k for k, t in constants.items() if t is value), f"t{len(constants)}")
    constants[name] = value
    return name


def decode(value: Any, constants: dict[str, Tensor], slots: Sequence[Any]) -> Any:
    """Inverse of `encode`, with references replaced by tensors."""
    if isinstance(value, list):
        return [decode(v, constants, slots) for v in value]
    if not isinstance(value, dict):
        return value
    kind = value.get("$")
    if kind == "slot":
        held, layout = value["held"], value["layout"]
        tensor = slots[value["slot"]]
        if held == layout:
            return tensor
        return look(tensor if held == "rows" else as_rows(tensor, held), layout)
    if kind == "constant":
        return constants[value["name"]]
    if kind == "device":
        return torch.device(value["name"])
    if kind == "float":
        return float(value["name"])
    if kind in _NAMED:
        return getattr(torch, value["name"])
    return {k: decode(v, constants, slots) for k, v in value.items()}


def target_text(target: Any) -> str:
    """A name from which `target_of` finds the operation again."""
    schema = getattr(target, "_schema", None)
    if schema is not None:
        return f"{schema.name}.{target._overloadname}"
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"higher_order:{target.name()}"
    return f"{target.__module__.replace('_operator', 'operator')}:{target.__name__}"


def target_of(text: str, constants: dict[str, Any]) -> Callable[..., Any]:
    """The operation; AttributeError when this PyTorch does not have it, or when a plan has no business to call it."""
    if text in constants:
        return constants[text]
    if "::" in text:
        namespace, rest = text.split("::")
        name, overload = rest.rsplit(".", 1)
        if namespace in _NAMESPACES:
            return getattr(getattr(getattr(torch.ops, namespace), name), overload)
    else:
        module, name = text.split(":")
        allowed = {"operator": name.isidentifier(), "math": True, "builtins": name in _BUILTINS}
        if module == "torch" and name.startswith("sym_") or allowed.get(module, False):
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"{text} is no operation of PyTorch")


def is_known(text: str) -> bool:
    """A plan file may name this operation."""
    try:
        target_of(text, {})
    except (AttributeError, ValueError):
        return False
    return True


def run_aten(
    step: AtenStep, target: Callable[..., Any], constants: dict[str, Tensor], slots: list[Any]
) -> None:
    """Run one step and put its result into its slot."""
    args, kwargs = decode(step.args, constants, slots), decode(step.kwargs, constants, slots)
    slots[step.out] = target(*args, **kwargs)
