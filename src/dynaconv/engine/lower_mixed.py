"""Steps of convolutions with a kernel for each image: mixed from experts, or with channels fused."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from dynaconv.engine import pack
from dynaconv.engine.fold import zero_bias
from dynaconv.engine.ir import Node
from dynaconv.engine.pack_experts import pack_experts
from dynaconv.engine.pack_fusion import pack_fusion

if TYPE_CHECKING:
    from dynaconv.engine.lower import Lowering

# Coefficients of a mixture by their place in Step.aux.
_AUX = ("routing", "taps", "scale_in", "scale_out")


def lower_mixed(lowering: Lowering, node: Node) -> None:
    """The step of such a convolution, with what becomes of the rows that its mask closes."""
    folded = "low_rank" in node.attrs and _folds(node)
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
    lowering.convolution(
        kind, node, lambda: [lowering.conv_data(c)[0] if c is not None else -1 for c in convs], tiles=tiles, aux=aux,
        ints=ints + [0] * (8 - len(ints)),
    )  # fmt: skip


def _folds(node: Node) -> bool:
    taps, positions = math.prod(node.attrs["weight"].shape[2:]), math.prod(node.size[:2])
    return node.attrs["groups"] == 1 and node.attrs["low_rank"].folds(taps, positions)
