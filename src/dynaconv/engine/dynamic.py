"""Convolutions with a kernel for each image, from the operator in the exported graph.

Source: CondConv, arXiv 1904.04971, equation 1; DY-Conv, arXiv 1912.03458, equation 2; DyNet, OpenReview SyeZIkrKwS,
equation 1; ODConv, arXiv 2209.07947, equation 4, whose scales of inputs and outputs join in scales.py.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from dynaconv.engine.build import Builder, handles
from dynaconv.engine.build_ops import is_map, pair
from dynaconv.engine.build_parts import matrix_width
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
    inputs, each_output = {"x": call["x"].node}, False
    if not _is_one(call["routing"], experts):
        each_output = _is_of_each_output(call["routing"], experts)
        if not each_output and not is_map(call["routing"], "nc"):
            return "its routing is no float tensor of one row an image"
        inputs["routing"] = call["routing"].node
    if call["taps"] is not None:
        if not is_map(call["taps"], "nc"):
            return "its taps are no float tensor of one row an image"
        inputs["taps"] = call["taps"].node
    weights = experts.tensor.float()
    return b.add(
        "conv", node, size, "nchw", inputs, weight=weights[0], experts=weights, each_output=each_output,
        expert_bias=None if bias is None else bias.tensor.float(),
        bias=None if static is None else static.tensor.float(), stride=pair(call["stride"]),
        padding=pair(call["padding"]), dilation=pair(call["dilation"]), groups=call["groups"], act="none",
    )  # fmt: skip


def _is_of_each_output(routing: Any, experts: Constant) -> bool:
    """Coefficients [N, O, K]."""
    count, outputs = experts.tensor.shape[:2]
    if not isinstance(routing, View) or routing.node.size != (1, 1, outputs * count):
        return False
    return matrix_width(routing.layout) == count or (routing.layout == "nc1" and count == 1)


@handles("new_ones")
def new_ones(b: Builder, node: fx.Node, args: list, kwargs: dict) -> View:
    """Runs through ATen unless it only weighs a single expert."""
    made = b.aten(node, "a tensor of ones has no kernel")
    made.node.attrs["ones"] = True
    return made


def _is_one(routing: Any, experts: Constant) -> bool:
    single = experts.tensor.shape[0] == 1
    return single and isinstance(routing, View) and "ones" in routing.node.attrs
