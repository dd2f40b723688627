"""Steps of convolutions with a kernel for each image (mixed from experts, or with channels fused), and of routers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from dynaconv.engine import pack
from dynaconv.engine.expansions import folds
from dynaconv.engine.fold import zero_bias
from dynaconv.engine.ir import Node
from dynaconv.engine.lower_convolutions import RUN_ALL_ABOVE, convolution, packed
from dynaconv.engine.pack_experts import pack_experts
from dynaconv.engine.pack_fusion import pack_fusion

if TYPE_CHECKING:
    from dynaconv.engine.lower import Lowering

# Coefficients of a mixture by their place in Step.aux.
_AUX = ("routing", "taps", "scale_in", "scale_out")
# Rows of a channel fusion's factors are padded to so many numbers.
_FACTOR_ROW = 16


def _mixed(lowering: Lowering, node: Node) -> None:
    """The step of such a convolution, with what becomes of the rows that its mask closes."""
    folded = "low_rank" in node.attrs and folds(node)
    if "low_rank" in node.attrs:
        kind, convs = "channel_fusion", list(pack_fusion(node.attrs, zero_bias(node), folded))
        aux, ints = [lowering.value(node.inputs["coefficients"]), -1, -1, -1], [1, 1]
        ints += [0, int(not folded), int(node.attrs["low_rank"].gated)]
    else:
        kind, convs = "dynamic_conv", [*pack_experts(node.attrs, zero_bias(node)), None]
        aux = [lowering.value(node.inputs[role]) if role in node.inputs else -1 for role in _AUX]
        ints = [node.attrs["experts"].shape[0], int(node.attrs["each_output"]), 0]
    tiles = pack.can_winograd(convs[0]) and (folded or kind == "dynamic_conv")
    ints[2] = int(tiles)
    convolution(
        lowering, kind, node, lambda: [lowering.conv_data(c)[0] if c is not None else -1 for c in convs],
        tiles=tiles, aux=aux, ints=ints + [0] * (8 - len(ints)),
    )  # fmt: skip


def _expanded(lowering: Lowering, node: Node) -> None:
    """The step of an expansion and a depthwise convolution, after the weights of each image where it has such."""
    expand, depthwise = node.attrs["parts"]
    source, aux, ints = lowering.value(node.x), [-1] * 4, [0] * 8
    middle = packed(lowering, depthwise, "depthwise")[0]
    if expand.is_mixed:
        static, reduce, add = (
            lowering.conv_data(c)[0] for c in pack_fusion(expand.attrs, zero_bias(expand), False)
        )
        folded = folds(expand)
        convs, ints[0] = [static, middle, add], 1 if folded else 2
        aux[0] = _factors(lowering, node, expand, reduce, folded)
    else:
        convs = [packed(lowering, expand, "conv")[0], middle, -1]
    out = lowering.result(node)
    if "mean" in node.attrs:
        aux[1] = lowering.result(node.attrs["mean"])
    fields: dict[str, Any] = {"aux": aux, "ints": ints}
    if "grid" in node.inputs:
        fields |= {role: lowering.grids[node.inputs[role]] for role in ("grid", "grid2")}
        fields["run_all_above"] = RUN_ALL_ABOVE
    acts = [expand.attrs["act"], depthwise.attrs["act"], "none"]
    lowering.step("inverted", node, input=source, out=out, conv=convs, activation=acts, **fields)


def _router(lowering: Lowering, node: Node) -> None:
    """The step of a router, or of squeeze and excite."""
    source, out, parts = lowering.value(node.x), lowering.result(node), node.attrs["parts"]
    convs = [-1 if part is None else packed(lowering, part, "conv")[0] for part in parts]
    for index in convs:
        if index >= 0:
            lowering.plan.convs[index].winograd = None
    acts = ["none" if part is None else part.attrs["act"] for part in parts]
    lowering.step("router", node, input=source, out=out, conv=convs, activation=acts)


def _factors(lowering: Lowering, node: Node, expand: Node, reduce: int, folded: bool) -> int:
    """What the coefficients come to for each image: for its weights where it folds them, else at every position."""
    part, coefficients = expand.attrs["low_rank"], lowering.value(node.inputs["coefficients"])
    rank, inputs = part.q.shape
    if folded:
        conv = lowering.plan.convs[reduce]
        conv.form, conv.weight, conv.bias = "reduction", part.q.t().contiguous(), part.shift.clone()
    rows = 1 + inputs if folded else math.prod(expand.size[:2])
    scales, row = -(-expand.size[2] // pack.PANEL) * pack.PANEL, -(-rank // _FACTOR_ROW) * _FACTOR_ROW
    out = lowering.room((1, 1, scales + rows * row), expand.layer)
    source = -1 if folded else lowering.value(node.x)
    lowering.step(
        "fusion_factors", expand, input=source, out=out, conv=[-1, reduce, -1], aux=[coefficients, -1, -1, -1],
        ints=[0, 0, 0, 0, int(part.gated), 0, 0, 0],
    )  # fmt: skip
    return out


EMIT = {"mixed": _mixed, "expanded": _expanded, "router": _router}
