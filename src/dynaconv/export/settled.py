"""Gates whose fixed threshold leaves nothing to decide: always open, or always closed."""

from __future__ import annotations

from typing import Any

import numpy as np

from dynaconv.export.branches import SAME_VALUES
from dynaconv.export.graph import Writer, attribute, constant, ir_tensor
from dynaconv.export.trace import Traced

_COMPARISONS = ("Greater", "GreaterOrEqual")
OPEN, CLOSED = "open", "closed"


def settle(traced: Traced) -> dict[str, str]:
    """Write masks of gates with an infinite threshold as constants, and blocks without a product with them.

    A budget of 1 sets such thresholds: then the blocks are those of the static network, and nobody asks the gates.

    Returns:
        Block -> "open" or "closed", for those gates.
    """
    found: dict[str, str] = {}
    for name, mask in traced.masks.items():
        state = _state(mask)
        if state is None or not _fixed(mask):
            continue
        found[name] = state
        value = _constant_mask(traced.graph, mask, float(state == OPEN))
        mask.replace_all_uses_with(value, replace_graph_outputs=True)
        for use in list(value.uses()):
            if use.node.op_type == "Mul":
                _drop_product(use.node, value, state)
    return found


def _state(mask: Any) -> str | None:
    cast = mask.producer()
    while cast is not None and cast.op_type in SAME_VALUES and cast.op_type != "Cast":
        cast = cast.inputs[0].producer()
    if cast is None or cast.op_type != "Cast" or attribute(cast, "to") != 1:
        return None
    compare = cast.inputs[0].producer()
    if compare is None or compare.op_type not in _COMPARISONS:
        return None
    threshold = constant(compare.inputs[1])
    if threshold is None or threshold.size != 1 or not np.isinf(threshold).all():
        return None
    return CLOSED if threshold.reshape(-1)[0] > 0 else OPEN


def _fixed(mask: Any) -> bool:
    """All but the number of images is known."""
    return mask.shape is not None and all(isinstance(d, int) for d in list(mask.shape)[1:])


def _constant_mask(graph: Any, mask: Any, number: float) -> Any:
    write, image = Writer(graph, mask.producer()), graph.inputs[0]
    batch = write("Shape", image, start=0, end=1)
    shape = write("Concat", batch, write.integers(*list(mask.shape)[1:]), axis=0)
    return write("ConstantOfShape", shape, value=ir_tensor(np.full(1, number, np.float32)), like=mask)


def _drop_product(product: Any, mask: Any, state: str) -> None:
    """mask * branch is the branch, or where the shortcut is all that is left, the shortcut."""
    y, other = product.outputs[0], next((v for v in product.inputs if v is not mask), None)
    if other is None or not _same(other, y):
        return
    if state == OPEN:
        y.replace_all_uses_with(other, replace_graph_outputs=True)
        return
    uses = y.uses()
    add = uses[0].node if len(uses) == 1 and not y.is_graph_output() else None
    if add is None or add.op_type != "Add" or len(set(add.inputs)) != 2:
        return
    shortcut = next(v for v in add.inputs if v is not y)
    if _same(shortcut, add.outputs[0]):
        add.outputs[0].replace_all_uses_with(shortcut, replace_graph_outputs=True)


def _same(a: Any, b: Any) -> bool:
    return a.shape is not None and b.shape is not None and list(map(str, a.shape)) == list(map(str, b.shape))
