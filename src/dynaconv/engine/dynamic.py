"""Convolutions with a kernel for each image, from the operator in the exported graph.

Source: CondConv, arXiv 1904.04971, equation 1; DY-Conv, arXiv 1912.03458, equation 2.
"""

from __future__ import annotations

from torch import fx

from dynaconv.engine.build import Builder, handles
from dynaconv.engine.build_ops import is_map, pair
from dynaconv.engine.ir import Constant, View

_NAMES = ("x", "experts", "routing", "bias", "static_bias", "taps", "stride", "padding", "dilation", "groups")


@handles("dynaconv::dynamic_conv2d")
def dynamic_conv(b: Builder, node: fx.Node, args: list, kwargs: dict) -> View | str | None:
    """A convolution like others for the passes, whose weight is mixed from `experts` by `routing`."""
    call = dict.fromkeys(_NAMES) | dict(zip(_NAMES, args, strict=False)) | kwargs
    experts, bias, static = call["experts"], call["bias"], call["static_bias"]
    if not isinstance(experts, Constant) or any(not isinstance(t, Constant | None) for t in (bias, static)):
        return "its experts depend on the input"
    size = b.map_size(node, "nchw")
    if not is_map(call["x"], "nchw") or size is None or experts.tensor.dim() != 5:
        return "only 2-d convolutions in float32 over images of a fixed size have kernels"
    inputs = {"x": call["x"].node}
    for role in ("routing", "taps"):
        if call[role] is not None:
            if not is_map(call[role], "nc"):
                return f"its {role} differ for each output channel"
            inputs[role] = call[role].node
    weights = experts.tensor.float()
    return b.add(
        "conv", node, size, "nchw", inputs, weight=weights[0], experts=weights,
        expert_bias=None if bias is None else bias.tensor.float(),
        bias=None if static is None else static.tensor.float(), stride=pair(call["stride"]),
        padding=pair(call["padding"]), dilation=pair(call["dilation"]), groups=call["groups"], act="none",
    )  # fmt: skip
