"""Operations that the engine does not know, left to ATen between the native steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dynaconv.engine.aten import encode, is_known, target_text
from dynaconv.engine.ir import Node, Ref, View
from dynaconv.engine.plan import AtenStep, Segment

if TYPE_CHECKING:
    from dynaconv.engine.lower import Lowering


def _aten(lowering: Lowering, node: Node) -> None:
    attrs = node.attrs
    lowering.close_segment()
    args = encode(_map(attrs["args"], lambda v: _filled(lowering, node, v)), lowering.plan.constants)
    kwargs = encode(_map(attrs["kwargs"], lambda v: _filled(lowering, node, v)), lowering.plan.constants)
    text = target_text(attrs["target"])
    if not is_known(text):
        # An operator of somebody else's: this plan holds it, but no file can.
        lowering.plan.constants[text] = attrs["target"]
    step = AtenStep(text, args, kwargs, lowering.slot(node), node.layer, attrs["reason"])
    lowering.plan.aten.append(step)
    lowering.plan.segments.append(Segment(aten=len(lowering.plan.aten) - 1))


def _filled(lowering: Lowering, node: Node, arg: Any) -> Any:
    return lowering.argument(View(node.inputs[arg.role], arg.layout) if isinstance(arg, Ref) else arg)


def _map(arg: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(arg, Ref):
        return change(arg)
    if isinstance(arg, list):
        return [_map(a, change) for a in arg]
    if isinstance(arg, dict):
        return {k: _map(v, change) for k, v in arg.items()}
    return change(arg)


EMIT = {"aten": _aten}
